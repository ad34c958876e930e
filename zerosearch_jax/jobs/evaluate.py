"""Evaluates a model greedily: methods × engines × question sets, with 95% intervals.

The job evaluates any Hugging Face directory. The `rl` job evaluates its own policy with
`evaluation.baselines.run_method`.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from ml_collections import ConfigDict

from zerosearch_jax import config_flags
from zerosearch_jax.data.qa import QARow, load_qa
from zerosearch_jax.errors import UserError
from zerosearch_jax.evaluation.baselines import (
    refiner,
    run_method,
)
from zerosearch_jax.evaluation.summary import summary, text_table
from zerosearch_jax.files import FORMAT, check_format, write_atomically, write_json
from zerosearch_jax.parallel.mesh import make_mesh
from zerosearch_jax.rollout.scheduler import STOP_STRINGS
from zerosearch_jax.rollout.trajectory import Trajectory
from zerosearch_jax.training import factory
from zerosearch_jax.training.episode_metrics import answer_scores
from zerosearch_jax.training.inputs import check_job
from zerosearch_jax.training.job_configs import WITHOUT_ENGINE, EvaluateConfig
from zerosearch_jax.training.step_rollouts import limits_of

# Generator settings that change sampled tokens; the others change only speed and memory.
OUTPUT_SETTINGS = ("dtype", "int8_weights", "max_tokens")


def run(config: ConfigDict, workdir: str) -> None:
    """Evaluates `config.policy.model`; writes `evaluation.json` and `evaluation.txt` to `workdir`.

    `evaluation.json` is a list of rows, rewritten after each row: an eval case (see `eval_cases`)
    with its `summary`. A case that has a row there is skipped, so an interrupted command resumes.
    Remove the file if the model's weights changed in place. `evaluation.txt` holds the printed
    table and exists only once all rows do.
    """
    config = config_flags.typed(EvaluateConfig, config)
    check_job(config)
    path = Path(workdir) / "evaluation.json"
    text_path = path.with_suffix(".txt")
    cases, rows = eval_cases(config), read_rows(path)
    question_sets = {name: load_set(name, config.data.limit) for name in config.data.sets}
    missing = [case for case in cases if not _rows_of(case, rows)]
    path.parent.mkdir(parents=True, exist_ok=True)
    text_path.unlink(missing_ok=True)
    for case, trajectories in evaluate_cases(config, missing, question_sets):
        exact_matches = answer_scores(trajectories, "em")  # one per question, in the set's order
        rows.append(case | summary(trajectories) | {"em_of_each": exact_matches})
        write_json(path, rows)
    columns = ("method", "engine", "set")
    widths = {column: max(len(case[column]) for case in cases) for column in columns}
    summaries = {
        "  ".join(f"{case[column]:{width}}" for column, width in widths.items()): row
        for case in cases
        for row in _rows_of(case, rows)
    }
    text = text_table(summaries, config.policy.model)
    write_atomically(text_path, text)
    print(f"\n{text}written to {text_path} and {path}")


def eval_cases(config: EvaluateConfig) -> list[dict]:
    """Returns the identity of each requested row, as it reads back from JSON.

    Keys: model, method, engine ("none" if the method needs none), set, limit (number of questions
    or None) and settings: everything else in the config that changes the results.

    Raises:
      UserError: an empty selection.
    """
    cases = []
    for method in config.methods:
        for engine in ("none",) if method in WITHOUT_ENGINE else config.engines:
            settings = {
                "format": FORMAT,
                "seed": config.seed,
                "limits": config_flags.plain(config.limits),
                **{key: getattr(config.policy.generator, key) for key in OUTPUT_SETTINGS},
            }
            if engine != "none":
                settings["engine"] = config_flags.plain(config.engines[engine])
            if method == "search_o1":
                settings["refine"] = config_flags.plain(config.refine)
            cases += [
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
    if not cases:
        raise UserError(
            "nothing to evaluate: give a method in config.methods, a set in config.data.sets and, "
            "unless the method needs none, an engine in config.engines"
        )
    return json.loads(json.dumps(cases))


def read_rows(path: Path) -> list[dict]:
    """Reads the rows of an evaluation file; an absent file has none.

    Raises:
      UserError: the file is not a list of rows, or an older version wrote it.
    """
    if not path.exists():
        return []
    rows = json.loads(path.read_text())
    if not isinstance(rows, list):
        raise UserError(f"{path} is not a list of rows; remove it or give another --workdir")
    for row in rows:
        check_format(row.get("settings", {}), path.parent)
    return rows


def load_set(name: str, limit: int | None) -> list[QARow]:
    """Loads a question set: "source/split" ("world/test"), or the path of a file."""
    if Path(name).suffix:
        return load_qa(name, Path(name).stem, limit)
    source, _, split = name.rpartition("/")
    if not source:
        raise UserError(
            f"config.data.sets: {name!r} is not a question set; give SOURCE/SPLIT, such as "
            "world/test, or a file"
        )
    return load_qa(source, split, limit)


def evaluate_cases(
    config: EvaluateConfig, cases: Sequence[dict], question_sets: dict[str, list[QARow]]
) -> Iterator[tuple[dict, list[Trajectory]]]:
    """Yields each case with its episodes. Builds only the engines and models that they need."""
    if not cases:
        return
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    model = factory.load_model(config.policy.model, mesh, "float32")
    generator = factory.make_generator(model, config.policy.generator, mesh, STOP_STRINGS)
    engines = {
        name: factory.make_engine(config.engines[name], config.seed, config.mesh)
        for name in {case["engine"] for case in cases} - {"none"}
    }
    generate = None
    if any(case["method"] == "search_o1" for case in cases):
        generate = refiner(
            model, config.policy.generator, mesh, max_new_tokens=config.refine.max_new_tokens
        )
    for case in cases:
        trajectories = run_method(
            case["method"],
            generator,
            engines.get(case["engine"]),
            model.tokenizer,
            question_sets[case["set"]],
            limits=limits_of(config.limits),
            generate=generate,
        )
        yield case, trajectories


def _rows_of(case: dict, rows: Sequence[dict]) -> list[dict]:
    return [row for row in rows if case.items() <= row.items()]
