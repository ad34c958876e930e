"""Decides after every step of an RL run: continue, roll back, finish or stop."""

import math
from collections.abc import Iterable, Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import Any

from zerosearch_jax.errors import UserError
from zerosearch_jax.telemetry.collapse import CollapseWatch
from zerosearch_jax.training.config import PlateauConfig, RLConfig
from zerosearch_jax.training.nonfinite import NonFiniteCounter


class Decision(Enum):
    """How a run goes on after a step. Every decision but `CONTINUE` saves a checkpoint."""

    CONTINUE = "continue"
    ROLL_BACK = "roll back"
    """Continue from the best checkpoint with lower learning rates."""
    FINISH = "finish"
    """End training, export and evaluate: the evaluations are on a plateau."""
    STOP = "stop"
    """End the run with an error, if a step is left (`RunMonitor.raise_if_stopped`)."""


class Plateau:
    """Counts evaluations in a row without a gain; see `PlateauConfig`."""

    def __init__(self, config: PlateauConfig):
        self._config = config
        self._best = -math.inf
        self._without_gain = 0

    def update(self, score: float) -> None:
        """Adds an evaluation. A gain that is too small does not raise the best score."""
        if score > self._best + self._config.min_gain:
            self._best, self._without_gain = score, 0
        else:
            self._without_gain += 1

    def restart(self) -> None:
        """Starts the count at 0 again, but keeps the best score."""
        self._without_gain = 0

    @property
    def reached(self) -> bool:
        """Whether training should end."""
        return 0 < self._config.patience <= self._without_gain


class RunMonitor:
    """Decisions of a run, from the metrics of its steps.

    The first row that applies decides:

    | decision  | reason                                                                     |
    |-----------|----------------------------------------------------------------------------|
    | STOP      | `watch.nonfinite_limit` updates in a row were skipped                      |
    | ROLL_BACK | a collapse alarm, `watch.action=rollback`, below `watch.max_rollbacks`     |
    | STOP      | a collapse alarm, and `watch.action` is `stop` or there is no rollback left |
    | FINISH    | the plateau of `rl.stop_when`                                              |
    | CONTINUE  | otherwise                                                                  |

    After a rollback the collapse watch and the plateau's count start again, because the earlier
    rows belong to another policy. Step numbers, questions and curriculum go on.

    Args:
      workdir: directory of the run.
      kept: `kept()` of the checkpoint that the run resumes from.
      rows: metrics of the steps before a resume. The decisions then equal those of the
        uninterrupted run.

    Attributes:
      decision: the decision after the last step.
      nonfinite: counts the skipped updates.
      rollbacks: rollbacks so far.
    """

    def __init__(
        self,
        config: RLConfig,
        workdir: Path,
        kept: Mapping[str, Any],
        rows: Iterable[Mapping[str, float]] = (),
    ):
        self._config, self._steps = config.watch, config.rl.steps
        self._workdir = workdir
        self._watch = CollapseWatch(window=config.watch.window)
        self._plateau = Plateau(config.rl.stop_when)
        skipped = kept.get("skipped_in_a_row", 0)
        self.nonfinite = NonFiniteCounter(workdir, config.watch.nonfinite_limit, skipped)
        self.rollbacks, seen = kept.get("rollbacks", 0), 0.0
        for row in rows:
            self._observe(row)
            if row.get("rollbacks", 0.0) > seen:
                seen = row["rollbacks"]
                self._restart()
        self._alarm: str | None = None
        self.decision = Decision.FINISH if self._plateau.reached else Decision.CONTINUE

    def steps(self, first: int) -> Iterator[int]:
        """Yields the steps to run, from `first` to the last of `rl.steps` or to a plateau."""
        for step in range(first, self._steps):
            if self.decision is Decision.FINISH:
                return
            yield step

    def kept(self) -> dict[str, Any]:
        """Metadata for checkpoints."""
        return {"skipped_in_a_row": self.nonfinite.in_a_row, "rollbacks": self.rollbacks}

    @property
    def rate_scale(self) -> float:
        """Factor of all learning rates."""
        return self._config.rollback_rate_factor**self.rollbacks

    def decide(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Sets `decision` from a step's metrics; returns the metrics that the monitor adds."""
        signals = self._observe(metrics)
        self._alarm, action = self._watch.alarm(), self._config.action
        self.decision = Decision.CONTINUE
        if self.nonfinite.limit_reached:
            self.decision = Decision.STOP
        elif self._alarm and action == "rollback" and self.rollbacks < self._config.max_rollbacks:
            self.decision = Decision.ROLL_BACK
            self.rollbacks += 1
            self._restart()
        elif self._alarm and action != "log":
            self.decision = Decision.STOP
        elif self._plateau.reached:
            self.decision = Decision.FINISH
        return signals | {"rollbacks": float(self.rollbacks)}

    def report(self, done: int) -> None:
        """Prints the alarm or the plateau of step `done`, counted from 1."""
        if self._alarm:
            print(f"\nstep {done}: {self._alarm}", flush=True)
        if self.decision is Decision.FINISH:
            print(f"\nstep {done}: eval/em is on a plateau (rl.stop_when); training ends")

    def raise_if_stopped(self, done: int) -> None:
        """Raises UserError if the decision of step `done` is to stop: why, and how to continue.

        After the last step it raises nothing, so that the run ends like a resumed run.
        """
        if done == self._steps:
            return
        if self.nonfinite.limit_reached:
            self.nonfinite.raise_error(done - 1)
        if self.decision is Decision.STOP:
            spent = f" after {self.rollbacks} rollbacks" if self._config.action != "stop" else ""
            raise UserError(
                f"stopped after step {done}: the metrics show a collapse{spent} and "
                f"config.watch.action={self._config.action}; the checkpoint and metrics.jsonl are "
                f"in {self._workdir}. To continue: --config.watch.action=log"
            )

    def _observe(self, metrics: Mapping[str, float]) -> dict[str, float]:
        if "eval/em" in metrics:
            self._plateau.update(metrics["eval/em"])
        return self._watch.update(metrics)

    def _restart(self) -> None:
        self._watch = CollapseWatch(window=self._config.window)
        self._plateau.restart()
