"""Shows a run's progress: a bar on a terminal, one plain line per step elsewhere."""

import sys
import time
from collections.abc import Callable, Mapping
from typing import TextIO

from tqdm import tqdm

# Metric → short label. The metrics appear in this order.
SHOWN: dict[str, str] = {
    "reward": "reward",
    "em": "em",
    "loss/total": "loss",
    "p_noisy": "p_noisy",
    "searches_per_episode": "searches",
    "kl": "kl",
}


class Progress:
    """Progress of a run that has `first_step` steps behind it and ends after `total`.

    Args:
      total: number of steps of the whole run.
      first_step: steps that an earlier, resumed run has done.
      stream: destination; standard output by default.
      clock: returns seconds from any origin.
    """

    def __init__(
        self,
        total: int,
        first_step: int = 0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stream = stream or sys.stdout
        self._total = total
        self._first = first_step
        self._clock = clock
        self._began = self._last = clock()
        self._bar = None
        if self._stream.isatty():
            self._bar = tqdm(
                total=total, initial=first_step, file=self._stream, dynamic_ncols=True, unit="step"
            )

    def update(self, done: int, metrics: Mapping[str, float]) -> None:
        """Shows that `done` steps are finished, with the metrics of the last one."""
        text = " ".join(f"{label} {metrics[n]:.3g}" for n, label in SHOWN.items() if n in metrics)
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(done - self._bar.n)
            return
        now = self._clock()
        each = (now - self._began) / max(done - self._first, 1)
        eta = _minutes(each * (self._total - done))
        seconds, self._last = now - self._last, now
        line = f"step {done}/{self._total} {text} | {seconds:.1f} s/step eta {eta}"
        print(line, file=self._stream, flush=True)

    def close(self) -> None:
        """Keeps the bar on the screen and ends its line."""
        if self._bar is not None:
            self._bar.close()


def _minutes(seconds: float) -> str:
    """Formats seconds: `190.2` → `3:10`, `3723` → `1:02:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
