"""Runs one job: python -m zerosearch_jax.main --config=configs/grpo.py [flags]

  --config=FILE.py[:PRESET]  config file and preset, listed below
  --config.rl.steps=20       overrides one value; unknown keys are refused
  --workdir=DIR              directory of results, checkpoints and logs (default
                             runs/CONFIG[-PRESET]); the same command on it resumes
  --describe                 prints every key with its type, value and documentation
  --profile=STEP[,STEP]      writes a jax.profiler trace of these steps (jobs rl and sft)
  --export=STEP              writes the model of a kept checkpoint as a Hugging Face directory and
                             ends (jobs rl and sft); STEP is a number, best or latest
  --distributed              runs one of several processes: on a TPU slice, or with
                             JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID set

Exit status: 0 success, 1 program error, 2 input, config or disk error, 130 Ctrl-C, 141 closed
output (a pipe without a reader), 143 SIGTERM.
The docstring of a config file says what it needs and how long it takes. The sections of a config
are documented in zerosearch_jax/training/; --describe shows them with their values.
"""

import importlib
import io
import logging
import os
import re
import signal
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

from absl import flags
from absl import logging as absl_logging
from ml_collections import ConfigDict

from zerosearch_jax import config_flags
from zerosearch_jax.errors import (
    UNPRINTABLE,
    Terminated,
    UserError,
    disk_error,
    error_line,
    one_line,
    shown,
)
from zerosearch_jax.ranges import MAX_INT
from zerosearch_jax.training.workdir import locked

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
"""Job: its module below zerosearch_jax."""
CONFIGS = {
    "rl": "training.config.RLConfig",
    "sft": "training.job_configs.SFTConfig",
    "evaluate": "training.job_configs.EvaluateConfig",
    "collect": "training.job_configs.CollectConfig",
    "simulator_report": "training.job_configs.SimulatorReportConfig",
    "miniature": "experiments.config.MiniatureConfig",
    "algorithms": "experiments.config.AlgorithmsConfig",
    "compile": "tpu_aot.config.CompileConfig",
    "bench/rollout": "benchmarks.config.RolloutBenchConfig",
    "bench/decode": "benchmarks.config.DecodeBenchConfig",
    "bench/bandwidth": "benchmarks.config.BandwidthBenchConfig",
    "bench/learner": "benchmarks.config.LearnerBenchConfig",
    "bench/mfu": "benchmarks.config.MFUBenchConfig",
}
"""Job, or job/suite: the dataclass of its config."""
CLOSED_OUTPUT = 128 + signal.SIGPIPE  # 141, the status that a shell reports
PROCESS_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def cli(argv: Sequence[str]) -> int:
    """Runs the command line; returns the exit status.

    0: success. 2: a UserError or a disk error that the user can fix, printed as one line. 130:
    Ctrl-C. 141: a pipe without a reader, such as `| head -1`. 143: SIGTERM, after the jobs rl and
    sft have saved their state. Other errors are raised, and Python then exits with 1.
    """
    _prepare_output()
    _quiet_libraries()
    status = _exit_status(argv)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # Python flushes again at its exit, and would then exit with 120
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return status


def _exit_status(argv: Sequence[str]) -> int:
    try:
        if "--help" in argv or "-h" in argv:
            print(f"{__doc__}\n{_list_configs(Path('configs'))}")
        else:
            _run(argv)
        print(end="", flush=True)
    except UserError as error:
        _report(error_line(error))
        return 2
    except BrokenPipeError:
        return CLOSED_OUTPUT
    except KeyboardInterrupt:
        _report("stopped; the same command resumes from the last checkpoint")
        return 130
    except Terminated:
        _report("terminated; the same command resumes")
        return Terminated.EXIT_STATUS
    except Exception as error:
        if not (line := disk_error(error)):
            raise
        _report(f"error: {line}")
        return 2
    return 0


def _report(line: str) -> None:
    with suppress(OSError):  # the exit status still reports the error
        print(line, file=sys.stderr, flush=True)


def _run(argv: Sequence[str]) -> None:
    # Local flag values instead of absl's global ones: `cli` can run twice in a process.
    values = flags.FlagValues()
    workdir = flags.DEFINE_string("workdir", "", "directory of results", flag_values=values)
    multi_process = flags.DEFINE_bool("distributed", False, "one of several", flag_values=values)
    describe = flags.DEFINE_bool("describe", False, "print the config", flag_values=values)
    profile = flags.DEFINE_string("profile", "", "steps to trace", flag_values=values)
    export = flags.DEFINE_string("export", "", "checkpoint to export", flag_values=values)
    config = config_flags.parse(values, argv)
    job = config.get("job")
    if job not in tuple(JOBS):  # not `in JOBS`: a list is not hashable
        raise UserError(f"config.job is {shown(job)}; the jobs are {', '.join(JOBS)}")
    typed = config_flags.typed(config_class(config), config)
    if describe.value:
        print(config_flags.describe(typed))
        return
    of_training = ("rl", "sft")
    for flag, jobs in ((multi_process, ("rl",)), (profile, of_training), (export, of_training)):
        if flag.value and config.job not in jobs:
            raise UserError(f"--{flag.name} is not for config.job={config.job}; leave it out")
    options = {"profile_steps": profile_steps(profile.value)} if profile.value else {}
    check_export(export.value)
    processes = distributed_arguments(os.environ) if multi_process.value else None
    directory = workdir.value or default_workdir(config_flags.split_config(argv)[0])
    if UNPRINTABLE.search(directory):
        raise UserError(
            f"--workdir={shown(directory)} has a control character, a line break or a byte that is "
            "not UTF-8; give another --workdir"
        )
    if processes is None:  # a process that ends here would let the others wait
        from zerosearch_jax.training import inputs, validate

        validate.check(typed)
        if not export.value:  # an export reads no questions and no engines
            inputs.check_inputs(typed)
    job = partial(_run_job, config, directory, processes, export.value, options)
    if processes is not None or export.value:  # an export needs no lock
        job()
    else:
        with locked(directory):
            job()


def _run_job(
    config: ConfigDict,
    directory: str,
    processes: dict[str, str | int] | None,
    export: str,
    options: dict[str, Any],
) -> None:
    """Runs or exports a job; with several processes, the first one locks the workdir.

    Args:
      processes: result of `distributed_arguments`; None for a single process.
    """
    import jax  # imported late, so that a wrong config or a workdir in use is refused at once

    from zerosearch_jax.parallel import distributed

    if processes is not None:
        distributed.initialize(processes)
    # A resumed or repeated run reads the programs that an earlier run compiled.
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # JAX reads the variable itself
        jax.config.update("jax_compilation_cache_dir", str(Path(directory).absolute() / "compiled"))
    module = importlib.import_module(f"zerosearch_jax.{JOBS[config.job]}")

    if export:
        run = partial(module.export_checkpoint, config, directory, export)
    else:
        run = partial(module.run, config, directory, **options)
    if processes is None:
        return run()

    def on_every_process() -> None:
        writes = jax.process_index() == 0 and not export
        with locked(directory) if writes else nullcontext():
            run()

    distributed.run(on_every_process)


def config_class(config: ConfigDict) -> type:
    """Returns the dataclass of a job's config; UserError for an unknown suite."""
    name = config.job
    if name == "bench":
        suites = [key.partition("/")[2] for key in CONFIGS if key.startswith("bench/")]
        if config.get("suite") not in suites:
            raise UserError(
                f"config.suite is {shown(config.get('suite'))}; choose one of {', '.join(suites)}"
            )
        name = f"bench/{config.suite}"
    module, _, cls = CONFIGS[name].rpartition(".")
    return getattr(importlib.import_module(f"zerosearch_jax.{module}"), cls)


def profile_steps(value: str) -> tuple[int, ...]:
    """Returns the steps in the value of `--profile`; UserError if one is not a positive number."""
    steps = value.split(",")
    if not all(map(_is_step, steps)):
        raise UserError(
            f"--profile={one_line(value, 80)}: give steps from 1, separated by commas, such as 3,4"
        )
    return tuple(map(int, steps))


def check_export(value: str) -> None:
    """Raises UserError unless the value of `--export` is a step, `best`, `latest` or empty."""
    if value not in ("", "best", "latest") and not _is_step(value):
        raise UserError(f"--export={one_line(value, 80)}: give a step from 1, best or latest")


def _is_step(text: str) -> bool:
    return text.isdecimal() and len(text) <= 10 and 0 < int(text) <= MAX_INT


def distributed_arguments(environment: Mapping[str, str]) -> dict[str, str | int]:
    """Returns the arguments of `jax.distributed.initialize` that `PROCESS_VARIABLES` define.

    Without the variables the result is empty, and JAX detects the processes of a TPU slice.

    Raises:
      UserError: only some of the variables are set, or their values are not valid.
    """
    given = [name for name in PROCESS_VARIABLES if name in environment]
    if not given:
        return {}
    if given != list(PROCESS_VARIABLES):
        missing = " and ".join(name for name in PROCESS_VARIABLES if name not in given)
        raise UserError(f"{given[0]} is in the environment, {missing} is not; set all or none")
    address, count, index = (environment[name] for name in PROCESS_VARIABLES)
    matched = re.fullmatch(r"(?:[\w.-]+|\[[0-9A-Fa-f:.]+\]):([0-9]{1,5})", address)
    if not matched or not 0 < int(matched[1]) < 2**16:
        raise UserError(
            f"JAX_COORDINATOR_ADDRESS={one_line(address, 80)} must be HOST:PORT of process 0, "
            "such as 10.0.0.1:1234"
        )
    if not (_is_step(count) and int(count) <= 2**16):
        raise UserError(f"JAX_NUM_PROCESSES={one_line(count, 80)} must be from 1 to {2**16}")
    if not ((index == "0" or _is_step(index)) and int(index) < int(count)):
        raise UserError(
            f"JAX_PROCESS_ID={one_line(index, 80)} must be a number below JAX_NUM_PROCESSES={count}"
        )
    return dict(coordinator_address=address, num_processes=int(count), process_id=int(index))


def default_workdir(config_spec: str) -> str:
    """Returns the workdir of a config: `runs/grpo-tiny` for `configs/grpo.py:tiny`."""
    path, _, preset = config_spec.partition(":")
    return str(Path("runs") / "-".join(filter(None, (Path(path).stem, preset))))


def _list_configs(directory: Path) -> str:
    """Every config file of the directory with its presets and its first line."""
    lines = []
    for path in sorted(directory.glob("*.py")):
        doc = config_flags.load_module(path).__doc__ or ""
        lines.append(f"  {str(path):28} {doc.partition(chr(10))[0]}")
        if names := config_flags.presets(path):
            lines.append(f"  {'':28} presets: {', '.join(names)}")
    return "\n".join([f"Config files in {directory}:", *lines])


def _prepare_output() -> None:
    """Opens closed standard streams, and lets them print text that they cannot encode.

    Otherwise a job's file would get the descriptor of a closed stream, and libraries would log into
    that file.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 (open until the process ends)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _quiet_libraries() -> None:
    absl_logging.set_verbosity(absl_logging.WARNING)
    for library in ("jax", "orbax", "absl"):
        logging.getLogger(library).setLevel(logging.WARNING)


if __name__ == "__main__":
    sys.exit(cli(sys.argv))
