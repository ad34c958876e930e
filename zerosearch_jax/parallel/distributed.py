"""Multi-process setup: initialises jax.distributed, keeps stdout on process 0, exits together.

When one process fails, all processes exit.
"""

import os
import sys
import traceback
from collections.abc import Callable, Mapping

import jax
from jax.experimental import multihost_utils

from zerosearch_jax.errors import Terminated, UserError, disk_error

VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
HEARTBEAT_SECS = 30  # after this silence a process counts as dead, and the others exit


def initialize() -> None:
    """Initialises jax.distributed from `VARIABLES`, or from the TPU slice if none is set.

    From then on only process 0 has a standard output; every process writes errors.

    Raises:
      UserError: only some of the variables are set, or their values are not valid numbers.
    """
    arguments = distributed_arguments(os.environ)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(**arguments, heartbeat_timeout_seconds=HEARTBEAT_SECS)
    if jax.process_index() != 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (open until the process ends)


def distributed_arguments(environment: Mapping[str, str]) -> dict[str, str | int]:
    """Returns the arguments of `jax.distributed.initialize` that `VARIABLES` define.

    Without the variables the result is empty, and JAX detects the processes of a TPU slice.

    Raises:
      UserError: only some of the variables are set, or their values are not valid numbers.
    """
    given = [name for name in VARIABLES if name in environment]
    if not given:
        return {}
    if given != list(VARIABLES):
        missing = " and ".join(name for name in VARIABLES if name not in given)
        raise UserError(f"{given[0]} is in the environment, {missing} is not; set all or none")
    address, count, index = (environment[name] for name in VARIABLES)
    if not (count.isdecimal() and index.isdecimal() and int(index) < int(count)):
        raise UserError(f"JAX_PROCESS_ID={index} must be a number below JAX_NUM_PROCESSES={count}")
    return dict(coordinator_address=address, num_processes=int(count), process_id=int(index))


def run(job: Callable[[], None]) -> None:
    """Calls `job`, then waits until every process has finished.

    On error, exits immediately with the code a single-process run would return. A normal
    interpreter shutdown would deadlock with the other processes.
    """
    try:
        job()
        multihost_utils.sync_global_devices("process 0 has written all files")
    except UserError as error:
        _exit(2, f"error: {error}")
    except KeyboardInterrupt:
        _exit(130, "stopped; the same command resumes from the last checkpoint")
    except Terminated:
        _exit(Terminated.EXIT_STATUS, "terminated; the same command resumes")
    except Exception as error:
        if line := disk_error(error):
            _exit(2, f"error: {line}")
        _exit(1, traceback.format_exc())


def _exit(code: int, message: str) -> None:
    print(f"process {jax.process_index()}: {message}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(code)
