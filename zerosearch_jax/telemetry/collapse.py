"""Watches an RL run's metrics for early signals of a collapse.

A collapse shows its signals in this order (arXiv 2512.04220): correct episodes become less likely
while the reward still rises; the entropy accelerates; the gradient norm surges; the reward drops.
Each signal compares windows of steps. The thresholds are heuristics: a signal is a reason to look
at the curves, not a proof, and no signal is no guarantee.

The watch only reports; the caller decides whether to stop the run.
"""

import math
from collections.abc import Mapping
from statistics import fmean, median

from zerosearch_jax.errors import UserError

# Signal → (metric, meaning), in the order in which a collapse shows them.
SIGNALS: dict[str, tuple[str, str]] = {
    "collapse/correct_loglik_falls": (
        "correct_loglik",
        "correct episodes become less likely although the reward holds",
    ),
    "collapse/entropy_accelerates": ("entropy", "the policy's entropy rises at a growing rate"),
    "collapse/grad_norm_surges": (
        "grad_norm",
        "the gradient norm grew to a multiple of its past",
    ),
    "collapse/reward_drops": ("reward", "the reward fell far below its best"),
}
ADVICE = (
    "try a lower optimizer.learning_rate, a higher kl.coef, a smaller loss.clip_high or, with "
    "several updates per step, loss.llds above 0; an earlier checkpoint may be better than the last"
)
ALARM_AT = 2  # one signal alone is often noise
REWARD_HELD = 0.1  # a smaller relative fall of the reward counts as noise


class CollapseWatch:
    """Comparison of the newest `window` steps with the windows before them.

    The table uses m for the mean over the newest `window` steps, m' for the window before it, and
    m'' for the window before that. The windows move with every step.

    | signal                 | holds when                                                         |
    |------------------------|--------------------------------------------------------------------|
    | `correct_loglik_falls` | m' − m > `loglik_fall`, and the reward held: its m ≥ m' − 0.1·m'   |
    | `entropy_accelerates`  | (m − m') − max(m' − m'', 0) > `entropy_rise`                       |
    | `grad_norm_surges`     | median > `grad_norm_ratio` · median of the previous window, if > 0 |
    | `reward_drops`         | m < `reward_share` · best mean of any window so far, if > 0        |

    The entropy must rise, and by more than before; the end of a fall does not count. No signal
    holds before 2·`window` steps, and the entropy's signal not before 3·`window` steps.

    A step may lack a metric, as `correct_loglik` without a correct episode. Means and medians then
    use the other steps; a window in which fewer than half of the steps have the metric gives no
    signal. NaN or ±inf gives the metric's signal in that step, even in the first one, and does not
    enter means and medians.

    The default thresholds have a margin over the extremes of seven healthy runs of the embedded
    example (14 to 18 steps, windows of 5 and 7), which are given below as "healthy".

    Args:
      window: steps per window: about 10 for steps of 100 episodes, more for fewer episodes. In a
        run shorter than two windows, only values that are not finite give signals.
      loglik_fall: nats per policy token; healthy: up to 0.012.
      entropy_rise: nats per policy token; healthy: up to 0.011.
      grad_norm_ratio: ratio of medians; healthy: up to 1.3.
      reward_share: share of the best window; healthy: 0.78 or more at the end. The best window is
        partly luck, and the curriculum gets harder.

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
            raise UserError(f"config.watch.window must be at least 1 step, not {window}")
        self._window = window
        self._loglik_fall = loglik_fall
        self._entropy_rise = entropy_rise
        self._grad_norm_ratio = grad_norm_ratio
        self._reward_share = reward_share
        self._rows: list[dict[str, float]] = []  # the newest 3 windows
        self._best_reward = -math.inf
        self._reported: set[str] = set()
        self._alarm: str | None = None

    def update(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Adds one step's metrics and returns which signals hold now.

        After a resume, first pass the rows of all earlier steps (`recorder.earlier_rows`).
        Signals and alarms then equal those of the uninterrupted run.

        Args:
          metrics: metrics by name; metrics without a signal are ignored.

        Returns:
          1.0 or 0.0 for each of `SIGNALS`, and their sum as `collapse/signals`.
        """
        row = {name: float(metrics[name]) for name, _ in SIGNALS.values() if name in metrics}
        self._rows = [*self._rows, row][-3 * self._window :]
        found = self._compare_windows()
        holding = {
            signal
            for signal, (metric, _) in SIGNALS.items()
            if found[signal] or not math.isfinite(row.get(metric, 0.0))
        }
        self._update_alarm(holding)
        signals = {signal: float(signal in holding) for signal in SIGNALS}
        return signals | {"collapse/signals": float(len(holding))}

    def alarm(self) -> str | None:
        """Returns the alarm of the last `update`, at most 6 lines, or None.

        An alarm needs two signals or more, of which one is new, so a lasting collapse gives at
        most three alarms. Signals count as new again once no signal holds.
        """
        return self._alarm

    def _update_alarm(self, holding: set[str]) -> None:
        self._alarm = None
        if not holding:
            self._reported = set()
        elif len(holding) >= ALARM_AT and not holding <= self._reported:
            self._reported |= holding
            meanings = [
                f"  {signal}: {meaning}"
                for signal, (_, meaning) in SIGNALS.items()
                if signal in holding
            ]
            head = f"WARNING: {len(holding)} of {len(SIGNALS)} early signals of a collapse"
            self._alarm = "\n".join([head, *meanings, ADVICE])

    def _compare_windows(self) -> dict[str, bool]:
        """Returns whether each of `SIGNALS` holds, without regard to values that are not finite.

        A missing window has a NaN mean. Every comparison with NaN is false, so it gives no signal.
        """
        reward, reward_before = self._mean("reward"), self._mean("reward", 1)
        self._best_reward = max(self._best_reward, reward)
        loglik_fall = self._mean("correct_loglik", 1) - self._mean("correct_loglik")
        reward_held = reward >= reward_before - REWARD_HELD * reward_before
        entropies = [self._mean("entropy", back) for back in range(3)]
        rise, rise_before = entropies[0] - entropies[1], entropies[1] - entropies[2]
        norms = [median(self._finite("grad_norm", back) or [math.nan]) for back in range(2)]
        past_reward = self._best_reward > 0 and len(self._rows) >= 2 * self._window
        return {
            "collapse/correct_loglik_falls": loglik_fall > self._loglik_fall and reward_held,
            "collapse/entropy_accelerates": (
                rise > self._entropy_rise and rise - rise_before > self._entropy_rise
            ),
            "collapse/grad_norm_surges": (
                norms[1] > 0 and norms[0] > self._grad_norm_ratio * norms[1]
            ),
            "collapse/reward_drops": (
                past_reward and reward < self._reward_share * self._best_reward
            ),
        }

    def _mean(self, name: str, back: int = 0) -> float:
        """Returns the mean over the window `back` windows before the newest; NaN without it."""
        return fmean(self._finite(name, back) or [math.nan])

    def _finite(self, name: str, back: int = 0) -> list[float]:
        """Returns finite values of the window `back` windows before the newest; [] if too few."""
        end = len(self._rows) - back * self._window
        start = end - self._window
        if start < 0:
            return []
        values = [row[name] for row in self._rows[start:end] if name in row]
        finite = [value for value in values if math.isfinite(value)]
        return finite if 2 * len(finite) >= self._window else []
