"""Reads rows from files: one reader per format, with the same rules for every loader.

| suffix          | a row is                              | its number   |
|-----------------|---------------------------------------|--------------|
| `.jsonl`        | a line of JSON                        | of the line  |
| `.json`         | an element of a JSON list             | of the row   |
| `.parquet`      | a row of the table, by column name    | of the row   |
| `.tsv`, `.csv`  | a line of cells, a list of texts      | of the line  |

Text files are UTF-8. A byte order mark at the start and blank lines are skipped. A row with a lone
surrogate, such as JSON's "\\ud800", is refused, because no later step could encode or tokenise it.
A loader turns rows into its own type with `as_text` and `as_list`, so that a value means the same
in each format.

Cells are separated by tabs in a `.tsv`, and by commas in a `.csv` unless its first row contains a
tab (DPR's files). A cell that begins with a quotation mark ends at the next one; a doubled mark
inside is one mark. A row is one line, also within quotation marks. Otherwise an unclosed mark would
silently swallow the rows up to the next mark.
"""

import ast
import csv
import math
import os
import re
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

from zerosearch_jax import files
from zerosearch_jax.errors import UserError, named_errors

# Possessive quantifiers refuse a text that is not a list without backtracking.
_TEXT = r"""[uU]?(?:'(?:[^'\\]|\\.)*+'|"(?:[^"\\]|\\.)*+")"""
_NUMBER = r"[-+]?(?:\d++\.?\d*+|\.\d++)(?:[eE][-+]?\d++)?"
_ITEM = re.compile(f"{_TEXT}|{_NUMBER}", re.DOTALL)
# A list without commas, as numpy prints it, does not match: Python would join its texts into one.
_PYTHON_LIST = re.compile(
    rf"\[\s*+(?:(?:{_ITEM.pattern})\s*+(?:,\s*+(?:{_ITEM.pattern})\s*+)*+,?\s*+)?\]", re.DOTALL
)
_LIST_LIKE = re.compile(r"\s*\[(?:.*\]\s*\Z|\s*['\"])", re.DOTALL)
_SURROGATE = re.compile("[\ud800-\udfff]")


class _Float(float):
    """A number that prints as it was written: 1.50 stays 1.50."""

    def __new__(cls, text: str):
        number = super().__new__(cls, text)
        number.text = text
        return number

    def __str__(self) -> str:
        return self.text


def read_rows(path: str | Path) -> Iterator[tuple[int, Any]]:
    """Yields the number of each row, from 1, and the row.

    Args:
      path: a file with one of the suffixes in `READERS`.

    Raises:
      UserError: the file is missing, unreadable, not UTF-8 or empty, or a row is invalid.
    """
    path, number = Path(path), 0
    if not os.path.isfile(path):  # Path.is_file raises OSError for a name that is too long
        what = "not a regular file" if os.path.exists(path) else "no such file"
        raise UserError(f"{path}: {what}; fix the path")
    for number, row in READERS[path.suffix](path):
        if _has_surrogate(row):
            raise UserError(
                f"{path}: row {number}: a lone surrogate, such as \\ud800, is not a "
                "character; fix or delete the row"
            )
        yield number, row
    if not number:
        raise UserError(f"{path}: the file has no rows; use a file with at least one")


def as_text(value: object) -> str | None:
    """Returns a text unchanged and a number as it was written; None for any other value.

    Booleans, null, NaN and infinities are no texts.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal):
        return None
    return None if isinstance(value, float) and not math.isfinite(value) else str(value)


def as_list(value: object) -> list | None:
    """Returns the elements of a list, also of one that is written as text; else `[value]`.

    The text may be JSON or a Python literal: `["Paris", 5]` or `['Paris', 5]`. None if the text
    looks like a list but is neither, or if the list contains a lone surrogate.
    """
    if isinstance(value, list | tuple):
        return list(value)
    if not isinstance(value, str) or not _LIST_LIKE.match(value):
        return [value]
    found = _parse_list(value.strip())
    return None if _has_surrogate(found) else found


def _parse_list(text: str) -> list | None:
    try:
        return parse_json(text)
    except ValueError:
        pass
    if not _PYTHON_LIST.fullmatch(text):
        return None
    items = _ITEM.findall(text)
    try:
        return [ast.literal_eval(item) if item[-1] in "'\"" else item for item in items]
    except (ValueError, SyntaxError):
        return None


def parse_json(text: str | bytes) -> Any:
    """Parses JSON. Floats keep their spelling under `str`. Raises ValueError, also for NaN."""
    return files.parse_json(text, parse_float=_Float, parse_constant=_refuse_constant)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _has_surrogate(value: object) -> bool:
    """Returns whether a text in `value`, at any depth, contains a lone surrogate."""
    pending = [value]
    while pending:  # no recursion: JSON may be nested more deeply than Python's stack allows
        value = pending.pop()
        if isinstance(value, str):
            if not value.isascii() and _SURROGATE.search(value):
                return True
        elif isinstance(value, dict):
            pending += [*value, *value.values()]
        elif isinstance(value, list | tuple):
            pending += value
    return False


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    # Undecodable bytes become lone surrogates, so that the error can name their line.
    with (
        named_errors(path, "check the file"),
        path.open(encoding="utf-8-sig", errors="surrogateescape") as lines,
    ):
        for number, line in enumerate(lines, 1):
            if "\0" in line or _has_surrogate(line):
                raise UserError(
                    f"{path}: row {number}: not UTF-8 text; convert the file to UTF-8, uncompressed"
                )
            if line.strip():
                yield number, line.rstrip("\n")


def _json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    for number, line in _lines(path):
        try:
            yield number, parse_json(line)
        except ValueError as error:
            raise UserError(f"{path}: row {number}: not JSON ({error}); fix the row") from error


def _json_list(path: Path) -> Iterator[tuple[int, Any]]:
    text = files.read_text(path, "convert the file to UTF-8, uncompressed")
    try:
        rows = parse_json(text)
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); fix the file") from error
    if not isinstance(rows, list):
        raise UserError(f"{path}: expected a list of rows, not {type(rows).__name__}; fix it")
    yield from enumerate(rows, 1)


def _parquet(path: Path) -> Iterator[tuple[int, dict]]:
    """Reads one batch of rows into memory at a time."""
    import pyarrow.parquet

    fix = "download or write it again"
    with named_errors(f"{path}: not a readable parquet file", fix):
        file = pyarrow.parquet.ParquetFile(path)
    first, rows, batches = 1, [], file.iter_batches()
    with file:
        while rows is not None:
            yield from enumerate(rows, first)
            first += len(rows)
            with named_errors(f"{path}: row {first} or later: not readable", fix):
                batch = next(batches, None)
                rows = None if batch is None else batch.to_pylist()


def _table(path: Path) -> Iterator[tuple[int, list[str]]]:
    delimiter = "\t" if path.suffix == ".tsv" else ""
    for number, line in _lines(path):
        delimiter = delimiter or ("\t" if "\t" in line else ",")
        try:
            (cells,) = csv.reader([line], delimiter=delimiter, strict=True)
        except csv.Error as error:
            if "limit" in str(error):
                raise UserError(f"{path}: row {number}: {error}; shorten the cell") from error
            raise UserError(
                f"{path}: row {number}: a quotation mark that opens a cell must close it in the "
                f"same row ({error}); close it, or write a mark that belongs to the text as "
                '"" within a quoted cell, and a line break as a space'
            ) from error
        yield number, cells


READERS: dict[str, Callable[[Path], Iterator[tuple[int, Any]]]] = {
    ".jsonl": _json_lines,
    ".json": _json_list,
    ".parquet": _parquet,
    ".tsv": _table,
    ".csv": _table,
}
