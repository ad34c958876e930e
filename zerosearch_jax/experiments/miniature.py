"""The paper in miniature: collect → fine-tune the simulator → check it → train every arm → judge.

Each stage is a run of this program in a process of its own, on its share of the cores, and in a
folder of its own; one that is finished is not run again, one that was cut off goes on.
"""

import fcntl
import json
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ml_collections import ConfigDict

from zerosearch_jax import config_flags
from zerosearch_jax.data.records import Records
from zerosearch_jax.errors import UserError
from zerosearch_jax.experiments import claims, miniature_report

POLL_SECS = 0.5


@dataclass(frozen=True)
class Stage:
    """One run of the program.

    Attributes:
      name: its folder below the workdir.
      argv: flags of `main`, but for --workdir.
      done: a file of its folder that is written last.
      after: names of the stages whose results it reads.
    """

    name: str
    argv: tuple[str, ...]
    done: str
    after: tuple[str, ...] = ()


def run(config: ConfigDict, workdir: str) -> None:
    """Runs what is not done of `stages`, then writes `workdir/report.md` with its figures."""
    root = Path(workdir)
    root.mkdir(parents=True, exist_ok=True)
    with (root / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"{root} is in use by another process; wait for it or end it"
            ) from error
        log = Records(root / "stages.jsonl")
        run_stages(stages(config, root), root, config.workers, log)
        write_report(config, root, log)


def stages(config: ConfigDict, root: Path) -> list[Stage]:
    """All stages, in the order in which they are begun."""

    def stage(name: str, preset: str, done: str, after: Sequence[str] = (), **changes) -> Stage:
        overrides = [f"--config.{key}={value}" for key, value in changes.items()]
        argv = (f"--config={config.recipe}:{config.prefix}{preset}", *overrides)
        return Stage(name, argv, done, tuple(after))

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
    tuned_arms = {arm for arm in arms if uses_the_tuned_simulator(config, arm)}
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
            cell = f"{arm}-{seed}"
            changes = {"policy.model": root / cell / "policy"}
            found.append(stage(f"noise-{cell}", "noise", "evaluation.txt", [cell], **changes))
    return found


def uses_the_tuned_simulator(config: ConfigDict, arm: str) -> bool:
    """Whether the arm trains on the simulator that was fine-tuned here."""
    search = config_flags.load(f"{config.recipe}:{config.prefix}{arm}").search
    return search.engine == "simulated" and search.simulator.form == "finetuned"


def run_stages(todo: Sequence[Stage], root: Path, workers: int, log: Records) -> None:
    """Runs the stages, `workers` at once, each as soon as those it waits for are done.

    Raises:
      UserError: a stage failed; the others are stopped, and go on when the command is repeated.
    """
    cores = sorted(os.sched_getaffinity(0))
    if not 1 <= workers <= len(cores):
        raise UserError(f"config.workers={workers} must be from 1 to the {len(cores)} cores here")
    waiting = [stage for stage in todo if not (root / stage.name / stage.done).exists()]
    print(f"{len(todo) - len(waiting)} of {len(todo)} stages are done", flush=True)
    open_names = {stage.name for stage in waiting}
    running: dict[int, tuple[Stage, multiprocessing.Process, float]] = {}
    spawn = multiprocessing.get_context("spawn")
    try:
        while waiting or running:
            for worker in set(range(workers)) - running.keys():
                ready = [stage for stage in waiting if not open_names & set(stage.after)]
                if ready:
                    stage = ready[0]
                    waiting.remove(stage)
                    share = cores[worker::workers]
                    process = spawn.Process(target=run_stage, args=(stage, str(root), share))
                    process.start()
                    running[worker] = stage, process, time.monotonic()
            time.sleep(POLL_SECS)
            for worker, (stage, process, began) in list(running.items()):
                if process.is_alive():
                    continue
                del running[worker]
                log_file = root / stage.name / "log.txt"
                if process.exitcode or not (root / stage.name / stage.done).exists():
                    raise UserError(
                        f"stage {stage.name} failed; see the end of {log_file}, mend it and give "
                        "the command again"
                    )
                seconds = time.monotonic() - began
                open_names.discard(stage.name)
                ended = time.time()
                log.append(
                    [{"id": f"{stage.name}@{ended:.0f}", "ended": ended, "seconds": seconds}]
                )
                print(f"{stage.name}: {seconds:.0f} s; {len(open_names)} stages left", flush=True)
    finally:
        for _, process, _ in running.values():
            process.terminate()
            process.join()


def run_stage(stage: Stage, root: str, cores: Sequence[int]) -> None:
    """In a process of its own: runs the stage on `cores`, its output in `log.txt`."""
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    os.sched_setaffinity(0, cores)
    folder = Path(root) / stage.name
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "log.txt").open("a") as log:
        os.dup2(log.fileno(), sys.stdout.fileno())
        os.dup2(log.fileno(), sys.stderr.fileno())
    # All stages share what they compile; XLA sizes its threads by the cores it may use.
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str((Path(root) / "compiled").absolute())
    from zerosearch_jax.main import cli

    sys.exit(cli(["main", *stage.argv, f"--workdir={folder}"]))


def _end_with_the_parent() -> None:
    """A stage must not outlive the job: a second one would then write to its folder."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def write_report(config: ConfigDict, root: Path, log: Records) -> None:
    """Judges the claims on the finished stages; writes `claims.json` and the report."""
    cells = [
        cell(root, arm, seed)
        for seed in config.seeds
        for arm in (*config.arms, *config.baselines)
        if (root / f"{arm}-{seed}" / "summary.json").exists()
    ]
    finished = {cell["arm"]: cell["seed"] for cell in cells}  # a seed of each
    bases = [
        base_cell(root / f"{arm}-{finished[arm]}", name)
        for name, arm in (("base", "zerosearch"), ("instruct_base", "instruct"))
        if arm in finished
    ]
    rows = claims.judge(cells + bases)
    (root / "claims.json").write_text(json.dumps(rows, indent=1) + "\n")
    seconds: dict[str, float] = {}
    for record in log:
        stage = record["id"].partition("@")[0]
        seconds[stage] = seconds.get(stage, 0.0) + record["seconds"]
    path = miniature_report.write(
        root,
        claims_rows=rows,
        methods_rows=methods_rows(config, root, cells),
        simulator_rows=json.loads((root / "simulator_report/report.json").read_text())["rows"],
        noise_curves=noise_curves(config, cells),
        training_curves={
            arm: [c["curve"] for c in cells if c["arm"] == arm] for arm in config.arms
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


def command_flags(config: ConfigDict) -> list[str]:
    """The flags that give this config: its file, and what was overridden."""
    preset = config.prefix.rstrip("/")
    spec = f"{config.recipe}:{preset}" if preset else config.recipe
    given, default = config.to_dict(), config_flags.load(spec).to_dict()
    changed = [key for key in given if given[key] != default[key]]
    return [f"--config={spec}", *(f'--config.{key}="{given[key]}"' for key in changed)]


def busy_seconds(log: Records) -> float:
    """Seconds by the clock in which at least one stage ran that was then finished."""
    total, until = 0.0, 0.0
    for began, ended in sorted((one["ended"] - one["seconds"], one["ended"]) for one in log):
        total += max(0.0, ended - max(began, until))
        until = max(until, ended)
    return total


def cell(root: Path, arm: str, seed: int) -> dict:
    """What `claims.judge` reads of one training run, and its curve."""
    folder = root / f"{arm}-{seed}"
    metrics = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    summary = json.loads((folder / "summary.json").read_text())
    noise = root / f"noise-{arm}-{seed}" / "evaluation.json"
    judged = json.loads(noise.read_text()) if noise.exists() else []
    return {
        "arm": arm,
        "seed": seed,
        "engine": summary["engine"],
        **_answers(folder, "trained"),
        "searches_per_episode": summary["trained"]["searches_per_episode"],
        "noise": {f"{row['settings']['engine']['noise']:g}": row["em_of_each"] for row in judged},
        "curve": [{"step": row["step"], "em": row["em"]} for row in metrics],
    }


def base_cell(folder: Path, name: str) -> dict:
    """A start policy as a cell; the run in `folder` started from it."""
    return {"arm": name, "seed": 0, **_answers(folder, "base")}


def _answers(folder: Path, policy: str) -> dict[str, list[float]]:
    rows = map(json.loads, (folder / "answers.jsonl").read_text().splitlines())
    mine = [row for row in rows if row["policy"] == policy]
    return {name: [row[name] for row in mine] for name in ("em", "f1")}


def methods_rows(config: ConfigDict, root: Path, cells: Sequence[Mapping]) -> list[dict]:
    """One row for each method of each start policy and for each way to train."""
    found = []
    for name in (*config.start_policies, "sft"):
        for row in json.loads((root / f"methods-{name}" / "evaluation.json").read_text()):
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
        mine = [c for c in cells if c["arm"] == arm]
        if mine:
            means = {k: [sum(c[k]) / len(c[k]) for c in mine] for k in ("em", "f1")}
            searches = [c["searches_per_episode"] for c in mine]
            found.append(
                {
                    "method": f"trained: {arm}",
                    "engine": mine[0]["engine"],
                    "em": claims.mean_interval(means["em"]),
                    "f1": claims.mean_interval(means["f1"]),
                    "searches_per_question": sum(searches) / len(searches),
                    "seeds": len(mine),
                }
            )
    return found


def noise_curves(config: ConfigDict, cells: Sequence[Mapping]) -> dict[str, dict]:
    """Schedule → noise at evaluation → mean and interval of exact match over seeds."""
    curves: dict[str, dict] = {}
    for arm in config.noise_arms:
        judged = [c["noise"] for c in cells if c["arm"] == arm and c["noise"]]
        if judged:
            curves[arm] = {
                share: claims.mean_interval([sum(one[share]) / len(one[share]) for one in judged])
                for share in judged[0]
            }
    return curves


def commit() -> str:
    """The checkout's commit, marked where files differ from it."""
    try:
        told = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "not a git checkout"
    return told.stdout.strip()
