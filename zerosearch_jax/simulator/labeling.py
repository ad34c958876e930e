"""Judges of searches, and how far they agree with the paper's rule.

A language model is asked whether the documents support the gold answer; or a fixed reader answers
the question from them: they are useful when its answer is right, noisy when they do not even
mention the right one.
"""

import os
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial

import jax
from ml_collections import ConfigDict

from zerosearch_jax.errors import UserError
from zerosearch_jax.generate.sampling import GREEDY
from zerosearch_jax.generate.texts import TextGenerator
from zerosearch_jax.parallel.mesh import make_mesh
from zerosearch_jax.rl.rewards import exact_match
from zerosearch_jax.search.chat import ChatClient
from zerosearch_jax.search.http_client import SearchFailed
from zerosearch_jax.simulator.reader import Reader, make_reader
from zerosearch_jax.text.matching import mentions
from zerosearch_jax.text.prompts import judge_prompt, parse_verdict
from zerosearch_jax.training import factory

KINDS = ("none", "reader", "local", "server")

# A search as it is judged: question, gold answers, query, documents.
Search = tuple[str, Sequence[str], str, Sequence[str]]
Judge = Callable[[Sequence[Search]], list[str | None]]
Complete = Callable[[Sequence[str], Sequence[tuple[int, int]]], list[str | SearchFailed]]


def check_judge(config: ConfigDict) -> None:
    """Refuses a `judge` section that cannot work."""
    if config.kind not in KINDS:
        raise UserError(f"config.judge.kind is {config.kind!r}; choose one of {', '.join(KINDS)}")
    if config.kind != "none" and not config.model:
        raise UserError(
            f"config.judge.kind={config.kind} needs config.judge.model: "
            "a model directory, or the name that the server knows"
        )
    if config.kind == "server" and not config.url:
        raise UserError("config.judge.kind=server needs config.judge.url, say http://HOST:PORT")
    if config.batch < 1:
        raise UserError(f"config.judge.batch={config.batch}: it must be at least 1")
    if config.server.key_variable and config.server.key_variable not in os.environ:
        raise UserError(
            f"config.judge.server.key_variable: the environment has no variable "
            f"{config.server.key_variable}; set it to the server's API key"
        )


def make_judge(config: ConfigDict, seed: int, mesh_config: ConfigDict) -> Judge | None:
    """Labels searches: "useful", "noisy", or None where it cannot tell. None for kind "none"."""
    if config.kind == "none":
        return None
    if config.kind == "reader":
        return partial(read_verdicts, make_reader(config, mesh_config))
    if config.kind == "server":
        return partial(verdicts, _server(config, seed))
    mesh = make_mesh(**mesh_config)
    model = factory.load_model(config.model, mesh, config.generator.dtype)
    generator = factory.make_generator(model, config.generator, mesh, stop_strings=())
    generator.warm_up([GREEDY])
    complete = TextGenerator(
        generator,
        model.tokenizer,
        sampling=GREEDY,
        max_new_tokens=config.response_tokens,
        key=jax.random.key(seed),
    )
    return partial(verdicts, complete)


def read_verdicts(reader: Reader, searches: Sequence[Search]) -> list[str | None]:
    """ "useful" where the reader answers right from the documents.

    Where it does not, "noisy" if no document mentions a gold answer, else None: the fault may be
    the reader's.
    """
    questions, golds, queries, documents = zip(*searches, strict=True)
    answers = reader(questions, queries, documents)
    labels: list[str | None] = []
    for answer, gold, found in zip(answers, golds, documents, strict=True):
        if exact_match(answer, gold):
            labels.append("useful")
        else:
            held = any(mentions(document, one) for document in found for one in gold)
            labels.append(None if held else "noisy")
    return labels


def _server(config: ConfigDict, seed: int) -> ChatClient:
    server, headers = config.server, {}
    if server.key_variable:
        headers["Authorization"] = f"Bearer {os.environ[server.key_variable]}"
    return ChatClient(
        factory.json_client(server, config.url, headers),
        model=config.model,
        temperature=0.0,
        top_p=1.0,
        max_tokens=config.response_tokens,
        workers=server.workers,
        seed=seed,
    )


def verdicts(complete: Complete, searches: Sequence[Search]) -> list[str | None]:
    """The language model's label of each search: None where it says neither yes nor no.

    Raises:
      UserError: the judge's server failed, after its retries.
    """
    asked = [judge_prompt(question, golds, found) for question, golds, _, found in searches]
    # A greedy judge draws nothing; the keys only tell the prompts apart.
    replies = complete(asked, [(i, 0) for i in range(len(asked))])
    for reply in replies:
        if isinstance(reply, SearchFailed):
            raise UserError(
                f"the judge's server failed ({reply.reason}); mend it and give the same command: "
                "what was judged before stays"
            )
    names = {True: "useful", False: "noisy", None: None}
    return [names[parse_verdict(reply)] for reply in replies]


def agreement(labels: Sequence[tuple[str, str | None]]) -> dict:
    """How far the rule and the judge agree on the searches that both have labelled.

    Args:
      labels: (rule, judge) of each search.

    Returns:
      "searches" that both labelled; "unclear" ones, without a judge's label; "share" of equal
      labels; Cohen's "kappa" (1960), (p_o - p_e) / (1 - p_e); "table", the counts by
      RULE/JUDGE. Share and kappa are None where they are 0/0.
    """
    counts = Counter(labels)
    kinds = ("useful", "noisy")
    both = {(rule, judge): counts[rule, judge] for rule in kinds for judge in kinds}
    total = sum(both.values())
    share = kappa = None
    if total:
        share = (both["useful", "useful"] + both["noisy", "noisy"]) / total
        chance = sum(
            sum(both[kind, other] for other in kinds) * sum(both[other, kind] for other in kinds)
            for kind in kinds
        )  # p_e times total², an integer
        if chance < total**2:
            kappa = (share - chance / total**2) / (1 - chance / total**2)
    return {
        "searches": total,
        "unclear": len(labels) - total,
        "share": share,
        "kappa": kappa,
        "table": {f"{rule}/{judge}": count for (rule, judge), count in both.items()},
    }
