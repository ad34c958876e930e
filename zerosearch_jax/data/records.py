"""Append-only JSON Lines files for the results of long jobs. They survive a kill at any moment."""

import json
import os
from collections.abc import Iterator, KeysView, Mapping, Sequence
from pathlib import Path

from zerosearch_jax.errors import UserError, named_disk_errors


class Records:
    """Append-only file of records: one JSON object per line, with unique ids.

    A record is complete once its line break is written. A last line without a line break was cut
    by a kill; opening the file drops it. Only the ids are kept in memory. One writer at a time.
    Blank lines and a byte order mark, which editors add, are skipped, as in `data.rows`.
    """

    def __init__(self, path: str | Path, key: str = "id"):
        """Opens `path`; the file need not exist.

        Args:
          path: the file.
          key: the key of a record's id, which is a text.

        Raises:
          UserError: a complete line is not a record.
        """
        self.path = Path(path)
        self.key = key
        self._ids: dict[str, None] = {}
        if not self.path.exists():
            return
        complete = 0
        for number, line in self._lines():
            if line.endswith(b"\n"):
                complete += len(line)
                if line.strip():
                    self._ids[self._parse(number, line)[key]] = None
        if complete < self.path.stat().st_size:
            os.truncate(self.path, complete)

    @property
    def ids(self) -> KeysView[str]:
        """Ids of all records, in order."""
        return self._ids.keys()

    def __len__(self) -> int:
        return len(self._ids)

    def __iter__(self) -> Iterator[dict]:
        """Reads all records from the file, in order; the first record with an id counts."""
        if not self._ids:
            return
        seen = set()
        for number, line in self._lines():
            record = self._parse(number, line) if line.strip() else None
            if record and record[self.key] not in seen:
                seen.add(record[self.key])
                yield record

    def append(self, records: Sequence[Mapping]) -> None:
        """Appends the records with new ids in one write, and flushes them to disk."""
        new: dict[str, Mapping] = {}
        for record in records:
            if record[self.key] not in self._ids:
                new.setdefault(record[self.key], record)
        if not new:
            return
        text = "".join(json.dumps(record) + "\n" for record in new.values())
        with named_disk_errors(self.path), self.path.open("ab") as file:
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())
        self._ids |= dict.fromkeys(new)

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        with self.path.open("rb") as lines:
            yield from enumerate(lines, 1)

    def _parse(self, number: int, line: bytes) -> dict:
        try:
            record = json.loads(line)  # also decodes a byte order mark
        except ValueError:
            record = None
        if not isinstance(record, dict) or not isinstance(record.get(self.key), str):
            raise UserError(
                f"{self.path}: row {number}: not a JSON object with a text under {self.key!r}; "
                "fix or delete this line"
            )
        return record
