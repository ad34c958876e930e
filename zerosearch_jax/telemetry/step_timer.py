"""Adds up where a step's time goes. It knows the glossary's `seconds/…` names, not the phases."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from zerosearch_jax.telemetry.metrics import METRICS


class StepTimer:
    """Seconds by phase, from one `take` to the next.

    JAX returns before the device is done: a phase counts what the host waited for, so end it
    with a value read on the host. A phase inside another one is taken off the outer one, so
    the phases add up to no more than the step.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._began = clock()
        self._seconds: dict[str, float] = {}
        self._inner: list[float] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Counts the block as phase `name` ("rollout"); KeyError when the glossary lacks it."""
        metric = f"seconds/{name}"
        if metric not in METRICS:
            raise KeyError(f"not in telemetry/metrics.py: {metric}")
        began = self._clock()
        self._inner.append(0.0)
        try:
            yield
        finally:
            spent = self._clock() - began
            own = spent - self._inner.pop()
            self._seconds[metric] = self._seconds.get(metric, 0.0) + own
            if self._inner:
                self._inner[-1] += spent

    def take(self) -> dict[str, float]:
        """The seconds by phase since the last `take`, with `seconds/step`; starts anew."""
        now = self._clock()
        taken = {**self._seconds, "seconds/step": now - self._began}
        self._began, self._seconds = now, {}
        return taken
