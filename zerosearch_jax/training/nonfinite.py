"""What happens when a loss or a gradient is not finite: the update is skipped by the learner, its
batch is kept for inspection here, and after too many in a row the run has to stop."""

from pathlib import Path

import jax
import numpy as np

from zerosearch_jax.data.packing import PackedBatch
from zerosearch_jax.errors import UserError


class NonFiniteCounter:
    """Counts skipped updates in a row and saves their batches.

    Args:
      workdir: batches go to `workdir/skipped_batches/`, as `.npz` of `PackedBatch.arrays()`.
      limit: so many skipped updates in a row are too many.
      in_a_row: how many there were before a resume. After a stop they count from 0 again, so
        that the same command goes on.

    Raises:
      UserError: the limit is below 1.
    """

    def __init__(self, workdir: Path, limit: int, in_a_row: int = 0):
        if limit < 1:
            raise UserError(f"nonfinite_limit is {limit}; it must be at least 1")
        self._directory = workdir / "skipped_batches"
        self._limit = limit
        self.in_a_row = in_a_row if in_a_row < limit else 0

    def saw(self, step: int, update: int, skipped: bool, batch: PackedBatch) -> None:
        """Takes note of one update: `update` of the training step `step`, both from 0."""
        if not skipped:
            self.in_a_row = 0
            return
        self.in_a_row += 1
        path = self._directory / f"step{step + 1:06}_update{update + 1}.npz"
        if jax.process_index() == 0:
            self._directory.mkdir(parents=True, exist_ok=True)
            np.savez_compressed(path, **batch.arrays())
        print(
            f"WARNING: step {step + 1}: loss or gradient is not finite; the update is skipped "
            f"({self.in_a_row} in a row), its batch is in {path}",
            flush=True,
        )

    @property
    def exhausted(self) -> bool:
        """Whether the limit is reached: save the state, which is still good, and `stop`."""
        return self.in_a_row >= self._limit

    def stop(self, step: int) -> None:
        """Raises the UserError that ends the run after training step `step`, counted from 0."""
        raise UserError(
            f"{self.in_a_row} updates in a row had a loss or gradient that is not finite, the "
            f"last in step {step + 1}; their batches are in {self._directory}. The state before "
            f"them is the checkpoint of step {step + 1}: look at the batches, lower the learning "
            "rate or raise the KL weight, then run the same command to go on from there"
        )
