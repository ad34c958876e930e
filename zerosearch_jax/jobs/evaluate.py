"""Evaluation: any methods × engines × question sets, greedily; a table with intervals.

As a job it evaluates any Hugging Face directory; the `rl` job calls `evaluate_policy` for its own.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from ml_collections import ConfigDict

from zerosearch_jax.data.qa import QARow, load_qa
from zerosearch_jax.errors import UserError
from zerosearch_jax.evaluation.baselines import WITHOUT_ENGINE, check_method, play, refiner
from zerosearch_jax.files import write_atomically
from zerosearch_jax.generate.generator import Generator
from zerosearch_jax.generate.sampling import GREEDY
from zerosearch_jax.parallel.mesh import make_mesh
from zerosearch_jax.rollout.scheduler import STOP_STRINGS, Limits
from zerosearch_jax.rollout.trajectory import Trajectory
from zerosearch_jax.search.engine import SearchEngine
from zerosearch_jax.training import factory
from zerosearch_jax.training.episode_metrics import (
    answer_scores,
    bootstrap_interval,
    episode_metrics,
    wilson_interval,
)

FIGURES_DEPEND_ON = ("dtype", "int8_weights", "max_tokens")  # of a generator


def run(config: ConfigDict, workdir: str) -> None:
    """Evaluates `config.policy.model`; writes `workdir/evaluation.json`, then prints a table and
    writes it to `workdir/evaluation.txt`, which is there only when all of it is.

    The former is a list of rows, written anew after each one: a row's cell (see `cells`) with its
    `summary`. A cell that has a row there is not played again, so the command can be stopped and
    given again; for a model that has changed in its place, remove the file first.
    """
    path = Path(workdir) / "evaluation.json"
    text_path = path.with_suffix(".txt")
    wanted, rows = cells(config), read_rows(path)
    sets = {name: load_set(name, config.data.limit) for name in config.data.sets}
    missing = [cell for cell in wanted if not _rows_of(cell, rows)]
    path.parent.mkdir(parents=True, exist_ok=True)
    text_path.unlink(missing_ok=True)
    for cell, trajectories in played(config, missing, sets):
        each = answer_scores(trajectories, "em")  # of the set's questions, in order
        rows.append(cell | summary(trajectories) | {"em_of_each": each})
        write_atomically(path, json.dumps(rows, indent=1) + "\n")
    columns = ("method", "engine", "set")
    widths = [max(len(cell[column]) for cell in wanted) for column in columns]
    table = {
        "  ".join(f"{cell[c]:{width}}" for c, width in zip(columns, widths, strict=True)): row
        for cell in wanted
        for row in _rows_of(cell, rows)
    }
    text = text_table(table, config.policy.model)
    write_atomically(text_path, text)
    print(f"\n{text}written to {text_path} and {path}")


def cells(config: ConfigDict) -> list[dict]:
    """What identifies each row that is asked for, as JSON gives it back.

    Its keys: model, method, engine ("none" for the methods that need none), set, limit (of its
    questions, or None) and settings, everything else in the config that changes the figures.

    Raises:
      UserError: unknown method, or nothing is asked for.
    """
    wanted = []
    for method in config.methods:
        check_method(method)
        for engine in ("none",) if method in WITHOUT_ENGINE else config.engines:
            settings = dict(seed=config.seed, limits=config.limits.to_dict())
            settings |= {key: config.policy.generator[key] for key in FIGURES_DEPEND_ON}
            if engine != "none":
                settings["engine"] = config.engines[engine].to_dict()
            if method == "search_o1":
                settings["refine"] = config.refine.to_dict()
            wanted += [
                dict(
                    model=config.policy.model,
                    method=method,
                    engine=engine,
                    set=name,
                    limit=config.data.limit,
                    settings=settings,
                )
                for name in config.data.sets
            ]
    if not wanted:
        raise UserError(
            "nothing to evaluate: name a method in config.methods, a set in config.data.sets and, "
            "unless the method needs none, an engine in config.engines"
        )
    return json.loads(json.dumps(wanted))


def read_rows(path: Path) -> list[dict]:
    """The rows of an evaluation's file, none if there is no file."""
    if not path.exists():
        return []
    rows = json.loads(path.read_text())
    if not isinstance(rows, list):
        raise UserError(f"{path} holds no list of rows; remove it or give another --workdir")
    return rows


def load_set(name: str, limit: int | None) -> list[QARow]:
    """A question set: "source/split" ("world/test"), or the path of a file."""
    if Path(name).suffix:
        return load_qa(name, Path(name).stem, limit)
    source, _, split = name.rpartition("/")
    if not source:
        raise UserError(
            f"config.data.sets: {name!r} is no set; give SOURCE/SPLIT, such as world/test, "
            "or a file"
        )
    return load_qa(source, split, limit)


def played(
    config: ConfigDict, wanted: Sequence[dict], sets: dict[str, list[QARow]]
) -> Iterator[tuple[dict, list[Trajectory]]]:
    """Plays the cells one after the other; builds only what they need."""
    if not wanted:
        return
    mesh = make_mesh(**config.mesh)
    model = factory.load_model(config.policy.model, mesh, "float32")
    generator = factory.make_generator(model, config.policy.generator, mesh, STOP_STRINGS)
    engines: dict[str, SearchEngine | None] = {"none": None}
    for name in {cell["engine"] for cell in wanted} - {"none"}:
        engines[name] = factory.make_engine(config.engines[name], config.seed, config.mesh)
    generate = None
    if any(cell["method"] == "search_o1" for cell in wanted):
        generate = refiner(
            model,
            config.policy.generator,
            mesh,
            max_new_tokens=config.refine.max_new_tokens,
        )
    for cell in wanted:
        yield (
            cell,
            evaluate_policy(
                generator,
                engines[cell["engine"]],
                model.tokenizer,
                sets[cell["set"]],
                limits=Limits(**config.limits),
                method=cell["method"],
                generate=generate,
            ),
        )


def evaluate_policy(
    generator: Generator,
    engine: SearchEngine | None,
    tokenizer,
    rows: Sequence[QARow],
    *,
    limits: Limits,
    method: str = "search",
    generate: Callable[[list[str], list[tuple[int, int]]], list[str]] | None = None,
) -> list[Trajectory]:
    """One greedy episode a row, in order; see `methods.play`."""
    return play(
        method,
        generator,
        engine,
        tokenizer,
        rows,
        limits=limits,
        sampling=GREEDY,
        generate=generate,
    )


def summary(trajectories: Sequence[Trajectory]) -> dict[str, float | list[float]]:
    """EM and F1 with their 95% intervals, number of questions, searches per episode, and the share
    of the searches that failed: the policy was told so, and the figures are of that."""
    matches = answer_scores(trajectories, "em")
    figures = episode_metrics(trajectories)
    return {
        "em": figures["em"],
        "em_interval": list(wilson_interval(sum(matches), len(matches))),
        "f1": figures["f1"],
        "f1_interval": list(bootstrap_interval(answer_scores(trajectories, "f1"))),
        "questions": len(matches),
        "searches_per_episode": figures["searches_per_episode"],
        "failed_search_ratio": figures["failed_search_ratio"],
    }


def text_table(table: dict[str, dict], title: str) -> str:
    """`summary`'s figures below the title and the columns' names, one line an entry."""
    width = max(len(name) for name in table)
    heading = f"{'':{width}}     EM  [95% interval]     F1  [95% interval]  searches  questions"
    lines = [title, heading]
    for name, row in table.items():
        (em_low, em_high), (f1_low, f1_high) = row["em_interval"], row["f1_interval"]
        lines.append(
            f"{name:{width}}  {row['em']:.3f}  [{em_low:.3f}, {em_high:.3f}]"
            f"  {row['f1']:.3f}  [{f1_low:.3f}, {f1_high:.3f}]"
            f"  {row['searches_per_episode']:8.2f}  {row['questions']:9d}"
        )
        if row["failed_search_ratio"]:
            lines.append(f"{'':{width}}  {row['failed_search_ratio']:.1%} of its searches failed")
    return "\n".join(lines) + "\n"


def _rows_of(cell: dict, rows: Sequence[dict]) -> list[dict]:
    return [row for row in rows if cell.items() <= row.items()]
