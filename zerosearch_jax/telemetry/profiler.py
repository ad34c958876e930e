"""Writes `jax.profiler` traces of chosen training steps; docs/profiling.md explains them."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax

from zerosearch_jax.parallel.processes import gather


class Profiler:
    """Traces of the training steps `steps`.

    The trace of step 3 is in `directory / "step_000003"`. On each host, one process writes its
    trace. With several processes, every process must construct the profiler.
    """

    def __init__(self, steps: tuple[int, ...], directory: Path) -> None:
        self._steps = steps
        self._directory = directory
        hosts = gather([socket.gethostname()])
        self._writes = hosts.index(hosts[jax.process_index()]) == jax.process_index()

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Marks the block as training step `number`, and traces it if the step is listed."""
        traced = self._writes and number in self._steps
        if traced:
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # an event per call would dominate the trace
            path = self._directory / f"step_{number:06}"
            jax.profiler.start_trace(path, profiler_options=options)
        try:
            with jax.profiler.StepTraceAnnotation("train", step_num=number):
                yield
        finally:
            if traced:
                jax.profiler.stop_trace()
