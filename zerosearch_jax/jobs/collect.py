"""Collects the simulator's fine-tuning pairs from a real search engine (paper §3.2).

The job has three stages:

1. Collect: an agent answers questions with the engine; `episodes.jsonl` records every episode.
2. Label: each search is useful or noisy by the paper's rule (the episode's answer is right) and,
   if configured, by a labeler; `labels.jsonl` records both labels.
3. Extract: labeled searches are filtered, balanced and split by gold answer into `pairs.jsonl`
   and `heldout.jsonl`.

The first two files are appended to and the others are rewritten. A killed command resumes where it
stopped when it is repeated.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import jax
from ml_collections import ConfigDict
from tabulate import tabulate

from zerosearch_jax import config_flags
from zerosearch_jax.data.qa import QARow, load_qa
from zerosearch_jax.data.records import Records
from zerosearch_jax.errors import UserError
from zerosearch_jax.files import FORMAT, check_format, read_json, write_json
from zerosearch_jax.generate.sampling import Sampling
from zerosearch_jax.jobs.evaluate import OUTPUT_SETTINGS
from zerosearch_jax.parallel.mesh import make_mesh
from zerosearch_jax.rl.rewards import exact_match, token_f1
from zerosearch_jax.rollout.scheduler import STOP_STRINGS, Rollouts
from zerosearch_jax.rollout.trajectory import Episode, Trajectory
from zerosearch_jax.simulator.labeling import (
    agreement,
    check_labeler,
    chosen_labels,
    make_labeler,
)
from zerosearch_jax.simulator.pairs import (
    LABELS,
    extract_pairs,
    save_pairs,
    search_id,
    stable_hash,
)
from zerosearch_jax.telemetry.progress import Progress
from zerosearch_jax.training import factory
from zerosearch_jax.training.episode_metrics import episode_metrics
from zerosearch_jax.training.fingerprints import engine_sha256, model_sha256
from zerosearch_jax.training.inputs import check_job
from zerosearch_jax.training.job_configs import CollectConfig
from zerosearch_jax.training.no_signal import Notices, failed_searches, unanswered
from zerosearch_jax.training.probe import probe
from zerosearch_jax.training.prompt_limits import fitting, prompt_limits
from zerosearch_jax.training.step_rollouts import limits_of

EPISODE = {
    **dict.fromkeys(("question", "finish"), str),
    "golden_answers": [str, ...],
    **dict.fromkeys(("em", "f1"), float),
    "searches": [
        {
            "turn": int,
            "documents": [str],
            **dict.fromkeys(("query", "failure", "failure_kind", "address"), str),
        }
    ],
}
"""The part of a record in `episodes.jsonl` that the later stages read; see `files` for shapes."""
LABEL = {"episode": str, "rule": set(LABELS), "labeler": {*LABELS, None}}
"""The part of a record in `labels.jsonl` that is read."""


def run(config: ConfigDict, workdir: str) -> None:
    """Writes episodes, labels, pairs, held-out pairs and `summary.json` to `workdir`."""
    config = config_flags.typed(CollectConfig, config)
    workdir = Path(workdir)
    check_job(config)
    factory.check_model(config.policy.model, STOP_STRINGS)
    factory.check_simulator_model(config.search)
    check_labeler(config.labeling)
    limits = prompt_limits(config.policy, config.limits, [config.search])
    loaded = load_qa(config.data.source, config.data.split, config.data.limit)
    rows = with_unique_ids(fitting(loaded, limits, config.data.overlong))
    workdir.mkdir(parents=True, exist_ok=True)
    episodes = Records(workdir / "episodes.jsonl", EPISODE)
    labels = Records(workdir / "labels.jsonl", LABEL)
    if len(labels) and not len(episodes):
        raise UserError(
            f"{labels.path} labels the searches of episodes that are gone; delete "
            f"{labels.path.name}, too"
        )
    settings = collect_settings(config)
    labels_settings = settings | label_settings(config)
    check_settings(episodes, settings)
    check_settings(labels, labels_settings)  # before the first stage, which takes long
    collect_episodes(config, rows, episodes, settings)
    label_searches(config, episodes, labels, labels_settings)
    train, heldout, counts = extract_pairs(
        episodes,
        chosen_labels(labels, config.extract.label_by),
        topk=config.search.topk,
        last_only=config.extract.last_only,
        balance=config.extract.balance,
        heldout_share=config.extract.heldout_share,
        seed=config.seed,
    )
    save_pairs(workdir / "pairs.jsonl", train)
    save_pairs(workdir / "heldout.jsonl", heldout)
    agreed = None
    if config.labeling.kind != "none":
        agreed = agreement([(record["rule"], record["labeler"]) for record in labels])
        print_agreement(agreed)
    totals = episode_totals(episodes)
    print_counts(totals, counts)
    chosen = {"stages": counts, "label_by": config.extract.label_by, "agreement": agreed}
    write_json(workdir / "summary.json", totals | chosen)
    print(f"{len(train)} pairs written to {workdir / 'pairs.jsonl'}, {len(heldout)} held out")


# Stage 1: collect.


def collect_episodes(
    config: CollectConfig, rows: Sequence[QARow], episodes: Records, settings: Mapping[str, object]
) -> None:
    """Runs the episodes of `rows` that `episodes` lacks, one batch of questions at a time.

    A batch cut by a kill is rerun as a whole, and records that exist are kept. Batch composition,
    and with it rounding, therefore does not depend on the kill.
    """
    planned = [
        (f"{row.id}#{sample}", row) for row in rows for sample in range(config.collect.samples)
    ]
    numbers = episode_numbers([id_ for id_, _ in planned])
    size = config.collect.batch_questions * config.collect.samples
    batches = [planned[start : start + size] for start in range(0, len(planned), size)]
    missing = [batch for batch in batches if any(id_ not in episodes.ids for id_, _ in batch)]
    check_questions(episodes, dict(planned))
    write_json(settings_path(episodes), settings)
    if not missing:
        print(f"all {len(episodes)} episodes are collected already")
        return
    rollouts, notices = make_rollouts(config), Notices()
    first = len(batches) - len(missing)
    with closing(Progress(len(batches), first)) as progress:
        for done, batch in enumerate(missing, first + 1):
            trajectories = rollouts.run(
                [Episode(numbers[id_], row.question, row.golden_answers) for id_, row in batch],
                jax.random.key(config.seed),
            )
            episodes.append(
                [
                    episode_record(id_, row, trajectory, rollouts.engine.name, config.policy.model)
                    for (id_, row), trajectory in zip(batch, trajectories, strict=True)
                ]
            )
            metrics = episode_metrics(trajectories)
            progress.update(done, metrics)
            notices.show(f"batch {done}", failed_searches(trajectories))
            notices.show(f"batch {done}", unanswered(metrics, "limits"))


def check_questions(episodes: Records, planned: Mapping[str, QARow]) -> None:
    """Raises UserError if an episode's question or gold answers have changed in the source."""
    for episode in episodes:
        row = planned.get(episode["id"])
        recorded = episode["question"], tuple(episode["golden_answers"])
        if row is not None and recorded != (row.question, row.golden_answers):
            raise UserError(
                f"{episodes.path}: the question of episode {episode['id']} has changed in "
                "config.data.source; give another --workdir or delete that file"
            )


def make_rollouts(config: CollectConfig) -> Rollouts:
    """Builds the agent's rollouts, with its programs compiled; first tries the engine."""
    probe(config.search, "search", config.seed, config.mesh)
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    policy = factory.load_model(config.policy.model, mesh, config.policy.generator.dtype)
    generator = factory.make_generator(policy, config.policy.generator, mesh, STOP_STRINGS)
    engine = factory.make_engine(config.search, config.seed, config.mesh)
    sampling = Sampling(config.collect.temperature)
    rollouts = Rollouts(
        generator,
        engine,
        policy.tokenizer,
        limits=limits_of(config.limits),
        sampling=sampling,
        stop_on_failure=config.rollout.stop_on_failure,
        concurrent_searches=config.rollout.concurrent_searches,
    )
    print("compiling the policy's programs", flush=True)
    generator.warm_up([sampling])
    return rollouts


def with_unique_ids(rows: Sequence[QARow]) -> list[QARow]:
    """Returns the rows with unique ids. A repeated id becomes SOURCE/ID, as in merged sets.

    Raises:
      UserError: SOURCE/ID is repeated, too.
    """
    named: dict[str, QARow] = {}
    for number, row in enumerate(rows, 1):
        id_ = row.id if row.id not in named else f"{row.data_source}/{row.id}"
        if id_ in named:
            raise UserError(
                f"question {number} has the id {row.id!r} and the source {row.data_source!r} of "
                "an earlier question; give each question a unique id"
            )
        named[id_] = replace(row, id=id_)
    return list(named.values())


def episode_numbers(ids: Iterable[str]) -> dict[str, int]:
    """Returns an episode number in [0, 2³²) for each id; it keys the episode's random draws.

    The number is a hash of the id. If two ids collide, the later one takes the next free number.
    """
    id_of: dict[int, str] = {}
    for id_ in ids:
        number = stable_hash(id_) % 2**32
        while number in id_of:
            number = (number + 1) % 2**32
        id_of[number] = id_
    return {id_: number for number, id_ in id_of.items()}


def episode_record(
    id_: str, row: QARow, trajectory: Trajectory, engine: str, model: str
) -> dict[str, object]:
    """Returns the complete JSON record of an episode: question, answer, turns and searches."""
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
                "failure_kind": result.failure_kind,
                "address": result.address,
            }
            for request, result in trajectory.searches
        ],
        "engine": engine,
        "model": model,
        "tokens": len(trajectory.tokens),
        "policy_tokens": trajectory.policy_tokens,
    }


def collect_settings(config: CollectConfig) -> dict[str, object]:
    """Returns the settings that, with its id, determine an episode, in the form of parsed JSON."""
    generator = config.policy.generator
    settings = {
        "format": FORMAT,
        "seed": config.seed,
        "policy.model": config.policy.model,
        "policy.generator": {key: getattr(generator, key) for key in OUTPUT_SETTINGS},
        "search": config_flags.plain(config.search),
        "rollout.stop_on_failure": config.rollout.stop_on_failure,
        "data.source": config.data.source,
        "data.split": config.data.split,
        "limits": config_flags.plain(config.limits),
        "collect.temperature": config.collect.temperature,
        "policy.model (content)": model_sha256(config.policy.model),
        "search (content)": engine_sha256(config.search),
    }
    return json.loads(json.dumps(settings))


def settings_path(records: Records) -> Path:
    """Returns the file next to `records` that holds the settings they were made with."""
    return records.path.with_suffix(".settings.json")


def check_settings(records: Records, settings: Mapping[str, object]) -> None:
    """Compares `settings` with those that `records` were made with.

    Raises:
      UserError: the records that exist were made with other settings or by an older version, or
        the file of their settings is damaged.
    """
    path = settings_path(records)
    if len(records) and path.exists():
        kept = read_json(path, dict, "restore it from a copy, or give another --workdir")
        check_format(kept, path.parent)
        for key, before in kept.items():
            if settings.get(key) != before:
                raise UserError(
                    f"{records.path} was made with config.{key}={before!r}, which is now "
                    f"{settings.get(key)!r}; give another --workdir or delete that file"
                )


# Stage 2: label.


def label_settings(config: CollectConfig) -> dict[str, object]:
    """Returns the settings that, with `collect_settings`, determine a label."""
    labeling = config.labeling
    settings: dict[str, object] = {"labeling.kind": labeling.kind}
    if labeling.kind != "none":
        keys = ("model", "url", "response_tokens", "observation_tokens")
        settings |= {f"labeling.{key}": getattr(labeling, key) for key in keys}
    if labeling.kind in ("reader", "local"):
        settings["labeling.model (content)"] = model_sha256(labeling.model)
    return settings


def label_searches(
    config: CollectConfig, episodes: Records, labels: Records, settings: Mapping[str, object]
) -> None:
    """Labels the searches that `labels` lacks, by the paper's rule and by the labeler if any."""
    labeling = config.labeling
    write_json(settings_path(labels), settings)
    missing = [
        (episode, search)
        for episode in episodes
        for search in episode["searches"]
        if search_id(episode, search) not in labels.ids
    ]
    labeler = make_labeler(labeling, config.seed, config.mesh) if missing else None
    for start in range(0, len(missing), labeling.batch):
        batch = missing[start : start + labeling.batch]
        labeler_labels: list[str | None] = [None] * len(batch)
        if labeler is not None:
            labeler_labels = labeler(
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
                    "labeler": label,
                }
                for (episode, search), label in zip(batch, labeler_labels, strict=True)
            ]
        )
        if labeler is not None:
            print(f"labeled {start + len(batch)}/{len(missing)} searches", flush=True)


# Summary.


def episode_totals(episodes: Iterable[Mapping]) -> dict[str, object]:
    """Returns the numbers of episodes and searches, mean scores, and counts by finish.

    "failed_searches" has the number of failed searches by kind, and "failed_addresses" the servers
    that failed.
    """
    rows, failed = [], []
    for e in episodes:
        rows.append((e["em"], e["f1"], len(e["searches"]), e["finish"]))
        failed += [search for search in e["searches"] if search["failure"]]
    return {
        "episodes": len(rows),
        "em": sum(row[0] for row in rows) / len(rows),
        "f1": sum(row[1] for row in rows) / len(rows),
        "searches": sum(row[2] for row in rows),
        "finish": dict(sorted(Counter(row[3] for row in rows).items())),
        "failed_searches": Counter(search["failure_kind"] for search in failed),
        "failed_addresses": sorted({search["address"] for search in failed} - {""}),
    }


def print_counts(totals: Mapping, counts: Mapping[str, Mapping[str, int]]) -> None:
    """Prints `episode_totals` and the counts after each filter of `extract_pairs`."""
    print(
        f"\n{totals['episodes']} episodes, EM {totals['em']:.3f}, F1 {totals['f1']:.3f}; ended "
        + ", ".join(f"{count} by {name}" for name, count in totals["finish"].items())
    )
    if failed := totals["failed_searches"]:
        kinds = ", ".join(f"{count} by {kind}" for kind, count in failed.items())
        asked = f" (asked {', '.join(totals['failed_addresses']) or 'no server'})"
        print(f"failed searches: {kinds}{asked}")
    columns = (*LABELS, "all")
    rows = [[stage, *(row[column] for column in columns)] for stage, row in counts.items()]
    print(tabulate(rows, ["", *columns], tablefmt="plain"))


def print_agreement(agreed: Mapping) -> None:
    """Prints the result of `labeling.agreement`."""
    statistics = [
        f"{name} {'–' if agreed[name] is None else format(agreed[name], '.3f')}"
        for name in ("share", "kappa")
    ]
    print(f"\nrule and labeler on {agreed['searches']} searches: {', '.join(statistics)}")
    rows = [*agreed["table"].items(), ("labeler unclear", agreed["unclear"])]
    print(tabulate(rows, tablefmt="plain"))
