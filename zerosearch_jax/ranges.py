"""Types of config fields, with the interval or the set of the allowed values.

A field `learning_rate: LearningRate` is documented and checked by its type.
`config_flags.typed` refuses any other value and names the full key.
"""

import math
from dataclasses import dataclass
from typing import Annotated

# An int beyond this bound is a typing error and would overflow int32.
MAX_INT = 2**31 - 1
# Within these bounds, products and quotients of a number and a logit fit float32.
MIN_FLOAT, MAX_FLOAT = 1e-30, 1e30


@dataclass(frozen=True)
class Range:
    """An interval of numbers. An open end excludes its bound."""

    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    def broken_bound(self, value: float) -> str:
        """Returns the bound that `value` breaks, such as "at least 1", or "" if it breaks none."""
        if value < self.low or (self.open_low and value == self.low):
            return f"{'above' if self.open_low else 'at least'} {self.low}"
        if value > self.high or (self.open_high and value == self.high):
            return f"{'below' if self.open_high else 'at most'} {self.high}"
        return ""

    def __str__(self) -> str:
        """The interval as `--describe` shows it: "≥ 1", "> 0" or "in [0, 1)"."""
        if self.high in (math.inf, MAX_INT):
            return f"{'>' if self.open_low else '≥'} {self.low}"
        low, high = "(" if self.open_low else "[", ")" if self.open_high else "]"
        return f"in {low}{self.low}, {self.high}{high}"


class Choice:
    """A fixed set of values, such as `Choice("float32", "bfloat16")`."""

    def __init__(self, *known: str):
        self.known = known

    def broken_bound(self, value: str) -> str:
        """Returns "one of " and the set if `value` is not in it, else ""."""
        return "" if value in self.known else f"one of {', '.join(self.known)}"

    def __str__(self) -> str:
        """The set as `--describe` shows it."""
        return f"in {{{', '.join(self.known)}}}"


Count = Annotated[int, Range(1, MAX_INT)]
CountOrZero = Annotated[int, Range(0, MAX_INT)]
Rows = Annotated[int, Range(1, 2**16)]
"""Rows or sequences that are in memory at once."""
Tokens = Annotated[int, Range(1, 2**20)]
"""Tokens of a sequence. No supported model has more positions, and a cache has room for all."""
Documents = Annotated[int, Range(1, 1000)]
"""Documents per search."""
Threads = Annotated[int, Range(1, 1024)]
"""Requests in flight at once. Each has its own thread."""
ThreadsOrZero = Annotated[int, Range(0, 1024)]
Attempts = Annotated[int, Range(1, 100)]
Devices = Annotated[int, Range(1, 2**16)]
DevicesOrZero = Annotated[int, Range(0, 2**16)]
Seed = Annotated[int, Range(0, 2**32 - 1)]

PositiveFloat = Annotated[float, Range(0, open_low=True)]
NonNegativeFloat = Annotated[float, Range(0)]
Share = Annotated[float, Range(0, 1)]
"""A probability or a fraction."""
LearningRate = Annotated[float, Range(0, 10, open_low=True)]
DecayRate = Annotated[float, Range(0, 1, open_high=True)]
"""Decay rate of a moment. At 1 the moment would never change."""
Timeout = Annotated[float, Range(0, 3600, open_low=True)]
"""Deadline in seconds: every wait is bounded."""
Backoff = Annotated[float, Range(0, 600)]
"""Seconds between two attempts."""
