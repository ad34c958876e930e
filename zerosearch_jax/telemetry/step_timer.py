"""Measures how the time of a step divides into sections."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import jax

from zerosearch_jax.telemetry.metrics import METRICS


class StepTimer:
    """Seconds per section of a step.

    JAX dispatches work asynchronously, so a section counts only the time that the host waits. End
    a section by reading a value on the host. The time of a nested section is subtracted from the
    outer one, so the sections add up to no more than the step.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._began = clock()
        self._seconds: dict[str, float] = {}
        self._nested: list[float] = []  # for each open section, the seconds of its nested ones

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        """Times the block as metric `seconds/{name}` and names it in profiler traces.

        Raises:
          KeyError: the metric is not in telemetry/metrics.py.
        """
        metric = f"seconds/{name}"
        if metric not in METRICS:
            raise KeyError(f"not in telemetry/metrics.py: {metric}")
        began = self._clock()
        self._nested.append(0.0)
        try:
            with jax.profiler.TraceAnnotation(name):
                yield
        finally:
            spent = self._clock() - began
            own = spent - self._nested.pop()
            self._seconds[metric] = self._seconds.get(metric, 0.0) + own
            if self._nested:
                self._nested[-1] += spent

    def pop(self) -> dict[str, float]:
        """Returns the seconds of each section and `seconds/step`, and resets them."""
        now = self._clock()
        seconds = {**self._seconds, "seconds/step": now - self._began}
        self._began, self._seconds = now, {}
        return seconds
