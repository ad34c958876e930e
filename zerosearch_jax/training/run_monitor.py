"""Decides after every step of an RL run whether the run continues or stops."""

from collections.abc import Iterable, Mapping
from enum import Enum
from pathlib import Path

from zerosearch_jax.errors import UserError
from zerosearch_jax.telemetry.collapse import CollapseWatch
from zerosearch_jax.training.config import RLConfig
from zerosearch_jax.training.nonfinite import NonFiniteCounter


class Decision(Enum):
    """How a run goes on after a step."""

    CONTINUE = "continue"
    STOP = "stop"
    """Save a checkpoint; then `RunMonitor.report` raises."""


class RunMonitor:
    """Decisions of a run, from the metrics of its steps.

    Args:
      workdir: directory of the run.
      skipped_in_a_row: consecutive skipped updates before a resume.
      rows: metrics of the steps before a resume; the decisions then equal those of the
        uninterrupted run.

    Attributes:
      decision: the decision of the last step.
      nonfinite: counts the skipped updates.
    """

    def __init__(
        self,
        config: RLConfig,
        workdir: Path,
        skipped_in_a_row: int,
        rows: Iterable[Mapping[str, float]],
    ):
        self._config = config.watch
        self._workdir = workdir
        self._watch = CollapseWatch(window=config.watch.window)
        self.nonfinite = NonFiniteCounter(workdir, config.watch.nonfinite_limit, skipped_in_a_row)
        self.decision = Decision.CONTINUE
        for row in rows:
            self._watch.update(row)

    def decide(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Sets `decision` from the metrics of a step; returns the metrics that the monitor adds."""
        signals = self._watch.update(metrics)
        stopping = self.nonfinite.limit_reached or (self._config.stop and self._watch.alarm())
        self.decision = Decision.STOP if stopping else Decision.CONTINUE
        return signals

    def report(self, done: int) -> None:
        """Prints an alarm of step `done`, counted from 1.

        Raises:
          UserError: the decision is to stop. The message says why and how to continue.
        """
        if self._watch.alarm():
            print(f"\nstep {done}: {self._watch.alarm()}", flush=True)
        if self.nonfinite.limit_reached:
            self.nonfinite.raise_error(done - 1)
        if self.decision is Decision.STOP:
            raise UserError(
                f"stopped after step {done}: the metrics show a collapse and "
                f"config.watch.stop=True; the checkpoint and metrics.jsonl are in {self._workdir}. "
                "To continue: --config.watch.stop=False"
            )
