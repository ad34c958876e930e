"""Kills the jobs at random moments; the same command must then end as if nothing had happened.

Each job runs as a real process, `python -m zerosearch_jax.main`. A quarter of the kills come at a
random time. The others come at or after a file operation in the workdir, which
`file_operations/sitecustomize.py` traces. Short phases therefore get their share of the kills: the
write of a checkpoint, its checksums, its deletion, exports, records and reports. The times scale
with the durations of an uninterrupted run, whose result the killed runs must equal.
"""

import hashlib
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import pytest

from zerosearch_jax.simulator.pairs import Pair, save_pairs

ROOT = Path(__file__).parents[2]
CLOCKS = ("seconds/", "tokens_per_sec", "host_share")
"""Metrics that measure time, so they differ between two runs. All others must be equal."""
LIMIT_SECS = 600.0
"""Limit of one process; a longer run fails the test."""
ENDS = (0, -signal.SIGKILL, -signal.SIGTERM, 143)
"""Accepted exit statuses of a run that gets signals."""
PHASES = (
    (r"checksums", "checksums"),
    (r"(checkpoints|best)/N\.", "checkpoint write"),
    (r"(checkpoints|best)/", "checkpoint deletion"),
    (r"(policy|model)\b", "export"),
    (r"lock|config\.json|tensorboard|checkpoints|best", "start-up"),
    (r"\.(json|jsonl|txt)\b", "result files"),
)
"""Pattern of a file operation, and its phase. The first match counts."""


def phase_of(operation: str) -> str:
    """Returns the phase of a run that a file operation belongs to."""
    return next(phase for pattern, phase in PHASES if re.search(pattern, operation))


@dataclass
class Run:
    """A process that has ended.

    Attributes:
      status: its exit status, -9 after SIGKILL.
      secs: duration.
      output: everything that it printed.
      trace: (seconds since the start, file operation) of each operation in the workdir. The last
        one is the signal that ended the process, if one did.
    """

    status: int
    secs: float
    output: str
    trace: list[tuple[float, str]]

    def count(self, operation: str) -> int:
        """Returns how often an operation was done."""
        return sum(name == operation for _, name in self.trace)

    @property
    def phase(self) -> str:
        """Names the phase that a kill hit: that of the last operation, or the work after it."""
        before = [entry for entry in self.trace if not entry[1].startswith("signal")]
        moment, operation = before[-1] if before else (0.0, "open lock")
        phase = phase_of(operation)
        if phase != "start-up" and self.trace[-1][0] - moment > 0.1:
            return "computing"
        return phase


class Command:
    """A job's command, with its uninterrupted run.

    Args:
      arguments: the flags of the command.
      scratch: an empty directory; `scratch/compiled` gets the programs of all runs.

    Attributes:
      whole: the uninterrupted run, with all programs compiled.
      result: `result_of` its workdir.
    """

    def __init__(self, arguments: Sequence[str], scratch: Path) -> None:
        self._arguments, self._scratch = arguments, scratch
        for workdir in (scratch / "compiling", scratch / "whole"):
            self.whole = self.run(workdir)
            assert self.whole.status == 0, self.whole.output
        self.result = result_of(scratch / "whole")
        assert result_of(scratch / "compiling") == self.result

    def run(
        self,
        workdir: Path,
        signals: Sequence[dict] = (),
        after_secs: float = 0.0,
        file_bytes: int = resource.RLIM_INFINITY,
    ) -> Run:
        """Runs the command, with `signals` at file operations or SIGKILL after some seconds."""
        limited = file_bytes != resource.RLIM_INFINITY
        trace, log = self._scratch / "trace", self._scratch / "log"
        trace.write_text("")
        environment = os.environ | {
            "PYTHONPATH": str(Path(__file__).parent / "file_operations"),
            "FILE_OPERATIONS_FOLDER": str(workdir),
            "FILE_OPERATIONS_TRACE": os.devnull if limited else str(trace),
            "FILE_OPERATIONS_SIGNALS": json.dumps(list(signals)),
            "XLA_FLAGS": "",  # one device, as users have
            "JAX_COMPILATION_CACHE_DIR": str(self._scratch / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        command = [sys.executable, "-m", "zerosearch_jax.main", *self._arguments]
        start = time.monotonic()
        with log.open("w") as file:
            process = subprocess.Popen(
                [*command, f"--workdir={workdir}"],
                cwd=ROOT,
                env=environment,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
            try:
                process.wait(after_secs or LIMIT_SECS)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                assert after_secs, f"still running after {LIMIT_SECS} s:\n{log.read_text()}"
                with trace.open("a") as lines:
                    lines.write(f"{time.monotonic()} signal {signal.SIGKILL}\n")
            status, secs = process.wait(), time.monotonic() - start
        lines = [line.partition(" ") for line in trace.read_text().splitlines()]
        operations = [(float(moment) - start, name) for moment, _, name in lines]
        return Run(status, secs, log.read_text(), operations)


class Plan:
    """Draws the moments of kills: a quarter by the clock, the others by file operation.

    Every phase of the uninterrupted run gets a kill before a second one does.
    """

    def __init__(self, whole: Run, rng: random.Random) -> None:
        self._rng, self._secs = rng, whole.secs
        # Operation: the gap after each of its occurrences.
        self._gaps: dict[str, list[float]] = {}
        for (moment, name), (following, _) in pairwise([*whole.trace, (whole.secs, "end")]):
            self._gaps.setdefault(name, []).append(following - moment)
        self._operations: dict[str, list[str]] = {}  # by phase
        for name in self._gaps:
            self._operations.setdefault(phase_of(name), []).append(name)
        self._queue: list[str] = []

    def draw(self, resumed: bool) -> dict[str, Any]:
        """Returns arguments of `Command.run`."""
        if self._rng.random() < 1 / 4:
            return {"after_secs": self._rng.uniform(0.02, 1.0) * self._secs}
        signals = [self._kill(self._next(), resumed)]
        saves = [name for name in self._gaps if re.search(r"(checkpoints|best)/N\.", name)]
        if saves and self._rng.random() < 1 / 4:  # SIGTERM, then SIGKILL during a save
            first, second = self._rng.sample(saves, 2)
            terminate = self._kill(first, resumed) | {"signal": signal.SIGTERM}
            signals = [terminate, self._kill(second, True)]
        return {"signals": signals}

    def _next(self) -> str:
        if not self._queue:
            self._queue = list(self._operations)
            self._rng.shuffle(self._queue)
        return self._rng.choice(self._operations[self._queue.pop()])

    def _kill(self, operation: str, first: bool) -> dict[str, Any]:
        gaps = self._gaps.get(operation, [0.0])
        occurrence = 1 if first else self._rng.randint(1, len(gaps))
        delay = self._rng.choice((0.0, self._rng.random() * gaps[occurrence - 1]))
        return {
            "signal": signal.SIGKILL,
            "operation": operation,
            "occurrence": occurrence,
            "delay_secs": delay,
        }


def result_of(workdir: Path) -> dict[str, Any]:
    """Returns everything that a run writes, except times and TensorBoard's events.

    Files are hashed. The state of a checkpoint is compared by its arrays, because Orbax gives its
    files random names.
    """
    found: dict[str, Any] = {}
    for path in sorted(workdir.rglob("*")):
        name = str(path.relative_to(workdir))
        if name == "lock" or name.startswith("tensorboard/"):
            continue
        if path.is_dir():
            if "/state" not in name:
                found[name] = "directory"
        elif match := re.fullmatch(r"((?:checkpoints|best)/\d+/state)/.*", name):
            if match[1] not in found:
                found[match[1]] = arrays_of(workdir / match[1])
        elif re.fullmatch(r"(checkpoints|best)/\d+/.*", name) and path.name != "metadata":
            found[name] = "exists"  # holds times, temporary names, or hashes of such files
        elif name == "metrics.jsonl":
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            found[name] = [
                {key: repr(value) for key, value in row.items() if not key.startswith(CLOCKS)}
                for row in rows
            ]
        elif name == "summary.json":
            found[name] = json.loads(path.read_text()) | {"training_seconds": 0}
        else:
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def without_older_checkpoints(result: dict[str, Any]) -> dict[str, Any]:
    """Returns the result with only the newest checkpoint."""
    steps = {name: int(name.split("/")[1]) for name in result if name.startswith("checkpoints/")}
    newest = max(steps.values(), default=0)
    return {name: value for name, value in result.items() if steps.get(name, newest) == newest}


def arrays_of(folder: Path) -> dict[str, str]:
    """Returns a hash of each array in the state of a checkpoint."""
    with warnings.catch_warnings(action="ignore"):  # no shardings are given
        state = ocp.PyTreeCheckpointer().restore(folder)
    return {
        name: f"{leaf.dtype}{leaf.shape} {hashlib.sha256(leaf.tobytes()).hexdigest()}"
        for name, leaf in ((name, np.asarray(leaf)) for name, leaf in state.items())
    }


def rl_arguments(rl_config, **_) -> list[str]:
    """Four steps, each evaluated; a checkpoint every second step and at a better score."""
    return [f"--config={rl_config}", *flags(rl__steps=4, checkpoint_every=2)]


GENERATOR = dict(
    slots=8,
    max_tokens=384,
    prefill_rows=8,
    prefill_buckets="(64,256)",
    decode_rows="()",
    chunk_tokens=8,
    window_tokens=384,
)


def flags(**values: Any) -> list[str]:
    """Returns overrides; `__` in a name separates sections."""
    return [f"--config.{name.replace('__', '.')}={value}" for name, value in values.items()]


def collect_arguments(markov_model, questions, **_) -> list[str]:
    """48 episodes in three batches."""
    return [
        "--config=configs/collect.py",
        *flags(**{f"policy__generator__{name}": value for name, value in GENERATOR.items()}),
        *flags(
            policy__model=markov_model,
            search__engine="bm25",
            search__corpus="world",
            labeling__kind="none",
            data__source=questions,
            limits__max_turns=2,
            limits__response_tokens=12,
            limits__observation_tokens=48,
            collect__samples=4,
            collect__temperature=1.0,
            collect__batch_questions=5,
            extract__label_by="rule",
            extract__heldout_share=0.675,
        ),
    ]


def sft_arguments(markov_model, folder, **_) -> list[str]:
    """Twelve steps with checkpoints, held-out losses and a best checkpoint."""
    for name, answers in (("pairs", ["Chad"] * 4), ("heldout", ["Peru"] * 3)):
        save_pairs(
            folder / f"{name}.jsonl",
            [
                Pair(
                    f"p{i}", f"find {i}", (f"It is {a}.", f"Not {a}."), "Who?", (a,), "useful", True
                )
                for i, a in enumerate(answers)
            ],
        )
    return [
        "--config=configs/sft_simulator.py",
        *flags(
            init=markov_model,
            data__examples=folder / "pairs.jsonl",
            data__validation=folder / "heldout.jsonl",
            optimizer__learning_rate=3e-3,
            optimizer__warmup_steps=0,
            learner__row_tokens=384,
            learner__rows=2,
            sft__steps=12,
            sft__examples_per_step=4,
            sft__eval_every=2,
            sft__checkpoint_every=3,
            sft__patience=4,
        ),
    ]


def evaluate_arguments(markov_model, questions, **_) -> list[str]:
    """Four rows."""
    return [
        "--config=configs/eval.py",
        *flags(**{f"policy__generator__{name}": value for name, value in GENERATOR.items()}),
        *flags(
            policy__model=markov_model,
            data__sets=f"('{questions}',)",
            data__limit=6,
            methods="('direct','cot','rag','search')",
            limits__max_turns=1,
            limits__response_tokens=12,
        ),
    ]


ARGUMENTS = dict(
    rl=rl_arguments, collect=collect_arguments, sft=sft_arguments, evaluate=evaluate_arguments
)


def resumed_as_expected(job: str, before: dict[str, int], run: Run) -> str:
    """Returns a complaint if a run did not continue from the progress `before`; "" if it did."""
    if job in ("rl", "sft"):
        words = f"resuming after step {before['steps']}"
        if before["steps"] and words not in run.output:
            return f"not {words}"
        return "a damaged checkpoint" if "damaged" in run.output else ""
    if job == "collect":
        batches = run.count("open episodes.jsonl")
        return "" if batches == 3 - -(-before["episodes"] // 20) else f"{batches} batches ran"
    rows = run.count("os.rename evaluation.json.part") - 1
    return "" if rows == 4 - before["rows"] else f"{rows} rows ran"


def progress_of(workdir: Path) -> dict[str, int]:
    """Returns the finished steps, episodes and rows in a workdir."""
    saved = [int(p.name) for p in workdir.glob("checkpoints/*") if p.name.isdecimal()]
    episodes, rows = workdir / "episodes.jsonl", workdir / "evaluation.json"
    return {
        "steps": max(saved, default=0),
        "episodes": episodes.read_bytes().count(b"\n") if episodes.exists() else 0,
        "rows": len(json.loads(rows.read_text())) if rows.exists() else 0,
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("job", "kills"), [("rl", 24), ("collect", 12), ("sft", 16), ("evaluate", 10)]
)
def test_a_killed_job_resumes_and_ends_bit_identically(
    job, kills, rl_config, markov_model, questions, tmp_path, tally
):
    (tmp_path / "runs").mkdir()
    arguments = ARGUMENTS[job](
        rl_config=rl_config, markov_model=markov_model, questions=questions, folder=tmp_path
    )
    command = Command(arguments, tmp_path / "runs")
    rng = random.Random(job)
    plan, phases, failures = Plan(command.whole, rng), Counter(), []
    for series in count():
        if phases.total() >= kills:
            break
        workdir = tmp_path / "runs" / f"killed{series}"
        story, attempts, terminated = [], rng.randint(2, 5), False
        for attempt in range(attempts + 1):
            before = progress_of(workdir)
            last = attempt == attempts or phases.total() == kills
            how = {} if last else plan.draw(resumed=attempt > 0)
            run = command.run(workdir, **how)
            story.append(f"{before} {how} -> {run.status} {run.trace[-1:]}")
            terminated |= "SIGTERM" in run.output
            if run.status == -signal.SIGKILL:
                phases[run.phase + " after SIGTERM" * ("SIGTERM" in run.output)] += 1
            if "Traceback" in run.output or run.status not in ENDS:
                failures.append(f"{story}:\n{run.output}")
            if run.status == 0:
                break
        complaint = resumed_as_expected(job, before, run)
        results = [result_of(workdir), command.result]
        if terminated:  # its checkpoint replaced an older one
            results = [without_older_checkpoints(result) for result in results]
        first, second = results
        names = sorted(first.keys() | second.keys())
        different = [name for name in names if first.get(name) != second.get(name)]
        if run.status or complaint or different:
            failures.append(f"{story}: {complaint} {different}:\n{run.output}")
        print(f"{len(failures)} failures; {story}; {complaint}; {different}", flush=True)
    hit = ", ".join(f"{number} {phase}" for phase, number in sorted(phases.items()))
    tally(f"SIGKILL of {job}: {hit}", phases.total(), len(failures))
    assert not failures, "\n\n".join(failures)


@pytest.mark.parametrize("tries", [1, pytest.param(20, marks=pytest.mark.slow)])
def test_of_two_runs_at_once_in_a_workdir_exactly_one_is_refused(
    tries, markov_model, questions, tmp_path, tally
):
    """The other one is killed, so that each later try finds the lock file of a dead process."""
    arguments = evaluate_arguments(markov_model, questions)
    arguments += [f"--workdir={tmp_path / 'run'}"]
    command = [sys.executable, "-m", "zerosearch_jax.main", *arguments]
    pipes = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    rng, wrong = random.Random(0), []
    for _ in range(tries):
        running = []
        for _ in range(2):
            running.append(subprocess.Popen(command, cwd=ROOT, **pipes))
            time.sleep(rng.uniform(0.0, 0.02))
        while all(process.poll() is None for process in running):
            time.sleep(0.01)
        running.sort(key=lambda process: process.poll() is None)
        running[1].kill()
        refusal, _ = (process.communicate()[1] for process in running)
        statuses = [process.returncode for process in running]
        one_line = re.fullmatch(r"error: .* is in use by .*\n", refusal)
        if statuses != [2, -signal.SIGKILL] or not one_line:
            wrong.append((statuses, refusal))
    tally("two runs at once in a workdir", tries, len(wrong))
    assert not wrong


@pytest.mark.slow
def test_a_full_disk_at_any_write_is_one_line_and_the_job_resumes(markov_model, tmp_path, tally):
    """Each try limits files to another size from 4 to 128 KiB, so that another write fails."""
    (tmp_path / "runs").mkdir()
    command = Command(sft_arguments(markov_model, tmp_path), tmp_path / "runs")
    limits, failures = [2**power for power in range(12, 18)], []
    for limit in limits:
        workdir = tmp_path / "runs" / f"full{limit}"
        limited = command.run(workdir, file_bytes=limit)
        whole = command.run(workdir)
        last = limited.output.strip().splitlines()[-1]
        if limited.status == 2 and not re.match(rf"error: {workdir}.*: File too large; ", last):
            failures.append(limited.output)
        if limited.status not in (0, 2) or whole.status or result_of(workdir) != command.result:
            failures.append(f"{limited.output}\n{whole.output}")
    tally("full disk during sft", len(limits), len(failures))
    assert not failures, "\n\n".join(failures)
