"""Labels of searches, "useful" or "noisy", and their agreement with the paper's rule.

The paper's rule calls every search of a correctly answered episode useful and every other search
noisy. A labeler is a second opinion, one of two kinds:

- a language model, which says whether the documents support the gold answer;
- a fixed reader, which answers the question from the documents. They are useful if its answer is
  right, and noisy if they do not even mention a gold answer.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import jax

from zerosearch_jax.errors import UserError
from zerosearch_jax.generate.sampling import GREEDY
from zerosearch_jax.generate.texts import TextGenerator
from zerosearch_jax.parallel.mesh import make_mesh
from zerosearch_jax.rl.rewards import exact_match
from zerosearch_jax.rollout.scheduler import STOP_STRINGS
from zerosearch_jax.search.chat import ChatClient
from zerosearch_jax.search.http_client import SearchFailed, TooLong
from zerosearch_jax.simulator.pairs import LABELS
from zerosearch_jax.simulator.reader import Reader, make_reader
from zerosearch_jax.text.matching import mentions
from zerosearch_jax.text.prompts import labeling_prompt, parse_verdict
from zerosearch_jax.training import factory
from zerosearch_jax.training.job_configs import LabelingConfig
from zerosearch_jax.training.sections import MeshConfig

# A search to label: question, gold answers, query, documents.
Search = tuple[str, Sequence[str], str, Sequence[str]]
Labeler = Callable[[Sequence[Search]], list[str | None]]
Complete = Callable[[Sequence[str], Sequence[tuple[int, int]]], list[str | SearchFailed]]


def check_labeler(config: LabelingConfig) -> None:
    """Raises UserError if the labeler runs here and its model directory cannot be used."""
    if config.kind == "reader":
        factory.check_model(config.model, STOP_STRINGS)
    elif config.kind == "local":
        factory.check_model(config.model, ())


def make_labeler(config: LabelingConfig, seed: int, mesh_config: MeshConfig) -> Labeler | None:
    """Builds the labeler of a `labeling` section; None for kind "none".

    A labeler returns "useful", "noisy" or None (undecided) for each search.
    """
    if config.kind == "none":
        return None
    if config.kind == "reader":
        return partial(reader_labels, make_reader(config, mesh_config))
    if config.kind == "server":
        return partial(model_labels, _chat_client(config, seed))
    mesh = make_mesh(mesh_config.data, mesh_config.fsdp, mesh_config.tensor)
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
    return partial(model_labels, complete)


def reader_labels(reader: Reader, searches: Sequence[Search]) -> list[str | None]:
    """Labels a search "useful" if the reader answers correctly from the documents.

    Otherwise the label is "noisy" if no document mentions a gold answer, else None: the error may
    be the reader's.
    """
    questions, golden_answers, queries, documents = zip(*searches, strict=True)
    answers = reader(questions, queries, documents)
    labels: list[str | None] = []
    for answer, golden, found in zip(answers, golden_answers, documents, strict=True):
        if exact_match(answer, golden):
            labels.append("useful")
        else:
            mentioned = any(mentions(document, alias) for document in found for alias in golden)
            labels.append(None if mentioned else "noisy")
    return labels


def model_labels(complete: Complete, searches: Sequence[Search]) -> list[str | None]:
    """Returns the language model's label of each search.

    None if it says neither yes nor no, or if the documents are too long for it.

    Raises:
      UserError: the server failed after its retries.
    """
    texts = [labeling_prompt(question, golden, found) for question, golden, _, found in searches]
    # Decoding is greedy, so the keys only have to differ.
    replies = complete(texts, [(i, 0) for i in range(len(texts))])
    for reply in replies:
        if isinstance(reply, SearchFailed) and not isinstance(reply, TooLong):
            raise UserError(
                f"the labeler's server (config.labeling.url) failed ({reply}; asked "
                f"{reply.address}); fix it and repeat the command, which keeps all earlier labels"
            )
    labels = {True: "useful", False: "noisy", None: None}
    return [labels[parse_verdict(r) if isinstance(r, str) else None] for r in replies]


def chosen_labels(records: Iterable[Mapping], label_by: str) -> dict[str, str | None]:
    """Returns the label that counts for each search, by search id.

    Args:
      records: of labels.jsonl; the searches of an episode are in order.
      label_by: "rule", "labeler" or "both", see `choose_label`.
    """
    records = list(records)
    last = {record["episode"]: record["id"] for record in records}
    return {
        record["id"]: choose_label(record, label_by, record["id"] == last[record["episode"]])
        for record in records
    }


def choose_label(record: Mapping, label_by: str, last: bool) -> str | None:
    """Returns the rule's label, the labeler's, or ("both") the one they agree on, else None.

    With "both", a search that is not the `last` of its episode gets the rule's label. It finds a
    bridge of a multi-hop question, which a labeler that knows only the final answer cannot value.
    """
    if label_by == "both":
        return record["rule"] if not last or record["rule"] == record["labeler"] else None
    return record[label_by]


def agreement(labels: Sequence[tuple[str, str | None]]) -> dict:
    """Measures how far rule and labeler agree on the searches that both have labeled.

    Args:
      labels: (rule, labeler) of each search.

    Returns:
      searches: number of searches with both labels.
      unclear: number of searches without a labeler's label.
      share: share of equal labels; None without searches.
      kappa: Cohen's kappa (1960), (p_o - p_e) / (1 - p_e); None where it is 0/0.
      table: counts by "RULE/LABELER".
    """
    counts = Counter(labels)
    both = {(rule, labeler): counts[rule, labeler] for rule in LABELS for labeler in LABELS}
    total = sum(both.values())
    share = kappa = None
    if total:
        share = (both["useful", "useful"] + both["noisy", "noisy"]) / total
        chance = sum(
            sum(both[label, other] for other in LABELS)
            * sum(both[other, label] for other in LABELS)
            for label in LABELS
        )  # p_e times total², an integer
        if chance < total**2:
            kappa = (share - chance / total**2) / (1 - chance / total**2)
    return {
        "searches": total,
        "unclear": len(labels) - total,
        "share": share,
        "kappa": kappa,
        "table": {f"{rule}/{labeler}": count for (rule, labeler), count in both.items()},
    }


def _chat_client(config: LabelingConfig, seed: int) -> ChatClient:
    server = config.server
    return ChatClient(
        factory.json_client(server, config.url, server.key_variable),
        model=config.model,
        temperature=0.0,
        top_p=1.0,
        max_tokens=config.response_tokens,
        workers=server.workers,
        seed=seed,
    )
