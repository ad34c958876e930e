"""Watches an RL run's figures for the early warnings of a collapse.

A collapse announces itself in an order (arXiv 2512.04220): correct episodes become less likely
while the reward still rises; the entropy accelerates; the gradient norm surges; the reward drops.
Each warning is a comparison of windows of steps. The thresholds are heuristics: a warning is a
reason to look at the curves, not a proof, and its absence promises nothing.

This module knows the glossary's names and plain numbers; it knows no config and stops no run.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean, median

from zerosearch_jax.errors import UserError

# Signal → (the figure it watches, what it means), in the order in which a collapse shows them.
SIGNALS: dict[str, tuple[str, str]] = {
    "collapse/correct_loglik_falls": (
        "correct_loglik",
        "correct episodes become less likely although the reward holds",
    ),
    "collapse/entropy_accelerates": ("entropy", "the policy's entropy rises faster and faster"),
    "collapse/grad_norm_surges": ("grad_norm", "the gradients have grown to a multiple"),
    "collapse/reward_drops": ("reward", "the policy loses what it had learnt"),
}
ADVICE = (
    "try a lower optimizer.learning_rate, a higher kl.coef, a smaller loss.clip_high or, with several updates "
    "a step, loss.llds above 0; an earlier checkpoint may be better than the last one"
)
ALARM_AT = 2  # one signal alone is often noise
REWARD_HELD = 0.1  # a fall of the reward by less than this share of itself is taken for noise


class CollapseWatch:
    """Compares the newest `window` steps with the windows before them, one `update` a step.

    Below, m is the mean over the newest `window` steps, m' over the `window` steps before those,
    m'' over the ones before those; the windows move with every step.

    | signal                 | holds when                                                        |
    |------------------------|-------------------------------------------------------------------|
    | `correct_loglik_falls` | m' − m > `loglik_fall`, and the reward held: its m ≥ m' − 0.1·m'   |
    | `entropy_accelerates`  | (m − m') − max(m' − m'', 0) > `entropy_rise`                      |
    | `grad_norm_surges`     | median > `grad_norm_ratio` · median of the window before, if > 0  |
    | `reward_drops`         | m < `reward_share` · best mean of any window so far, if > 0       |

    So an entropy whose fall ends does not count, only one that rises, and by more than before.
    No signal holds before 2·`window` steps, the entropy's not before 3·`window` steps.

    A figure may be missing: a mean is taken over the steps that have it, and where fewer than
    half of a window's steps do, what needs that window does not hold. Leave `correct_loglik` out
    where a step had no correct episode. NaN or ±inf is never healthy: its own signal holds in
    that step, from the first step on; means and medians leave the value out.

    The defaults stand well clear of what seven healthy runs of the embedded example (14 to 18
    steps, windows of 5 and 7) showed at most, given below as "healthy".

    Args:
      window: steps in a window. About 10 for steps of 100 episodes; more for fewer episodes. In
        a run shorter than two windows no signal can hold, but for figures that are not finite.
      loglik_fall: nats per policy token; healthy 0.012.
      entropy_rise: nats per policy token; healthy windows rose by 0.011.
      grad_norm_ratio: healthy 1.3.
      reward_share: healthy runs ended at 0.78 of their best window or above, for the best is
        partly luck and the curriculum gets harder.

    Raises:
      UserError: `window` is below 1.
    """

    def __init__(
        self,
        *,
        window: int,
        loglik_fall: float = 0.05,
        entropy_rise: float = 0.05,
        grad_norm_ratio: float = 2.0,
        reward_share: float = 0.6,
    ) -> None:
        if window < 1:
            raise UserError(f"the collapse watch needs a window of at least 1 step, not {window}")
        self._window = window
        self._loglik_fall = loglik_fall
        self._entropy_rise = entropy_rise
        self._grad_norm_ratio = grad_norm_ratio
        self._reward_share = reward_share
        self._rows: list[dict[str, float]] = []  # the newest 3 windows
        self._best_reward = -math.inf
        self._told: set[str] = set()
        self._alarm: str | None = None

    def update(self, figures: Mapping[str, float]) -> dict[str, float]:
        """Takes one step's figures; returns which signals hold now.

        After a resume, feed the rows of the steps before it first (`earlier_rows`): signals and
        alarms are then those of the uninterrupted run.

        Args:
          figures: by the glossary's names; those that are not watched are ignored.

        Returns:
          1.0 or 0.0 for each of `SIGNALS`, and their number as `collapse/signals`.
        """
        row = {name: float(figures[name]) for name, _ in SIGNALS.values() if name in figures}
        self._rows = [*self._rows, row][-3 * self._window :]
        reward = self._mean("reward")
        if reward is not None:
            self._best_reward = max(self._best_reward, reward)
        found = {
            "collapse/correct_loglik_falls": self._correct_loglik_falls(),
            "collapse/entropy_accelerates": self._entropy_accelerates(),
            "collapse/grad_norm_surges": self._grad_norm_surges(),
            "collapse/reward_drops": self._reward_drops(),
        }
        holding = {
            signal
            for signal, (figure, _) in SIGNALS.items()
            if found[signal] or not math.isfinite(row.get(figure, 0.0))
        }
        self._note(holding)
        signals = {signal: float(signal in holding) for signal in SIGNALS}
        return signals | {"collapse/signals": float(len(holding))}

    def alarm(self) -> str | None:
        """What to log loudly after the last `update`, at most 6 lines; None: nothing new.

        There is an alarm when two signals or more hold and one of them was not in an alarm yet,
        so a lasting collapse gives at most three. When no signal holds any more, all is forgotten
        and the next alarm may name them again.
        """
        return self._alarm

    def _note(self, holding: set[str]) -> None:
        self._alarm = None
        if not holding:
            self._told = set()
        elif len(holding) >= ALARM_AT and not holding <= self._told:
            self._told |= holding
            meanings = [
                f"  {signal}: {meaning}"
                for signal, (_, meaning) in SIGNALS.items()
                if signal in holding
            ]
            head = f"WARNING: {len(holding)} of {len(SIGNALS)} early signs of a collapse"
            self._alarm = "\n".join([head, *meanings, ADVICE])

    def _correct_loglik_falls(self) -> bool:
        new, old = self._mean("correct_loglik"), self._mean("correct_loglik", 1)
        reward, reward_before = self._mean("reward"), self._mean("reward", 1)
        if new is None or old is None or reward is None or reward_before is None:
            return False
        held = reward >= reward_before - REWARD_HELD * reward_before
        return old - new > self._loglik_fall and held

    def _entropy_accelerates(self) -> bool:
        new, old, oldest = (self._mean("entropy", back) for back in range(3))
        if new is None or old is None or oldest is None:
            return False
        return (new - old) - max(old - oldest, 0.0) > self._entropy_rise

    def _grad_norm_surges(self) -> bool:
        new, old = self._finite("grad_norm"), self._finite("grad_norm", 1)
        if not new or not old or median(old) <= 0:
            return False
        return median(new) > self._grad_norm_ratio * median(old)

    def _reward_drops(self) -> bool:
        new = self._mean("reward")
        if new is None or len(self._rows) < 2 * self._window or self._best_reward <= 0:
            return False
        return new < self._reward_share * self._best_reward

    def _mean(self, name: str, back: int = 0) -> float | None:
        values = self._finite(name, back)
        return fmean(values) if values else None

    def _finite(self, name: str, back: int = 0) -> list[float]:
        """Finite values of the window `back` windows before the newest; [] if too few."""
        end = len(self._rows) - back * self._window
        start = end - self._window
        if start < 0:
            return []
        values = [row[name] for row in self._rows[start:end] if name in row]
        finite = [value for value in values if math.isfinite(value)]
        return finite if 2 * len(finite) >= self._window else []


def earlier_rows(path: str | Path, first_step: int) -> list[dict[str, float]]:
    """The rows of a run's `metrics.jsonl` with `step` < `first_step`, in the file's order.

    A missing file has no rows; a last row cut by a kill is left out.

    Raises:
      UserError: a line is not JSON.
    """
    path = Path(path)
    if not path.exists():
        return []
    rows = []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        if not line.endswith("\n"):
            break
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {number}: not JSON ({error}); remove the line") from None
        if row["step"] < first_step:
            rows.append(row)
    return rows
