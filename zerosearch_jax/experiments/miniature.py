"""The paper in miniature: collect → fine-tune the simulator → check it → train all arms → evaluate.

Every stage is a subprocess with its own folder, see `experiments/stages.py`. An arm is one way to
train; an arm run is an arm with one seed.
"""

import hashlib
import json
import math
import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

from ml_collections import ConfigDict

from zerosearch_jax import config_flags
from zerosearch_jax.data.records import Records
from zerosearch_jax.errors import UserError
from zerosearch_jax.experiments import claims, miniature_report
from zerosearch_jax.experiments.config import MiniatureConfig
from zerosearch_jax.experiments.stages import RECORD, Stage, run_stages
from zerosearch_jax.files import parse_row, read_json, read_text, write_json
from zerosearch_jax.telemetry.recorder import earlier_rows
from zerosearch_jax.training.inputs import check_model


def run(config: ConfigDict, workdir: str) -> None:
    """Runs the unfinished `stages`, then writes `workdir/report.md` with its plots.

    Raises:
      UserError: a stage failed.
    """
    config = config_flags.typed(MiniatureConfig, config)
    for name, model in config.start_policies.items():
        check_model(f"start_policies.{name}", model)
    root = Path(workdir)
    planned = stages(config, root)
    root.mkdir(parents=True, exist_ok=True)
    log = Records(root / "stages.jsonl", RECORD)
    check_results(config, root)
    run_stages(planned, root, config.workers, log)
    write_report(config, root, log)


def stages(config: MiniatureConfig, root: Path) -> list[Stage]:
    """Returns all stages; a stage comes after the stages whose results it reads."""

    def stage(name: str, preset: str, done: str, after: Sequence[str] = (), **changes) -> Stage:
        overrides = [f"--config.{key}={value}" for key, value in changes.items()]
        spec = f"{config.recipe}:{config.prefix}{preset}"
        content = json.dumps(config_flags.load(spec).to_dict(), sort_keys=True)
        fingerprint = hashlib.sha256(content.encode()).hexdigest()
        return Stage(name, (f"--config={spec}", *overrides), done, tuple(after), fingerprint)

    pairs = {"data.examples": root / "collect/pairs.jsonl"}
    pairs["data.validation"] = root / "collect/heldout.jsonl"
    weights = root / "simulator/model"
    found = [
        stage("collect", "collect", "summary.json"),
        stage("simulator", "simulator", "model/tokenizer.json", ["collect"], **pairs),
        stage(
            "simulator_report",
            "simulator_report",
            "report.json",
            ["simulator"],
            **{
                "pairs": root / "collect/heldout.jsonl",
                "simulators.finetuned.simulator.model": weights,
            },
        ),
        stage("sft", "sft", "model/tokenizer.json"),
    ]
    simulated = {"search.simulator.model": weights}
    simulated["search.simulator.gate.report"] = root / "simulator_report/report.json"
    arms = (*config.arms, *config.baselines)
    tuned_arms = {arm for arm in arms if uses_tuned_simulator(config, arm)}
    for seed in config.seeds:
        for arm in arms if seed in config.baseline_seeds else config.arms:
            tuned = arm in tuned_arms
            found.append(
                stage(
                    f"{arm}-{seed}",
                    arm,
                    "summary.json",
                    ["simulator_report"] if tuned else [],
                    seed=seed,
                    **(simulated if tuned else {}),
                )
            )
    for name, model in config.start_policies.items():
        changes = {"policy.model": model}
        found.append(stage(f"methods-{name}", "methods", "evaluation.txt", **changes))
    changes = {"policy.model": root / "sft/model", "methods": "('direct',)"}
    found.append(stage("methods-sft", "methods", "evaluation.txt", ["sft"], **changes))
    for arm in (arm for arm in config.noise_arms if arm in config.arms):
        for seed in config.seeds:
            trained = f"{arm}-{seed}"
            changes = {"policy.model": root / trained / "policy"}
            found.append(stage(f"noise-{trained}", "noise", "evaluation.txt", [trained], **changes))
    return found


def uses_tuned_simulator(config: MiniatureConfig, arm: str) -> bool:
    """Whether the arm trains with the simulator that this pipeline fine-tunes."""
    search = config_flags.load(f"{config.recipe}:{config.prefix}{arm}").search
    return search.engine == "simulated" and search.simulator.form == "finetuned"


def write_report(config: MiniatureConfig, root: Path, log: Records) -> None:
    """Evaluates the claims on the finished stages; writes `claims.json` and the report."""
    runs = finished_runs(config, root)
    finished = {run["arm"]: run["seed"] for run in runs}  # one seed of each arm
    bases = [
        base_run(root / f"{arm}-{finished[arm]}", name)
        for name, arm in (("base", "zerosearch"), ("instruct_base", "instruct"))
        if arm in finished
    ]
    rows = claims.evaluate_claims(runs + bases)
    write_json(root / "claims.json", rows)
    seconds: dict[str, float] = {}
    for record in log:
        stage = record["id"].partition("@")[0]
        seconds[stage] = seconds.get(stage, 0.0) + record["seconds"]
    path = miniature_report.write(
        root,
        claims_rows=rows,
        methods_rows=methods_rows(config, root, runs),
        simulator_rows=simulator_rows(root),
        noise_curves=noise_curves(config, runs),
        training_curves={
            arm: [run["curve"] for run in runs if run["arm"] == arm] for arm in config.arms
        },
        provenance=dict(
            command=f"python -m zerosearch_jax.main {' '.join(command_flags(config))}",
            commit=commit(),
            seeds=list(config.seeds),
            cores=len(os.sched_getaffinity(0)),
            seconds=busy_seconds(log),
            stage_seconds=seconds,
        ),
    )
    for row in rows:
        print(f"({row['claim']}) {row['text']}: {row['verdict']}")
    print(f"written to {path}")


def finished_runs(config: MiniatureConfig, root: Path) -> list[dict]:
    """Reads the training runs that are finished, see `arm_run`."""
    return [
        arm_run(root, arm, seed)
        for seed in config.seeds
        for arm in (*config.arms, *config.baselines)
        if (root / f"{arm}-{seed}" / "summary.json").exists()
    ]


def check_results(config: MiniatureConfig, root: Path) -> None:
    """Reads the results of finished stages, to refuse a damaged file before other stages run."""
    finished_runs(config, root)
    for name in (*config.start_policies, "sft"):
        if (root / f"methods-{name}" / "evaluation.txt").exists():
            method_rows(root, name)
    if (root / "simulator_report/report.json").exists():
        simulator_rows(root)


def command_flags(config: MiniatureConfig) -> list[str]:
    """Returns the flags that reproduce this config: its file and the overridden values."""
    preset = config.prefix.rstrip("/")
    spec = f"{config.recipe}:{preset}" if preset else config.recipe
    given, default = config_flags.plain(config), config_flags.load(spec).to_dict()
    changed = [key for key in given if given[key] != default[key]]
    return [f"--config={spec}", *(f'--config.{key}="{given[key]}"' for key in changed)]


def busy_seconds(log: Records) -> float:
    """Wall-clock seconds during which at least one of the logged stages ran."""
    total, until = 0.0, 0.0
    for began, ended in sorted((one["ended"] - one["seconds"], one["ended"]) for one in log):
        total += max(0.0, ended - max(began, until))
        until = max(until, ended)
    return total


def arm_run(root: Path, arm: str, seed: int) -> dict:
    """Reads the results of one training run: an arm with one seed.

    Returns:
      "arm", "seed", "engine", "searches_per_episode"; "em" and "f1" (one score per test
      question); "noise" (evaluation noise → exact match per question, empty if not measured);
      "curve" (one {"step", "em"} per training step).
    """
    folder = root / f"{arm}-{seed}"
    shape = {"engine": str, "trained": {"searches_per_episode": float}}
    summary = read_json(folder / "summary.json", shape, _fix(folder))
    metrics = earlier_rows(folder / "metrics.jsonl", math.inf, ("em",))
    noise_file = root / f"noise-{arm}-{seed}" / "evaluation.json"
    row = {"settings": {"engine": {"noise": float}}, "em_of_each": [float, ...]}
    noise_rows = (
        read_json(noise_file, [row], _fix(noise_file.parent)) if noise_file.exists() else []
    )
    return {
        "arm": arm,
        "seed": seed,
        "engine": summary["engine"],
        **_scores(folder, "trained"),
        "searches_per_episode": summary["trained"]["searches_per_episode"],
        "noise": {
            f"{row['settings']['engine']['noise']:g}": row["em_of_each"] for row in noise_rows
        },
        "curve": [{"step": row["step"], "em": row["em"]} for row in metrics],
    }


def base_run(folder: Path, name: str) -> dict:
    """Reads the scores of the start policy of the training run in `folder`, as arm `name`."""
    return {"arm": name, "seed": 0, **_scores(folder, "base")}


def _scores(folder: Path, policy: str) -> dict[str, list[float]]:
    path, shape = folder / "answers.jsonl", {"policy": str, "em": float, "f1": float}
    rows = [
        parse_row(line.encode(), shape, f"{path}: row {number}", _fix(folder))
        for number, line in enumerate(read_text(path, _fix(folder)).split("\n"), 1)
        if line
    ]
    rows = [row for row in rows if row["policy"] == policy]
    if not rows:
        raise UserError(f"{path}: no row of the {policy} policy; {_fix(folder)}")
    return {name: [row[name] for row in rows] for name in ("em", "f1")}


def _fix(folder: Path) -> str:
    return f"restore it from a copy, or remove {folder} to run the stage again"


def simulator_rows(root: Path) -> list[dict]:
    """Reads the rows of the simulator's report."""
    folder = root / "simulator_report"
    return read_json(folder / "report.json", {"rows": [dict]}, _fix(folder))["rows"]


def method_rows(root: Path, name: str) -> list[dict]:
    """Reads the rows of the inference methods of one start policy."""
    path = root / f"methods-{name}" / "evaluation.json"
    scores = {
        **dict.fromkeys(("em", "f1", "searches_per_episode"), float),
        **dict.fromkeys(("em_interval", "f1_interval"), (float, float)),
    }
    shape = dict.fromkeys(("method", "engine", "set"), str) | scores
    return read_json(path, [shape], _fix(path.parent))


def methods_rows(config: MiniatureConfig, root: Path, runs: Sequence[Mapping]) -> list[dict]:
    """Returns one row per inference method and start policy, and one per trained arm."""
    found = []
    for name in (*config.start_policies, "sft"):
        rows = method_rows(root, name)
        # Rows of other settings precede those of the finished stage.
        for row in {(row["method"], row["engine"], row["set"]): row for row in rows}.values():
            found.append(
                {
                    "method": f"{row['method']} ({name})",
                    "engine": row["engine"],
                    "em": (row["em"], *row["em_interval"]),
                    "f1": (row["f1"], *row["f1_interval"]),
                    "searches_per_question": row["searches_per_episode"],
                    "seeds": 1,
                }
            )
    for arm in (*config.baselines, *config.arms):
        arm_runs = [run for run in runs if run["arm"] == arm]
        if arm_runs:
            found.append(
                {
                    "method": f"trained: {arm}",
                    "engine": arm_runs[0]["engine"],
                    "em": claims.mean_interval([fmean(run["em"]) for run in arm_runs]),
                    "f1": claims.mean_interval([fmean(run["f1"]) for run in arm_runs]),
                    "searches_per_question": fmean(
                        [run["searches_per_episode"] for run in arm_runs]
                    ),
                    "seeds": len(arm_runs),
                }
            )
    return found


def noise_curves(config: MiniatureConfig, runs: Sequence[Mapping]) -> dict[str, dict]:
    """Training schedule → evaluation noise → mean and interval of exact match over seeds."""
    curves: dict[str, dict] = {}
    for arm in config.noise_arms:
        scores = [run["noise"] for run in runs if run["arm"] == arm and run["noise"]]
        if scores:
            curves[arm] = {
                noise: claims.mean_interval([fmean(by_noise[noise]) for by_noise in scores])
                for noise in scores[0]
            }
    return curves


def commit() -> str:
    """Returns the checkout's commit, with "-dirty" appended if files differ from it."""
    try:
        git = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "not a git checkout"
    return git.stdout.strip()
