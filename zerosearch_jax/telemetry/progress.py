"""Shows a run's progress: a bar on a terminal, one plain line a step elsewhere.

It formats figures and knows nothing of what they measure.
"""

import sys
import time
from collections.abc import Callable, Mapping
from typing import TextIO

from tqdm import tqdm

# The figures worth a glance, in this order, under names short enough for one line.
SHOWN: dict[str, str] = {
    "reward": "reward",
    "em": "em",
    "loss/total": "loss",
    "p_noisy": "p_noisy",
    "searches_per_episode": "searches",
    "kl": "kl",
}


class Progress:
    """Progress over steps `first_step` … `total`.

    Args:
      total: the run's number of steps.
      first_step: steps already done before this run (a resumed run).
      stream: where to write; standard output by default.
      clock: seconds, from any origin.
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

    def update(self, done: int, figures: Mapping[str, float]) -> None:
        """Shows that `done` steps are finished, with the figures of the last one."""
        text = " ".join(f"{short} {figures[n]:.3g}" for n, short in SHOWN.items() if n in figures)
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(done - self._bar.n)
            return
        now = self._clock()
        each = (now - self._began) / max(done - self._first, 1)
        eta = _minutes(each * (self._total - done))
        seconds, self._last = now - self._last, now
        self._print(f"step {done}/{self._total} {text} | {seconds:.1f} s/step eta {eta}")

    def note(self, text: str) -> None:
        """Prints lines above the bar."""
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        else:
            self._print(text)

    def close(self) -> None:
        """Leaves the bar as it is and ends its line."""
        if self._bar is not None:
            self._bar.close()

    def _print(self, text: str) -> None:
        print(text, file=self._stream, flush=True)


def _minutes(seconds: float) -> str:
    """`190.2` → `3:10`; from an hour on `1:02:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
