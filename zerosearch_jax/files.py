"""Atomic file writes, and the format version of the files in a workdir.

A reader finds the old file or the new one, never a partial one.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from zerosearch_jax.errors import UserError, named_disk_errors

FORMAT = 3
"""Increased when a newer program cannot resume the workdir of an older one."""


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path in the directory of `path`, for the block to write.

    After the block, flushes the file to disk and renames it to `path`. If the block raises, `path`
    keeps its old content. Errors of the disk name `path`.
    """
    part = Path(f"{path}.part")
    with named_disk_errors(path):
        yield part
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, path)


def write_atomically(path: str | Path, content: str | bytes) -> None:
    """Replaces the content of `path`; text is encoded as UTF-8."""
    with atomic_path(path) as part:
        part.write_bytes(content.encode() if isinstance(content, str) else content)


def write_json(path: str | Path, content: Any, indent: int = 1) -> None:
    """Replaces the content of `path` by JSON, indented by `indent` spaces per level."""
    write_atomically(path, json.dumps(content, indent=indent) + "\n")


def check_format(kept: Mapping[str, Any], directory: str | Path) -> None:
    """Raises UserError if `kept`, read from a file in `directory`, has another "format"."""
    if kept.get("format") != FORMAT:
        raise UserError(
            f"{directory} was written by an older version (format {kept.get('format', 'absent')}, "
            f"this version writes {FORMAT}) and cannot be resumed; use a new --workdir"
        )
