"""The one entry point: python -m zerosearch_jax.main --config=configs/grpo.py [flags]

  --config=FILE.py[:PRESET]  what to do; every value in it can be overridden:
  --config.rl.steps=20       … like this; a misspelt key is refused
  --workdir=DIR              results, checkpoints and logs (default runs/CONFIG[-PRESET]);
                             the same command on the same directory resumes
  --distributed              one of several processes: those of a TPU slice, or those that
                             JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID name

It reads the flags and hands over to the config's job. It knows nothing of what a job does.
"""

import importlib
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags
from absl import logging as absl_logging

from zerosearch_jax import config_flags
from zerosearch_jax.errors import UserError

JOBS = {
    "rl": "jobs.rl",
    "sft": "jobs.sft",
    "evaluate": "jobs.evaluate",
    "collect": "jobs.collect",
    "simulator_report": "jobs.simulator_report",
    "miniature": "experiments.miniature",
    "algorithms": "experiments.algorithms",
    "bench": "benchmarks.bench",
    "compile": "tpu_aot.compile_report",
}

DISTRIBUTED_JOBS = ("rl",)


def cli(argv: Sequence[str]) -> int:
    """Runs the command line; returns the exit status: 0, 2 for a UserError, 130 for Ctrl-C."""
    if "--help" in argv or "-h" in argv:
        print(__doc__)
        return 0
    _quiet_libraries()
    try:
        _run(argv)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command resumes from the last checkpoint", file=sys.stderr)
        return 130
    return 0


def _run(argv: Sequence[str]) -> None:
    # Flags of its own, not absl's global ones: `cli` can be called twice in a process.
    flag_values = flags.FlagValues()
    workdir = flags.DEFINE_string("workdir", "", "results go here", flag_values=flag_values)
    distributed = flags.DEFINE_bool(
        "distributed", False, "initialize jax.distributed", flag_values=flag_values
    )
    config = config_flags.parse(flag_values, argv)
    if config.job not in JOBS:
        raise UserError(f"config.job is {config.job!r}; the jobs are {', '.join(JOBS)}")
    multi_process = distributed.value or config.get("distributed", False)
    if multi_process and config.job not in DISTRIBUTED_JOBS:
        raise UserError(f"--distributed is not for config.job={config.job}; leave it out")
    import jax  # imported late, so that a misspelt flag is answered at once

    from zerosearch_jax.parallel import distributed

    if multi_process:
        distributed.initialize()
    directory = workdir.value or default_workdir(config_flags.config_argument(argv))
    # What was compiled once need not be compiled again by a resumed or repeated run.
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # which JAX reads itself
        jax.config.update("jax_compilation_cache_dir", str(Path(directory).absolute() / "compiled"))
    job = importlib.import_module(f"zerosearch_jax.{JOBS[config.job]}")
    if multi_process:
        distributed.run(lambda: job.run(config, directory))
    else:
        job.run(config, directory)


def default_workdir(config_spec: str) -> str:
    """`configs/grpo.py:tiny` → `runs/grpo-tiny`."""
    path, _, preset = config_spec.partition(":")
    return str(Path("runs") / "-".join(filter(None, (Path(path).stem, preset))))


def _quiet_libraries() -> None:
    absl_logging.set_verbosity(absl_logging.WARNING)
    for library in ("jax", "orbax", "absl"):
        logging.getLogger(library).setLevel(logging.WARNING)


if __name__ == "__main__":
    sys.exit(cli(sys.argv))
