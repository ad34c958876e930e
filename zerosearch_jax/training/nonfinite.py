"""Counter of non-finite updates: keeps their batches and ends a run after too many in a row.

The learner skips an update whose loss or gradient is not finite.
"""

from pathlib import Path

import jax
import numpy as np

from zerosearch_jax.data.packing import PackedBatch
from zerosearch_jax.errors import UserError, named_disk_errors


class NonFiniteCounter:
    """Counter of consecutive skipped updates, which saves their batches.

    Args:
      workdir: batches go to `workdir/skipped_batches/`, as `.npz` of `PackedBatch.arrays()`.
      limit: number of consecutive skipped updates that ends the run.
      in_a_row: the count before a resume. A run that reached the limit starts from 0 again, so
        that the same command continues.

    Raises:
      UserError: the limit is below 1.
    """

    def __init__(self, workdir: Path, limit: int, in_a_row: int = 0):
        if limit < 1:
            raise UserError(f"nonfinite_limit is {limit}; it must be at least 1")
        self._directory = workdir / "skipped_batches"
        self._limit = limit
        self.in_a_row = in_a_row if in_a_row < limit else 0

    def record(self, step: int, update: int, skipped: bool, batch: PackedBatch) -> None:
        """Counts update `update` of training step `step`, both from 0; saves a skipped batch."""
        if not skipped:
            self.in_a_row = 0
            return
        self.in_a_row += 1
        path = self._directory / f"step{step + 1:06}_update{update + 1}.npz"
        if jax.process_index() == 0:
            self._directory.mkdir(parents=True, exist_ok=True)
            with named_disk_errors(path):
                np.savez_compressed(path, **batch.arrays())
        print(
            f"WARNING: step {step + 1}: loss or gradient is not finite; the update is skipped "
            f"({self.in_a_row} in a row), its batch is in {path}",
            flush=True,
        )

    @property
    def limit_reached(self) -> bool:
        """Whether the limit is reached: save the state, which is still good, and raise."""
        return self.in_a_row >= self._limit

    def raise_error(self, step: int) -> None:
        """Raises the UserError that ends the run after training step `step`, from 0."""
        raise UserError(
            f"{self.in_a_row} updates in a row had a loss or gradient that is not finite, the "
            f"last in step {step + 1}; their batches are in {self._directory}. The checkpoint of "
            f"step {step + 1} holds the state before them. Inspect the batches, lower the "
            "learning rate or raise the KL weight, then run the same command to resume"
        )
