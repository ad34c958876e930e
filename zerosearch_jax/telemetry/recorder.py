"""Writes a run's metrics: TensorBoard events and `metrics.jsonl`, one row per step."""

import json
from collections.abc import Mapping
from pathlib import Path

from tensorboardX import SummaryWriter

from zerosearch_jax.errors import UserError
from zerosearch_jax.files import write_atomically
from zerosearch_jax.telemetry.metrics import METRICS


class Recorder:
    """Writer of the metrics of one run.

    A killed run may have written rows of steps after its last checkpoint. The resumed run repeats
    these steps, so the recorder first drops all rows from `first_step` on.

    Args:
      workdir: directory of `metrics.jsonl` and of TensorBoard's event files, in `tensorboard/`.
      enabled: whether this process writes; only one process of a run should.
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
        kept = earlier_rows(path, first_step)
        write_atomically(path, "".join(json.dumps(row) + "\n" for row in kept))
        self._rows = path.open("a", encoding="utf-8")
        # At step 0 there is nothing to purge, and TensorBoard would hide a first event at 0.
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step or None)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Writes the metrics of one step.

        Raises:
          KeyError: a name is not in telemetry/metrics.py, which is checked on every process.
        """
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
        """Writes text, for example a rendered trajectory, to TensorBoard with its line breaks."""
        if self._board is not None:
            # TensorBoard renders Markdown, and shows indented lines verbatim, including tags.
            self._board.add_text(name, "    " + text.replace("\n", "\n    "), step)

    def close(self) -> None:
        """Flushes and closes the files."""
        if self._rows is not None and self._board is not None:
            self._rows.close()
            self._board.close()


def earlier_rows(path: str | Path, first_step: int) -> list[dict[str, float]]:
    """Reads the rows of a run's `metrics.jsonl` with `step` < `first_step`, in file order.

    Returns [] if the file is missing, and ignores a last row that a kill truncated.

    Raises:
      UserError: a line is not JSON.
    """
    path = Path(path)
    if not path.exists():
        return []
    rows = []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        if not line.endswith("\n"):
            break
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {number}: not JSON ({error}); remove the line") from None
        if row["step"] < first_step:
            rows.append(row)
    return rows
