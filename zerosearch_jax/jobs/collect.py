"""Collects what the simulator is fine-tuned on (paper §3.2), in three stages.

Collect: an agent answers questions with a real search engine. Label: each search is useful or
noisy, by the paper's rule (the episode's answer is right) or by a judge. Extract: (query,
documents) pairs, filtered, balanced, split by question. Each stage adds to a file of the workdir
or writes it anew; the same command goes on where a killed one stopped.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import jax
from ml_collections import ConfigDict

from zerosearch_jax.data.qa import QARow, load_qa
from zerosearch_jax.data.records import Records
from zerosearch_jax.errors import UserError
from zerosearch_jax.files import write_atomically
from zerosearch_jax.generate.sampling import Sampling
from zerosearch_jax.jobs.evaluate import OUTPUT_SETTINGS
from zerosearch_jax.parallel.mesh import make_mesh
from zerosearch_jax.rl.rewards import exact_match, token_f1
from zerosearch_jax.rollout.scheduler import STOP_STRINGS, Limits, Rollouts
from zerosearch_jax.rollout.trajectory import Episode, Trajectory
from zerosearch_jax.simulator.labeling import agreement, check_judge, make_judge
from zerosearch_jax.simulator.pairs import LABELS, Pair, save_pairs
from zerosearch_jax.telemetry.progress import Progress
from zerosearch_jax.training import factory
from zerosearch_jax.training.episode_metrics import episode_metrics


def run(config: ConfigDict, workdir: str) -> None:
    """Writes episodes.jsonl, labels.jsonl, pairs.jsonl, heldout.jsonl and summary.json."""
    check(config)
    workdir = Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    episodes = Records(workdir / "episodes.jsonl")
    collect(config, episodes)
    labels = Records(workdir / "labels.jsonl")
    label(config, episodes, labels)
    last = {record["episode"]: record["id"] for record in labels}  # an episode's are in order
    chosen = {
        record["id"]: chosen_label(
            record, config.extract.label_by, record["id"] == last[record["episode"]]
        )
        for record in labels
    }
    train, heldout, counts = extract(
        episodes,
        chosen,
        topk=config.search.topk,
        last_only=config.extract.last_only,
        balance=config.extract.balance,
        heldout_share=config.extract.heldout_share,
        seed=config.seed,
    )
    save_pairs(workdir / "pairs.jsonl", train)
    save_pairs(workdir / "heldout.jsonl", heldout)
    agreed = None
    if config.judge.kind != "none":
        agreed = agreement([(record["rule"], record["judge"]) for record in labels])
        print_agreement(agreed)
    figures = episode_counts(episodes)
    print_counts(figures, counts)
    summary = {**figures, "stages": counts, "label_by": config.extract.label_by}
    summary["agreement"] = agreed
    write_atomically(workdir / "summary.json", json.dumps(summary, indent=1) + "\n")
    print(f"{len(train)} pairs written to {workdir / 'pairs.jsonl'}, {len(heldout)} held out")


def check(config: ConfigDict) -> None:
    """Refuses, before any work, a config that contradicts itself."""
    for key in ("samples", "batch_questions"):
        if config.collect[key] < 1:
            raise UserError(f"config.collect.{key}={config.collect[key]}: it must be at least 1")
    check_judge(config.judge)
    label_by = config.extract.label_by
    if label_by not in ("rule", "judge", "both"):
        raise UserError(f"config.extract.label_by is {label_by!r}; choose rule, judge or both")
    if label_by != "rule" and config.judge.kind == "none":
        raise UserError(f"config.extract.label_by={label_by} needs a judge: set config.judge.kind")
    if not 0 <= config.extract.heldout_share < 1:
        share = config.extract.heldout_share
        raise UserError(f"config.extract.heldout_share={share}: it must be in [0, 1)")


# Stage 1: collect.


def collect(config: ConfigDict, episodes: Records) -> None:
    """Plays the episodes that `episodes` lacks, a batch of questions at a time.

    A batch that a kill has cut is played again as a whole, so that what is decoded together, and
    with it the last bits of the figures, does not depend on the kill; what is there stays.
    """
    rows = with_unique_ids(load_qa(config.data.source, config.data.split, config.data.limit))
    asked = [
        (f"{row.id}#{sample}", row) for row in rows for sample in range(config.collect.samples)
    ]
    numbers = episode_numbers([id_ for id_, _ in asked])
    size = config.collect.batch_questions * config.collect.samples
    batches = [asked[start : start + size] for start in range(0, len(asked), size)]
    pending = [batch for batch in batches if any(id_ not in episodes.ids for id_, _ in batch)]
    keep_settings(episodes, collect_settings(config))
    if not pending:
        print(f"{len(episodes)} episodes are there already")
        return
    mesh = make_mesh(**config.mesh)
    policy = factory.load_model(config.policy.model, mesh, config.policy.generator.dtype)
    generator = factory.make_generator(policy, config.policy.generator, mesh, STOP_STRINGS)
    engine = factory.make_engine(config.search, config.seed, config.mesh)
    sampling = Sampling(config.collect.temperature)
    rollouts = Rollouts(
        generator,
        engine,
        policy.tokenizer,
        limits=Limits(**config.limits),
        sampling=sampling,
        stop_on_failure=config.rollout.stop_on_failure,
        concurrent_searches=config.rollout.concurrent_searches,
    )
    print("compiling the policy's programs", flush=True)
    generator.warm_up([sampling])
    first = len(batches) - len(pending)
    with closing(Progress(len(batches), first)) as progress:
        for done, batch in enumerate(pending, first + 1):
            played = rollouts.run(
                [Episode(numbers[id_], row.question, row.golden_answers) for id_, row in batch],
                jax.random.key(config.seed),
            )
            episodes.append(
                [
                    episode_record(id_, row, trajectory, engine.name, config.policy.model)
                    for (id_, row), trajectory in zip(batch, played, strict=True)
                ]
            )
            progress.update(done, episode_metrics(played))


def with_unique_ids(rows: Sequence[QARow]) -> list[QARow]:
    """The rows; one whose id an earlier row has is called SOURCE/ID (merged sets number alike).

    Raises:
      UserError: that name is taken, too.
    """
    named: dict[str, QARow] = {}
    for number, row in enumerate(rows, 1):
        id_ = row.id if row.id not in named else f"{row.data_source}/{row.id}"
        if id_ in named:
            raise UserError(
                f"question {number} has the id {row.id!r} and the source {row.data_source!r} of an "
                "earlier one; give each question an id of its own"
            )
        named[id_] = replace(row, id=id_)
    return list(named.values())


def episode_numbers(ids: Iterable[str]) -> dict[str, int]:
    """A number in [0, 2³²) for each id, which its random draws are keyed by: a hash of the id
    alone. The later of two ids with one hash takes the next free number."""
    numbers: dict[str, int] = {}
    taken: set[int] = set()
    for id_ in ids:
        number = keyed_hash(id_) % 2**32
        while number in taken:
            number = (number + 1) % 2**32
        taken.add(number)
        numbers[id_] = number
    return numbers


def keyed_hash(key: str) -> int:
    """A number in [0, 2⁶⁴) that is the same on every machine and in every run."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big")


def episode_record(
    id_: str, row: QARow, trajectory: Trajectory, engine: str, model: str
) -> dict[str, object]:
    """All there is to know about an episode, as JSON."""
    return {
        "id": id_,
        "question_id": row.id,
        "question": row.question,
        "golden_answers": list(row.golden_answers),
        "answer": trajectory.answer,
        "em": exact_match(trajectory.answer, row.golden_answers),
        "f1": token_f1(trajectory.answer, row.golden_answers),
        "finish": trajectory.finish,
        "turns": [
            {"text": turn.text, "kind": turn.action.kind, "content": turn.action.content}
            for turn in trajectory.turns
        ],
        "searches": [
            {
                "turn": request.turn,
                "query": request.query,
                "documents": list(result.documents),
                "failure": result.failure,
            }
            for request, result in trajectory.searches
        ],
        "engine": engine,
        "model": model,
        "tokens": len(trajectory.tokens),
        "policy_tokens": trajectory.policy_tokens,
    }


def collect_settings(config: ConfigDict) -> dict[str, object]:
    """What an episode depends on besides its id."""
    return {
        "seed": config.seed,
        "policy.model": config.policy.model,
        "policy.generator": {key: config.policy.generator[key] for key in OUTPUT_SETTINGS},
        "search": config.search.to_dict(),
        "rollout.stop_on_failure": config.rollout.stop_on_failure,
        "data.source": config.data.source,
        "data.split": config.data.split,
        "limits": config.limits.to_dict(),
        "collect.temperature": config.collect.temperature,
    }


def keep_settings(records: Records, settings: Mapping[str, object]) -> None:
    """Writes down, beside a file of records, what they are made with; refuses to mix two kinds."""
    path = records.path.with_suffix(".settings.json")
    settings = json.loads(json.dumps(settings))  # tuples as the file gives them back
    if len(records) and path.exists():
        for key, before in json.loads(path.read_text(encoding="utf-8")).items():
            if settings[key] != before:
                raise UserError(
                    f"{records.path} was made with config.{key}={before!r}, which is now "
                    f"{settings[key]!r}; give another --workdir or delete that file"
                )
    write_atomically(path, json.dumps(settings, indent=1) + "\n")


# Stage 2: label.


def label(config: ConfigDict, episodes: Records, labels: Records) -> None:
    """Labels the searches that `labels` lacks: the paper's rule, and the judge if there is one."""
    judge = config.judge
    names = collect_settings(config) | {"judge.kind": judge.kind}
    if judge.kind != "none":
        kept = ("model", "url", "response_tokens", "observation_tokens")
        names |= {f"judge.{key}": judge[key] for key in kept}
    keep_settings(labels, names)
    todo = [
        (episode, search)
        for episode in episodes
        for search in episode["searches"]
        if search_id(episode, search) not in labels.ids
    ]
    judged_by = make_judge(judge, config.seed, config.mesh) if todo else None
    for start in range(0, len(todo), judge.batch):
        batch = todo[start : start + judge.batch]
        judged: list[str | None] = [None] * len(batch)
        if judged_by is not None:
            judged = judged_by(
                [
                    (e["question"], e["golden_answers"], search["query"], search["documents"])
                    for e, search in batch
                ]
            )
        labels.append(
            [
                {
                    "id": search_id(episode, search),
                    "episode": episode["id"],
                    "turn": search["turn"],
                    "rule": "useful" if episode["em"] else "noisy",
                    "judge": verdict,
                }
                for (episode, search), verdict in zip(batch, judged, strict=True)
            ]
        )
        if judged_by is not None:
            print(f"judged {start + len(batch)}/{len(todo)} searches", flush=True)


def search_id(episode: Mapping, search: Mapping) -> str:
    """EPISODE/TURN."""
    return f"{episode['id']}/{search['turn']}"


def chosen_label(record: Mapping, label_by: str, last: bool) -> str | None:
    """The label that counts: the rule's, the judge's, or ("both") the one that they agree on.

    A search that is not its episode's `last` brings a bridge of a multi-hop question, which a judge
    of answers cannot value: "both" leaves such searches to the rule.
    """
    if label_by == "both":
        return record["rule"] if not last or record["rule"] == record["judge"] else None
    return record[label_by]


# Stage 3: extract.


def extract(
    episodes: Iterable[Mapping],
    labels: Mapping[str, str | None],
    *,
    topk: int,
    last_only: bool,
    balance: bool,
    heldout_share: float,
    seed: int,
) -> tuple[list[Pair], list[Pair], dict[str, dict[str, int]]]:
    """The pairs to train on, the held-out ones, and the counts by label after each filter.

    Args:
      episodes: records of the first stage.
      labels: "useful", "noisy" or None by `search_id`.
      topk: searches with fewer documents are left out, as are failed ones, those of episodes that
        ran out of room, and repetitions of (question, query, label).
      last_only: of each episode only the last search is taken. The rule calls every search of a
        right episode useful, also those that found nothing; this is stricter.
      balance: cut the more frequent label of each part to the size of the other, by a hash.
      heldout_share: of the (first) gold answers, chosen by a hash; all pairs of one go together,
        so that a question that asks the same in other words is not trained on either.
    """
    filters = {
        "searches": lambda pair, episode, search: True,
        "labelled": lambda pair, episode, search: pair.label in LABELS,
        "not failed": lambda pair, episode, search: not search["failure"],
        f"with {topk} documents": lambda pair, episode, search: len(pair.documents) >= topk,
        "not cut by length": lambda pair, episode, search: episode["finish"] != "length",
    }
    if last_only:
        filters["last of their episode"] = lambda pair, episode, search: pair.last
    counts = {}
    found = [(_pair(e, s, labels), e, s) for e in episodes for s in e["searches"]]
    for stage, keep in filters.items():
        found = [one for one in found if keep(*one)]
        counts[stage] = _by_label([pair for pair, *_ in found])
    different: dict[tuple[str, str, str], Pair] = {}
    for pair, *_ in found:
        different.setdefault((pair.question, pair.query, pair.label), pair)
    counts["without repetitions"] = _by_label(different.values())
    parts: dict[str, list[Pair]] = {"train": [], "held out": []}
    for pair in different.values():
        heldout = keyed_hash(f"{seed}/heldout/{pair.golden_answers[0]}") < heldout_share * 2**64
        parts["held out" if heldout else "train"].append(pair)
    if balance:
        parts = {name: balanced(pairs, seed) for name, pairs in parts.items()}
    counts |= {name: _by_label(pairs) for name, pairs in parts.items()}
    return parts["train"], parts["held out"], counts


def _by_label(pairs: Collection[Pair]) -> dict[str, int]:
    counts = Counter(pair.label for pair in pairs)
    return {name: counts[name] for name in LABELS} | {"all": len(pairs)}


def _pair(episode: Mapping, search: Mapping, labels: Mapping[str, str | None]) -> Pair:
    id_ = search_id(episode, search)
    return Pair(
        id=id_,
        query=search["query"],
        documents=tuple(search["documents"]),
        question=episode["question"],
        golden_answers=tuple(episode["golden_answers"]),
        label=labels[id_] or "",
        last=search is episode["searches"][-1],
    )


def balanced(pairs: Sequence[Pair], seed: int) -> list[Pair]:
    """As many pairs of either label, in the given order; which ones stay is a hash of their ids."""
    size = min(sum(pair.label == name for pair in pairs) for name in LABELS)
    kept: set[str] = set()
    for name in LABELS:
        ids = [pair.id for pair in pairs if pair.label == name]
        kept |= set(sorted(ids, key=lambda id_: keyed_hash(f"{seed}/balance/{id_}"))[:size])
    return [pair for pair in pairs if pair.id in kept]


# What is shown.


def episode_counts(episodes: Iterable[Mapping]) -> dict[str, object]:
    """Number of episodes and searches, mean scores, and how the episodes ended."""
    rows = [(e["em"], e["f1"], len(e["searches"]), e["finish"]) for e in episodes]
    return {
        "episodes": len(rows),
        "em": sum(row[0] for row in rows) / len(rows),
        "f1": sum(row[1] for row in rows) / len(rows),
        "searches": sum(row[2] for row in rows),
        "finish": dict(sorted(Counter(row[3] for row in rows).items())),
    }


def print_counts(figures: Mapping, counts: Mapping[str, Mapping[str, int]]) -> None:
    """Prints what was collected and what each filter left."""
    print(
        f"\n{figures['episodes']} episodes, EM {figures['em']:.3f}, F1 {figures['f1']:.3f}; ended "
        + ", ".join(f"{count} by {name}" for name, count in figures["finish"].items())
    )
    columns = (*LABELS, "all")
    print(f"{'':24}" + "".join(f"{column:>8}" for column in columns))
    for stage, row in counts.items():
        print(f"{stage:24}" + "".join(f"{row[column]:8d}" for column in columns))


def print_agreement(agreed: Mapping) -> None:
    """Prints `judge.agreement`'s figures."""
    figures = [
        f"{name} {'–' if agreed[name] is None else format(agreed[name], '.3f')}"
        for name in ("share", "kappa")
    ]
    print(f"\nrule and judge on {agreed['searches']} searches: {', '.join(figures)}")
    for pair, count in agreed["table"].items():
        print(f"{pair:24}{count:8d}")
    print(f"{'judge unclear':24}{agreed['unclear']:8d}")
