"""Atomic file writes, checked reads, and the format version of the files in a workdir.

A reader finds the old file or the new one, never a partial one. A file that cannot be read raises a
UserError that names it.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from zerosearch_jax.errors import UserError, named_disk_errors, named_errors

FORMAT = 3
"""Increased when a newer program cannot resume the workdir of an older one."""
_JSON_NAMES = {
    dict: "an object",
    list: "a list",
    str: "a text",
    int: "a number",
    float: "a number",
    bool: "true or false",
    type(None): "null",
}


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


def read_text(path: str | Path, fix: str) -> str:
    """Returns a UTF-8 text without its byte order mark; `fix` ends the UserError of a bad file."""
    with named_errors(path, fix):
        return Path(path).read_text(encoding="utf-8-sig")


def read_json(path: str | Path, expected: type, fix: str) -> Any:
    """Returns the content of a JSON file, whose outermost type is `expected`.

    Raises:
      UserError: the file is missing, is no JSON, or holds another type; `fix` ends the message.
    """
    text = read_text(path, fix)
    with named_errors(path, fix):
        content = parse_json(text)
    if not isinstance(content, expected):
        raise UserError(
            f"{path}: expected {_JSON_NAMES[expected]}, not {_JSON_NAMES[type(content)]}; {fix}"
        )
    return content


def parse_json(text: str | bytes, **options: Any) -> Any:
    """Parses JSON with `json.loads(text, **options)`; raises ValueError, also for deep nesting."""
    try:
        return json.loads(text, **options)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def check_format(kept: Mapping[str, Any], directory: str | Path) -> None:
    """Raises UserError if `kept`, read from a file in `directory`, has another "format"."""
    if kept.get("format") != FORMAT:
        raise UserError(
            f"{directory} was written by an older version (format {kept.get('format', 'absent')}, "
            f"this version writes {FORMAT}) and cannot be resumed; use a new --workdir"
        )
