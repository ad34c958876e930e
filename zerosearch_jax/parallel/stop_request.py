"""Lets a run end at SIGTERM with its state saved.

Schedulers (Slurm, Kubernetes, preemptible TPUs) send SIGTERM some seconds before they kill.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from zerosearch_jax.errors import Terminated


class StopRequest(AbstractContextManager):
    """Records a SIGTERM that arrives within the block, instead of ending the process.

    The run reads `received` after each step, saves its state and raises `Terminated`. Work that
    changes no state, such as rollouts, runs in `interruptible` blocks. SIGTERM ends such a block at
    once. A second SIGTERM ends the process without saving. Use this class in the main thread.

    Attributes:
      received: whether this process got a SIGTERM.
    """

    def __init__(self) -> None:
        self.received = False
        self._raises = False

    def __enter__(self) -> "StopRequest":
        self._previous = signal.signal(signal.SIGTERM, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        signal.signal(signal.SIGTERM, self._previous)

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Raises `Terminated` in the block when SIGTERM arrives, or if it has arrived already."""
        self._raises = True
        try:
            if self.received:
                raise Terminated
            yield
        finally:
            self._raises = False

    def _handle(self, *_: Any) -> None:
        if self.received:
            os._exit(Terminated.EXIT_STATUS)
        self.received = True
        # Not print, whose lock the interrupted code may hold.
        os.write(2, b"\nSIGTERM: stopping with the state saved; a second SIGTERM ends at once\n")
        if self._raises:
            raise Terminated
