"""Multi-process setup: initialises jax.distributed, keeps stdout on process 0, exits together.

When one process fails, all processes exit.
"""

import os
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping

import jax
from jax.experimental import multihost_utils

from zerosearch_jax.errors import (
    Terminated,
    UserError,
    disk_error,
    error_line,
    named_errors,
    reason,
)

HEARTBEAT_SECS = 30  # after this silence a process counts as dead, and the others exit
START_SECS = 300  # the longest wait for process 0, as in JAX


def initialize(arguments: Mapping[str, str | int]) -> None:
    """Initialises jax.distributed, from the TPU slice if `arguments` is empty.

    From then on only process 0 has a standard output; every process writes errors.

    Args:
      arguments: coordinator_address, num_processes and process_id, or nothing.

    Raises:
      UserError: JAX detects no processes, or process 0 cannot be reached.
    """
    if arguments.get("process_id"):
        _wait_for_coordinator(str(arguments["coordinator_address"]), START_SECS)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    with named_errors(
        "--distributed",
        "set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, or run on a TPU slice",
    ):
        jax.distributed.initialize(**arguments, heartbeat_timeout_seconds=HEARTBEAT_SECS)
    if jax.process_index() != 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (open until the process ends)


def _wait_for_coordinator(address: str, secs: float) -> None:
    """Waits until `address` accepts connections, because JAX aborts the process if it does not.

    Raises:
      UserError: it accepts none within `secs` seconds.
    """
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + secs
    while True:
        try:
            return socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
        except OSError as error:
            if time.monotonic() > deadline:
                raise UserError(
                    f"JAX_COORDINATOR_ADDRESS={address}: process 0 cannot be reached "
                    f"({reason(error)}); start it, or fix the address"
                ) from error
        time.sleep(min(1.0, secs))


def run(job: Callable[[], None]) -> None:
    """Calls `job`, then waits until every process has finished.

    On error, exits immediately with the code a single-process run would return. A normal
    interpreter shutdown would deadlock with the other processes.
    """
    try:
        job()
        multihost_utils.sync_global_devices("process 0 has written all files")
    except UserError as error:
        _exit(2, error_line(error))
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
