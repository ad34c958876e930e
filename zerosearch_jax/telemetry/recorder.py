"""Writes a run's figures: TensorBoard events and `metrics.jsonl`, one row a step.

It knows the glossary's names and nothing of what they measure.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path

from tensorboardX import SummaryWriter

from zerosearch_jax.telemetry.metrics import METRICS


class Recorder:
    """The figures of one run in `workdir`.

    A killed run may have written rows of steps after its last checkpoint. The resumed run
    writes those again, so what stands there from `first_step` on is dropped first.

    Args:
      workdir: gets `metrics.jsonl` and TensorBoard's event files in `tensorboard/`.
      enabled: False on all processes but one: nothing is written.
      first_step: number of the first step that this run will write.
    """

    def __init__(self, workdir: str | Path, enabled: bool = True, first_step: int = 0) -> None:
        self._rows = None
        self._board = None
        if not enabled:
            return
        folder = Path(workdir)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.jsonl"
        _drop_rows_from(path, first_step)
        self._rows = path.open("a", encoding="utf-8")
        # At step 0 there is nothing to purge, and TensorBoard would hide a first event at 0.
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step or None)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Writes the figures of one step. Raises KeyError for a name not in the glossary."""
        unknown = sorted(values.keys() - METRICS.keys())
        if unknown:
            raise KeyError(f"not in telemetry/metrics.py: {', '.join(unknown)}")
        if self._rows is None or self._board is None:
            return
        row = {"step": step, **{name: float(value) for name, value in values.items()}}
        self._rows.write(json.dumps(row) + "\n")
        self._rows.flush()
        for name, value in values.items():
            self._board.add_scalar(name, float(value), step)

    def text(self, step: int, name: str, text: str) -> None:
        """Writes text (a rendered trajectory) to TensorBoard, line breaks kept."""
        if self._board is not None:
            # TensorBoard reads Markdown: indented lines are shown as they are, tags and all.
            self._board.add_text(name, "    " + text.replace("\n", "\n    "), step)

    def close(self) -> None:
        """Flushes and closes the files."""
        if self._rows is not None and self._board is not None:
            self._rows.close()
            self._board.close()


def _drop_rows_from(path: Path, first_step: int) -> None:
    """Keeps the complete rows of steps before `first_step`; a row cut by a kill goes, too."""
    if not path.exists():
        return
    kept = [
        line
        for line in path.read_text(encoding="utf-8").splitlines(keepends=True)
        if line.endswith("\n") and json.loads(line)["step"] < first_step
    ]
    beside = path.with_suffix(".tmp")
    beside.write_text("".join(kept), encoding="utf-8")
    os.replace(beside, path)
