"""Atomic file writes: a reader finds the old file or the new one, never a part of it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path next to `path`; on success flushes it to disk and renames it.

    The block writes the temporary file. If it raises, `path` keeps its old content.
    """
    part = Path(f"{path}.part")
    yield part
    with part.open("rb+") as file:
        os.fsync(file.fileno())
    os.replace(part, path)


def write_atomically(path: str | Path, text: str) -> None:
    """Replaces the content of `path` with `text`, encoded as UTF-8."""
    with atomic_path(path) as part:
        part.write_text(text, encoding="utf-8")
