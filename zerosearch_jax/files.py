"""Atomic file writes: a reader finds the old file or the new one, never a partial one."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path in the directory of `path`, for the block to write.

    After the block, flushes the file to disk and renames it to `path`. If the block raises, `path`
    keeps its old content.
    """
    part = Path(f"{path}.part")
    yield part
    with part.open("rb+") as file:
        os.fsync(file.fileno())
    os.replace(part, path)


def write_atomically(path: str | Path, content: str | bytes) -> None:
    """Replaces the content of `path`; text is encoded as UTF-8."""
    with atomic_path(path) as part:
        part.write_bytes(content.encode() if isinstance(content, str) else content)
