"""Measures how long the devices have work; for the rest of a step they wait for the host."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class DeviceClock:
    """Sum of the periods between a first dispatch and the completion of all dispatched work.

    All programs that share the devices use one clock. Work that ends before its result is read
    counts until the read, so the sum is an upper bound.
    """

    def __init__(self):
        self._secs = 0.0
        self._since: float | None = None

    def started(self) -> None:
        """Starts a period, unless one is running; call it before dispatching a program."""
        if self._since is None:
            self._since = time.monotonic()

    def drained(self) -> None:
        """Ends the period; call it when the results of all dispatched work have been read."""
        if self._since is not None:
            self._secs += time.monotonic() - self._since
            self._since = None

    @contextmanager
    def working(self) -> Iterator[None]:
        """Counts a block that dispatches work and reads all of its results."""
        self.started()
        yield
        self.drained()

    def take(self) -> float:
        """Returns the seconds since the last `take` and resets the sum.

        A running period counts in the next sum.
        """
        secs, self._secs = self._secs, 0.0
        return secs
