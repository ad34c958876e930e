"""Runs the stages of a pipeline as subprocesses: `python -m zerosearch_jax.main ...`.

Every stage has a folder below the pipeline's workdir, a share of the cores and a log file.
Finished stages are skipped, interrupted stages resume.
"""

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from zerosearch_jax.data.records import Records
from zerosearch_jax.errors import UserError
from zerosearch_jax.parallel.stop_request import StopRequest

POLL_SECS = 0.5

# Runs Python with the arguments after the first, which is the parent's process id. The kernel
# kills the process when its parent ends, even by SIGKILL; `exec` keeps this setting. A surviving
# stage would write to the same folder as the stage of a restarted pipeline.
_END_WITH_PARENT = """\
import ctypes, os, signal, sys
PR_SET_PDEATHSIG = 1
ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
if os.getppid() != int(sys.argv[1]):
    sys.exit("the parent process has ended")
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""

RECORD = {"ended": float, "seconds": float}
"""The shape of a record in `stages.jsonl`, without its id and recipe; see `files`."""


@dataclass(frozen=True)
class Stage:
    """One run of `zerosearch_jax.main`.

    Attributes:
      name: the stage's folder below the workdir.
      argv: flags of `main`, without --workdir.
      done: the file that the stage writes last, relative to its folder.
      after: names of the stages whose results this stage reads.
      config: fingerprint of the config file behind `argv`.
    """

    name: str
    argv: tuple[str, ...]
    done: str
    after: tuple[str, ...] = ()
    config: str = ""

    def recipe(self, root: Path) -> list[str]:
        """Returns flags and config fingerprint; paths below `root` do not depend on it."""
        return [*(flag.replace(str(root), "WORKDIR") for flag in self.argv), self.config]


def run_stages(todo: Sequence[Stage], root: Path, workers: int, log: Records) -> None:
    """Runs the unfinished stages, at most `workers` at a time, each after its prerequisites.

    Call it from the main thread: the kernel ends a stage when the thread that started it ends.

    Args:
      todo: all stages of the pipeline; a stage comes after its prerequisites.
      root: the pipeline's workdir.
      workers: stages that run at the same time; each gets an equal share of the cores.
      log: receives one record per finished stage: "id", "ended" (Unix time), "seconds" and
        "recipe".

    Raises:
      UserError: `workers` is out of range, a finished stage is stale (see `check_finished`), or a
        stage failed. The other stages are terminated and resume when the command is repeated.
      Terminated: SIGTERM arrived; the stages have got it, too.
    """
    cores = sorted(os.sched_getaffinity(0))
    if not 1 <= workers <= len(cores):
        raise UserError(f"config.workers={workers}: choose 1 to {len(cores)}, the number of cores")
    waiting = [stage for stage in todo if not (root / stage.name / stage.done).exists()]
    check_finished([stage for stage in todo if stage not in waiting], waiting, root, log)
    print(f"{len(todo) - len(waiting)} of {len(todo)} stages are done", flush=True)
    unfinished = {stage.name for stage in waiting}
    with StopRequest() as stop, _ended_together() as running:
        while waiting or running:
            for worker in set(range(workers)) - running.keys():
                ready = [stage for stage in waiting if not unfinished & set(stage.after)]
                if ready:
                    stage = ready[0]
                    waiting.remove(stage)
                    process = _start(stage, root, cores[worker::workers])
                    running[worker] = stage, process, time.monotonic()
            with stop.interruptible():
                time.sleep(POLL_SECS)
            for worker, (stage, process, began) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[worker]
                if process.returncode or not (root / stage.name / stage.done).exists():
                    raise UserError(
                        f"stage {stage.name} failed; see the end of "
                        f"{root / stage.name / 'log.txt'}, fix the problem and repeat the command"
                    )
                seconds, ended = time.monotonic() - began, time.time()
                unfinished.discard(stage.name)
                record = {"id": f"{stage.name}@{ended:.0f}", "ended": ended, "seconds": seconds}
                log.append([record | {"recipe": stage.recipe(root)}])
                print(f"{stage.name}: {seconds:.0f} s; {len(unfinished)} stages left", flush=True)


@contextmanager
def _ended_together() -> Iterator[dict[int, tuple[Stage, subprocess.Popen, float]]]:
    """Yields a dict: worker → running stage, its process and start. At exit, terminates them."""
    running = {}
    try:
        yield running
    finally:
        for _, process, _ in running.values():
            process.terminate()
        for _, process, _ in running.values():
            process.wait()


def check_finished(
    finished: Sequence[Stage], waiting: Sequence[Stage], root: Path, log: Records
) -> None:
    """Checks that each finished stage ran with its present flags and prerequisites.

    A stage without a record in `log` was not finished by this pipeline and passes.

    Raises:
      UserError: a stage had other flags or another config file, or one of its prerequisites ended
        after it or has to run again.
    """
    last = {record["id"].rpartition("@")[0]: record for record in log}
    rerun = {stage.name for stage in waiting}
    for stage in finished:
        if stage.name not in last:
            continue
        record, folder = last[stage.name], root / stage.name
        newer = [
            name
            for name in stage.after
            if name in rerun or (name in last and last[name]["ended"] > record["ended"])
        ]
        if record.get("recipe") != stage.recipe(root):
            raise UserError(
                f"stage {stage.name} ran with other flags or another config file; remove {folder} "
                "to run it again, or use another --workdir"
            )
        if newer:
            raise UserError(
                f"stage {stage.name} is older than the result of stage {newer[0]}, which it reads; "
                f"remove {folder} to run it again"
            )


def _start(stage: Stage, root: Path, cores: Sequence[int]) -> subprocess.Popen:
    """Starts the stage on `cores`, with its output appended to `log.txt`."""
    folder = root / stage.name
    folder.mkdir(parents=True, exist_ok=True)
    main = ["-m", "zerosearch_jax.main", *stage.argv, f"--workdir={folder}"]
    # The stages share one compilation cache.
    cache = str((root / "compiled").absolute())
    own_cores = os.sched_getaffinity(0)
    # The subprocess inherits the affinity. XLA sizes its thread pools by it when it starts.
    os.sched_setaffinity(0, cores)
    try:
        with (folder / "log.txt").open("a") as log:
            return subprocess.Popen(
                [sys.executable, "-c", _END_WITH_PARENT, str(os.getpid()), *main],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=dict(os.environ, JAX_COMPILATION_CACHE_DIR=cache),
            )
    finally:
        os.sched_setaffinity(0, own_cores)
