"""Append-only JSON Lines files for the results of long jobs. They survive a kill at any moment."""

import json
import os
from collections.abc import Iterator, KeysView, Mapping, Sequence
from pathlib import Path
from typing import Any

from zerosearch_jax.errors import named_disk_errors
from zerosearch_jax.files import parse_row


class Records:
    """Append-only file of records: one JSON object per line, with unique ids.

    A record is complete once its line break is written. A last line without a line break was cut
    by a kill: it is ignored, and the next `append` removes it. Only the ids are kept in memory.
    One writer at a time. Blank lines and a byte order mark, which editors add, are skipped, as in
    `data.rows`.
    """

    def __init__(self, path: str | Path, shape: Mapping[str, Any] | None = None, key: str = "id"):
        """Opens `path`; the file need not exist. Changes nothing on disk.

        Args:
          path: the file.
          shape: keys that every record must have, with the shapes of their values (see `files`).
          key: the key of a record's id, which is a text.

        Raises:
          UserError: a complete line is not a record.
        """
        self.path = Path(path)
        self.key = key
        self._shape = {key: str, **(shape or {})}
        self._ids: dict[str, None] = {}
        self._complete = 0  # bytes up to the last line break
        if not self.path.exists():
            return
        for number, line in self._lines():
            self._complete += len(line)
            if line.strip():
                self._ids[self._parse(number, line)[key]] = None

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
        text = "".join(json.dumps(record) + "\n" for record in new.values()).encode()
        with named_disk_errors(self.path), self.path.open("ab") as file:
            file.truncate(self._complete)
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        self._complete += len(text)
        self._ids |= dict.fromkeys(new)

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        """Yields the numbers of the complete lines, from 1, and the lines."""
        with self.path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.endswith(b"\n"):
                    yield number, line

    def _parse(self, number: int, line: bytes) -> dict:
        where, fix = f"{self.path}: row {number}", "fix or delete this line"
        return parse_row(line, self._shape, where, fix)
