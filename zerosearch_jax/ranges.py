"""Number types of config fields: a type and the interval that its values must lie in.

A field `learning_rate: PositiveFloat` is documented and checked by its type.
`config_flags.typed` refuses a value outside the interval with the full key.
"""

import math
from dataclasses import dataclass
from typing import Annotated


@dataclass(frozen=True)
class Range:
    """An interval of numbers. An open end excludes its bound."""

    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    def __contains__(self, value: float) -> bool:
        above = value > self.low if self.open_low else value >= self.low
        below = value < self.high if self.open_high else value <= self.high
        return above and below

    def __str__(self) -> str:
        """The words of error messages: "at least 1", "above 0 and below 1"."""
        low = f"{'above' if self.open_low else 'at least'} {self.low}"
        high = f"{'below' if self.open_high else 'at most'} {self.high}"
        ends = [(low, self.low), (high, self.high)]
        return " and ".join(words for words, bound in ends if math.isfinite(bound))


# An int beyond this bound is a typing error, and would exhaust memory or overflow int32.
MAX_INT = 2**31 - 1

Count = Annotated[int, Range(1, MAX_INT)]
CountOrZero = Annotated[int, Range(0, MAX_INT)]
Seed = Annotated[int, Range(0, 2**32 - 1)]
PositiveFloat = Annotated[float, Range(0, open_low=True)]
NonNegativeFloat = Annotated[float, Range(0)]
Share = Annotated[float, Range(0, 1)]
"""A probability or a fraction."""
