"""Writes a run's metrics: TensorBoard events and `metrics.jsonl`, one row per step."""

import json
import socket
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path

from tensorboardX import summary
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import RecordWriter

from zerosearch_jax.errors import named_disk_errors, named_errors
from zerosearch_jax.files import check_shape, parse_row, write_atomically
from zerosearch_jax.telemetry.metrics import METRICS

_REMEDY = "delete the row, restore the file from a copy, or give another --workdir"


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
        (folder / "tensorboard").mkdir(exist_ok=True)
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}"
        # SummaryWriter would write in a thread. On a full disk that thread dies, and the run waits
        # for it for ever.
        self._board = RecordWriter(str(folder / "tensorboard" / name))
        self._write_event(file_version="brain.Event:2")
        if first_step:  # TensorBoard then hides earlier events of the steps that are repeated.
            self._write_event(step=first_step, session_log=SessionLog(status=SessionLog.START))

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
        with named_disk_errors(self._rows.name):
            self._rows.write(json.dumps(row) + "\n")
            self._rows.flush()
        for name, value in values.items():
            self._write_event(step=step, summary=summary.scalar(name, float(value)))
        with named_disk_errors(self._board.path):
            self._board.flush()

    def text(self, step: int, name: str, text: str) -> None:
        """Writes text, for example a rendered trajectory, to TensorBoard with its line breaks."""
        if self._board is not None:
            # TensorBoard renders Markdown, and shows indented lines verbatim, including tags.
            text = "    " + text.replace("\n", "\n    ")
            self._write_event(step=step, summary=summary.text(name, text))

    def close(self) -> None:
        """Flushes and closes the files."""
        if self._rows is not None and self._board is not None:
            with (
                named_disk_errors(self._board.path),
                closing(self._board),
                named_disk_errors(self._rows.name),
            ):
                self._rows.close()

    def _write_event(self, **fields: int | str | Summary | SessionLog) -> None:
        event = Event(wall_time=time.time(), **fields)
        with named_disk_errors(self._board.path):
            self._board.write(event.SerializeToString())


def earlier_rows(
    path: str | Path, first_step: float, needed: Sequence[str] = ()
) -> list[dict[str, float]]:
    """Reads the rows of a run's `metrics.jsonl` with `step` < `first_step`, in file order.

    Returns [] if the file is missing, and ignores a last row that a kill truncated.

    Args:
      needed: metrics that every row must have.

    Raises:
      UserError: the file cannot be read, or a row is not an object of numbers with `step`.
    """
    path = Path(path)
    if not path.exists():
        return []
    with named_errors(path, _REMEDY):
        *lines, _ = path.read_bytes().split(b"\n")  # the last part is a truncated row, or empty
    rows = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            where = f"{path}: row {number}"
            row = parse_row(line, {str: float}, where, _REMEDY)
            check_shape(row, {"step": int, **dict.fromkeys(needed, float)}, where, _REMEDY)
            rows.append(row)
    return [row for row in rows if row["step"] < first_step]
