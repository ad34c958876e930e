"""How long the devices had work, seen from the host: the rest of a step they waited for Python."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class DeviceClock:
    """Sums the time from a first dispatch to the moment when all that was dispatched is done.

    One clock serves all programs that share the devices. Work that ends before its result is
    asked for counts until then, so the sum is an upper bound.
    """

    def __init__(self):
        self._secs = 0.0
        self._since: float | None = None

    def started(self) -> None:
        """Call before a program is dispatched."""
        if self._since is None:
            self._since = time.monotonic()

    def drained(self) -> None:
        """Call when the results of everything dispatched are there."""
        if self._since is not None:
            self._secs += time.monotonic() - self._since
            self._since = None

    @contextmanager
    def working(self) -> Iterator[None]:
        """Around a block that dispatches work and reads all of its results."""
        self.started()
        yield
        self.drained()

    def take(self) -> float:
        """Seconds since the last call of `take`; work still under way counts at the next."""
        secs, self._secs = self._secs, 0.0
        return secs
