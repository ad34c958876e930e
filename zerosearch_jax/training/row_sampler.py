"""Seeded order of the training rows.

A draw depends only on (seed, step), so a resumed run draws the rows of an uninterrupted one.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from zerosearch_jax.errors import UserError


@dataclass(frozen=True)
class RowSampler:
    """Sampler of `size` rows per step, each row at most once per epoch.

    The order of an epoch is keyed by (seed, epoch). The last rows of an epoch are left out if
    they are too few for a step.

    Attributes:
      size_key: the config key of `size`, for the error.

    Raises:
      UserError: there are fewer than `size` rows.
    """

    rows: Sequence
    size: int
    seed: int
    size_key: str

    def __post_init__(self):
        if self.size > len(self.rows):
            raise UserError(
                f"{self.size_key}={self.size} is more than the {len(self.rows)} rows to train on; "
                "lower it"
            )

    def draw(self, step: int) -> list:
        """Returns the rows of step `step`, from 0."""
        epoch, place = divmod(step, len(self.rows) // self.size)
        order = np.random.default_rng((self.seed, epoch)).permutation(len(self.rows))
        start = place * self.size
        return [self.rows[i] for i in order[start : start + self.size]]
