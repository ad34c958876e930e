"""Atomic file writes, checked reads, and the format version of the files in a workdir.

A reader finds the old file or the new one, never a partial one. Reading a file that is damaged or
has another shape raises a UserError that names it.

A shape describes JSON:

| shape                    | content                                                              |
|--------------------------|----------------------------------------------------------------------|
| `str`, `bool`, `dict`, … | a value of this type                                                 |
| `int`, `float`           | a whole number, any number; both of at most 64 bits                  |
| `float | None`           | one of these                                                         |
| `{"a", "b", None}`       | one of these values                                                  |
| `{"a": X, "b?": Y}`      | an object with key a and possibly key b; other keys are ignored      |
| `{str: X}`               | an object with any keys                                              |
| `[X]`, `[X, ...]`        | a list of X, a list with at least one element                        |
| `(X, Y)`                 | a list of exactly these elements                                     |
"""

import json
import os
import re
import typing
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from zerosearch_jax.errors import UserError, named_disk_errors, named_errors, reason

FORMAT = 3
"""Increased when a newer program cannot resume the workdir of an older one."""
_JSON_NAMES = {
    dict: "an object",
    list: "a list",
    str: "a text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    type(None): "null",
}
_MAX_DEPTH = 100
"""Deepest nesting of a JSON file. Python's own limit depends on its version and on the caller."""


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
    """Returns a UTF-8 text without its byte order mark; a UserError of a bad file ends in `fix`."""
    with named_errors(path, fix):
        return Path(path).read_text(encoding="utf-8-sig")


def read_json(path: str | Path, shape: Any, fix: str) -> Any:
    """Returns the content of a JSON file and checks that it has `shape`.

    Raises:
      UserError: the file is missing, is not JSON, or has another shape. The message ends in `fix`.
    """
    with named_errors(path, fix):
        content = Path(path).read_bytes()
    return parse_row(content, shape, path, fix)


def parse_row(line: bytes, shape: Any, where: str | Path, fix: str) -> Any:
    """Returns the content of one JSON text and checks that it has `shape`.

    Args:
      where: file and row, for the message.

    Raises:
      UserError: the text is not UTF-8, is not JSON, is nested too deeply, contains a lone surrogate
        or has another shape. The message ends in `fix`.
    """
    with named_errors(where, fix):
        text = line.decode("utf-8-sig")
        try:
            content = parse_json(text)
        except ValueError as error:
            raise ValueError(f"not JSON ({error})") from error
        if text.count("[") + text.count("{") > _MAX_DEPTH:
            _check_depth(content)
        if re.search(r"\\u[dD][89abAB]", text):  # raises for a lone surrogate
            json.dumps(content, ensure_ascii=False).encode()
    check_shape(content, shape, where, fix)
    return content


def check_shape(content: Any, shape: Any, where: str | Path, fix: str) -> None:
    """Raises UserError if JSON has another shape; the message names `where` and the key."""
    if trouble := _mismatch(content, shape, ""):
        raise UserError(f"{where}: {reason(ValueError(trouble))}; {fix}")


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
            f"{directory} was written by an older version (format {kept.get('format')!r:.40}, "
            f"this version writes {FORMAT}) and cannot be resumed; use a new --workdir"
        )


def _check_depth(content: Any) -> None:
    level, depth = [content], 0
    while level:
        inner = (one.values() if isinstance(one, dict) else one for one in level)
        level = [one for values in inner for one in values if isinstance(one, dict | list)]
        depth += 1
        if depth > _MAX_DEPTH:
            raise ValueError("nested too deeply")


def _mismatch(value: Any, shape: Any, key: str) -> str:
    """Returns the first difference from `shape`, or ""."""
    if isinstance(shape, set):
        known = any(type(value) is type(one) and value == one for one in shape)
        choices = ", ".join(sorted(map(json.dumps, shape)))
        return "" if known else f"{key}: expected one of {choices}"
    types_of = {dict: dict, list: list, tuple: list}
    expected = types_of.get(type(shape), shape)
    if not any(_is_of(value, one) for one in typing.get_args(expected) or [expected]):
        return f"{key}: " * bool(key) + f"expected {_name_of(expected)}, not {_described(value)}"
    parts: list[tuple[str, Any, Any]] = []
    if isinstance(shape, tuple):
        if len(value) != len(shape):
            return f"{key}: expected {len(shape)} elements, not {len(value)}"
        parts = [(f"[{i}]", *both) for i, both in enumerate(zip(value, shape, strict=True))]
    elif isinstance(shape, list):
        if not value and shape[1:] == [...]:
            return f"{key}: the list is empty"
        parts = [(f"[{i}]", one, shape[0]) for i, one in enumerate(value)]
    elif isinstance(shape, dict) and str in shape:
        parts = [(f".{name}", one, shape[str]) for name, one in value.items()]
    elif isinstance(shape, dict):
        for name, inner in shape.items():
            plain = name.removesuffix("?")
            if plain in value:
                parts.append((f".{plain}", value[plain], inner))
            elif plain == name:
                return f"{key}.{name} is missing".removeprefix(".")
    found = (_mismatch(one, inner, (key + part).lstrip(".")) for part, one, inner in parts)
    return next(filter(None, found), "")


def _is_of(value: Any, expected: type) -> bool:
    if expected in (int, float):
        whole = type(value) is int and -(2**63) <= value < 2**63
        return whole or (expected is float and type(value) is float)
    return isinstance(value, expected)


def _name_of(expected: Any) -> str:
    return " or ".join(_JSON_NAMES[one] for one in typing.get_args(expected) or [expected])


def _described(value: Any) -> str:
    beyond = type(value) is int and not _is_of(value, int)
    return "one of more than 64 bits" if beyond else _JSON_NAMES[type(value)]
