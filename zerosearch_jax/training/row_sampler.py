"""Which training rows a step uses. The draw depends on (seed, step) alone, so that a resumed run
goes on as if it had not been interrupted."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from zerosearch_jax.errors import UserError


@dataclass(frozen=True)
class RowSampler:
    """Goes through `rows` once an epoch, `size` a step, in an order keyed by (seed, epoch).

    An epoch's last rows, too few for a step, are left out of it.

    Attributes:
      size_key: the config key that sets `size`, for the error.

    Raises:
      UserError: fewer than `size` rows.
    """

    rows: Sequence
    size: int
    seed: int
    size_key: str

    def __post_init__(self):
        if self.size > len(self.rows):
            raise UserError(
                f"{self.size_key}={self.size} is more than the {len(self.rows)} there are to "
                "train on; lower it"
            )

    def draw(self, step: int) -> list:
        """The rows of step `step`, counted from 0."""
        epoch, place = divmod(step, len(self.rows) // self.size)
        order = np.random.default_rng((self.seed, epoch)).permutation(len(self.rows))
        start = place * self.size
        return [self.rows[i] for i in order[start : start + self.size]]
