"""Evaluates a model greedily: methods × engines × question sets, with 95% intervals.

The job evaluates any Hugging Face directory. The `rl` job evaluates its own policy with
`evaluation.baselines.run_method`.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from ml_collections import ConfigDict

from zerosearch_jax import config_flags
from zerosearch_jax.data.qa import QARow, load_qa
from zerosearch_jax.errors import UserError
from zerosearch_jax.evaluation.baselines import refiner, run_method
from zerosearch_jax.evaluation.summary import search_failures, summary, text_table
from zerosearch_jax.files import FORMAT, check_format, write_atomically, write_json
from zerosearch_jax.parallel.mesh import make_mesh
from zerosearch_jax.rollout.scheduler import STOP_STRINGS
from zerosearch_jax.rollout.trajectory import Trajectory
from zerosearch_jax.training import factory
from zerosearch_jax.training.episode_metrics import answer_scores, episode_metrics
from zerosearch_jax.training.fingerprints import engine_sha256, model_sha256, rows_sha256
from zerosearch_jax.training.inputs import check_job
from zerosearch_jax.training.job_configs import WITHOUT_ENGINE, EvaluateConfig
from zerosearch_jax.training.no_signal import Notices, failed_searches, unanswered
from zerosearch_jax.training.probe import probe
from zerosearch_jax.training.prompt_limits import fitting, prompt_limits
from zerosearch_jax.training.step_rollouts import limits_of

# Generator settings that change sampled tokens; the others change only speed and memory.
OUTPUT_SETTINGS = ("dtype", "int8_weights", "max_tokens")
# Client settings that decide whether a search fails, but not its documents.
CLIENT_SETTINGS = ("key_variable", "timeout_secs", "attempts", "backoff_secs", "workers")


def run(config: ConfigDict, workdir: str) -> None:
    """Evaluates `config.policy.model`; writes `evaluation.json` and `evaluation.txt` to `workdir`.

    `evaluation.json` is a list of rows, rewritten after each row: an eval case (see `eval_cases`)
    with its `summary`. A case that has a row there is skipped, so an interrupted command resumes.
    A row with other fingerprints is stale: it is removed and its case runs again. `evaluation.txt`
    holds the printed table and exists only once all rows do.

    Raises:
      UserError: an engine on a server does not answer, or more than `config.max_failed_searches`
        of a case's searches failed. Such a case gets no row; the other cases still run.
    """
    config = config_flags.typed(EvaluateConfig, config)
    check_job(config)
    path = Path(workdir) / "evaluation.json"
    text_path = path.with_suffix(".txt")
    rows, selected = read_rows(path), selection(config)
    factory.check_model(config.policy.model, STOP_STRINGS)
    for name in {engine for _, engine, _ in selected} - {"none"}:
        factory.check_simulator_model(config.engines[name])
    question_sets = load_sets(config)
    cases = eval_cases(config, selected, question_sets)
    missing = [case for case in cases if not _rows_of(case, rows)]
    for case in missing:
        if changes := changed(case, rows):
            print(
                f"{_name(case)}: runs again, because this changed since its last row: {changes}",
                flush=True,
            )
    for name in dict.fromkeys(case["engine"] for case in missing if case["engine"] != "none"):
        probe(config.engines[name], f"engines.{name}", config.seed, config.mesh)
    path.parent.mkdir(parents=True, exist_ok=True)
    text_path.unlink(missing_ok=True)
    rows = [row for row in rows if not any(_is_stale(row, case) for case in missing)]
    write_json(path, rows)
    notices, failed = Notices(), 0
    for case, trajectories in evaluate_cases(config, missing, question_sets):
        notices.show(_name(case), failed_searches(trajectories))
        notices.show(_name(case), unanswered(episode_metrics(trajectories), "limits"))
        if trouble := search_failures(trajectories, config.max_failed_searches):
            failed += 1
            print(
                f"{_name(case)}: no result: {trouble}; fix config.engines.{case['engine']} or its "
                "server, or raise its remote.attempts",
                flush=True,
            )
            continue
        exact_matches = answer_scores(trajectories, "em")  # one per question, in the set's order
        rows.append(case | summary(trajectories) | {"em_of_each": exact_matches})
        write_json(path, rows)
    text = ""
    if failed < len(cases):
        text = table(cases, rows, config.policy.model)
        print(f"\n{text}")
    if failed:
        raise UserError(
            f"{failed} of {len(cases)} rows have no result, because their searches failed (see the "
            "lines above); repeat the command to run only these rows"
        )
    write_atomically(text_path, text)
    print(f"written to {text_path} and {path}")


def table(cases: Sequence[dict], rows: Sequence[dict], title: str) -> str:
    """Returns the printed table: a line per case that has a row."""
    columns = ("method", "engine", "set")
    widths = {column: max(len(case[column]) for case in cases) for column in columns}
    summaries = {
        "  ".join(f"{case[column]:{width}}" for column, width in widths.items()): row
        for case in cases
        for row in _rows_of(case, rows)
    }
    return text_table(summaries, title)


def selection(config: EvaluateConfig) -> list[tuple[str, str, str]]:
    """Returns the requested (method, engine, set); the engine is "none" if the method needs none.

    Raises:
      UserError: an empty selection.
    """
    selected = [
        (method, engine, name)
        for method in config.methods
        for engine in (("none",) if method in WITHOUT_ENGINE else config.engines)
        for name in config.data.sets
    ]
    if not selected:
        raise UserError(
            "nothing to evaluate: give a method in config.methods, a set in config.data.sets and, "
            "unless the method needs none, an engine in config.engines"
        )
    return selected


def eval_cases(
    config: EvaluateConfig,
    selected: Sequence[tuple[str, str, str]],
    question_sets: Mapping[str, Sequence[QARow]],
) -> list[dict]:
    """Returns the identity of each selected row, as it reads back from JSON.

    Keys: model, method, engine, set, limit, settings and fingerprints. `limit` is a number of
    questions or None. `settings` has all other config values that change the results.
    `fingerprints` identifies the model, the questions and the files that the engine reads.

    Raises:
      UserError: an unreadable model.
    """
    model = model_sha256(config.policy.model)
    engines = {
        name: engine_sha256(config.engines[name])
        for name in {engine for _, engine, _ in selected} - {"none"}
    }
    cases = [
        {
            "model": config.policy.model,
            "method": method,
            "engine": engine,
            "set": name,
            "limit": config.data.limit,
            "settings": settings_of(config, method, engine),
            "fingerprints": {
                "model": model,
                "questions": rows_sha256(question_sets[name]),
                "engine": engines.get(engine, ""),
            },
        }
        for method, engine, name in selected
    ]
    return json.loads(json.dumps(cases))


def settings_of(config: EvaluateConfig, method: str, engine: str) -> dict[str, object]:
    """Returns the settings that change the results of a method with an engine."""
    settings = {
        "format": FORMAT,
        "seed": config.seed,
        "limits": config_flags.plain(config.limits),
        **{key: getattr(config.policy.generator, key) for key in OUTPUT_SETTINGS},
    }
    if engine != "none":
        settings["engine"] = config_flags.plain(config.engines[engine])
        for key in CLIENT_SETTINGS:
            settings["engine"].get("remote", {}).pop(key, None)
    if method == "search_o1":
        settings["refine"] = config_flags.plain(config.refine)
    return settings


def changed(case: dict, rows: Sequence[dict]) -> str:
    """Names the changes since the last row of this case's method, engine and set; "" without one.

    A change is a setting ("limits.max_turns: 3 → 2") or the content of an input.
    """
    keys = ("model", "method", "engine", "set", "limit")
    before = [row for row in rows if all(row[key] == case[key] for key in keys)]
    if not before:
        return ""
    changes = config_flags.differences(before[-1]["settings"], case["settings"])
    changes += [
        f"the content of the {name}"
        for name, value in case["fingerprints"].items()
        if before[-1]["fingerprints"][name] != value
    ]
    return ", ".join(changes)


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


def load_sets(config: EvaluateConfig) -> dict[str, list[QARow]]:
    """Loads the question sets by name, without the questions that `data.overlong` drops."""
    limits = prompt_limits(config.policy, config.limits, config.engines.values(), config.methods)
    return {
        name: fitting(load_set(name, config.data.limit), limits, config.data.overlong)
        for name in config.data.sets
    }


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
    needed = {case["engine"] for case in cases} - {"none"}
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    model = factory.load_model(config.policy.model, mesh, "float32")
    generator = factory.make_generator(model, config.policy.generator, mesh, STOP_STRINGS)
    engines = {
        name: factory.make_engine(config.engines[name], config.seed, config.mesh) for name in needed
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


def _is_stale(row: dict, case: dict) -> bool:
    """Whether the row is the case's, up to its fingerprints."""
    return all(row[key] == value for key, value in case.items() if key != "fingerprints")


def _name(case: dict) -> str:
    return f"{case['method']}, {case['engine']}, {case['set']}"
