"""Being one of several processes that run one job: how they meet, who speaks, how all end."""

import os
import sys
import traceback
from types import ModuleType

import jax
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from zerosearch_jax.errors import UserError

VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
HEARTBEAT_SECS = 30  # a process that is silent for so long is dead, and the others end


def join() -> None:
    """Meets the other processes: those that `VARIABLES` name, without them a TPU slice's.

    From here on only the first process has a standard output; errors are shown by all.

    Raises:
      UserError: some of the variables are missing, or they are no numbers.
    """
    named = addressed(os.environ)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(**named, heartbeat_timeout_seconds=HEARTBEAT_SECS)
    if jax.process_index() != 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (until the process ends)


def addressed(environment) -> dict[str, str | int]:
    """`jax.distributed.initialize`'s arguments that `VARIABLES` give; none where none is set."""
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


def run(job: ModuleType, config: ConfigDict, workdir: str) -> None:
    """Runs the job. An error ends this process at once, with the status that it has alone.

    On its way out Python would wait for the other processes, which wait for this one.
    """
    try:
        job.run(config, workdir)
        multihost_utils.sync_global_devices("the first process has written everything")
    except UserError as error:
        _end(2, f"error: {error}")
    except KeyboardInterrupt:
        _end(130, "stopped; the same command resumes from the last checkpoint")
    except Exception:
        _end(1, traceback.format_exc())


def _end(status: int, message: str) -> None:
    print(f"process {jax.process_index()}: {message}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(status)
