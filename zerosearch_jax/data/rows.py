"""Reads rows from files: one reader per format, with the same rules for every loader.

| suffix          | a row is                              | its number   |
|-----------------|---------------------------------------|--------------|
| `.jsonl`        | a line of JSON                        | of the line  |
| `.json`         | an element of a JSON list             | of the row   |
| `.parquet`      | a row of the table, by column name    | of the row   |
| `.tsv`, `.csv`  | a line of cells, a list of texts      | of the line  |

Text files are UTF-8. A byte order mark at the start and blank lines are skipped. A loader turns
rows into its own type with `as_text` and `as_list`, so that a value means the same in each format.

Cells are separated by tabs in a `.tsv`, and by commas in a `.csv` unless its first row contains a
tab (DPR's files). A cell that begins with a quotation mark ends at the next one; a doubled mark
inside is one mark. A row is one line, also within quotation marks. Otherwise an unclosed mark would
silently swallow the rows up to the next mark.
"""

import ast
import csv
import itertools
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from zerosearch_jax import files
from zerosearch_jax.errors import UserError

_TEXT = r"""[uU]?(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")"""
_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_ITEM = re.compile(f"{_TEXT}|{_NUMBER}", re.DOTALL)
# A list without commas, as numpy prints it, does not match: Python would join its texts into one.
_PYTHON_LIST = re.compile(
    rf"\[\s*(?:(?:{_ITEM.pattern})(?:\s*,\s*(?:{_ITEM.pattern}))*\s*,?)?\s*\]", re.DOTALL
)
_LIST_LIKE = re.compile(r"\s*\[(?:.*\]\s*\Z|\s*['\"])", re.DOTALL)


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
    if not path.is_file():
        raise UserError(f"{path}: no such file; fix the path")
    try:
        for number, row in READERS[path.suffix](path):
            yield number, row
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error}); convert it") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check it") from error
    if not number:
        raise UserError(f"{path}: the file has no rows; use a file with at least one")


def as_text(value: object) -> str | None:
    """Returns a text unchanged and a number as it was written; None for any other value.

    Booleans, null, NaN and infinities are no texts.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return str(value)


def as_list(value: object) -> list | None:
    """Returns the elements of a list, also of one that is written as text; else `[value]`.

    The text may be JSON or a Python literal: `["Paris", 5]` or `['Paris', 5]`. None if the text
    looks like a list but is neither.
    """
    if isinstance(value, list | tuple):
        return list(value)
    if not isinstance(value, str) or not _LIST_LIKE.match(value):
        return [value]
    text = value.strip()
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


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield number, line.rstrip("\n")


def _json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    for number, line in _lines(path):
        try:
            yield number, parse_json(line)
        except ValueError as error:
            raise UserError(f"{path}: row {number}: not JSON ({error}); fix the row") from error


def _json_list(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        rows = parse_json(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError:
        raise
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); fix the file") from error
    if not isinstance(rows, list):
        raise UserError(f"{path}: expected a list of rows, not {type(rows).__name__}; fix it")
    yield from enumerate(rows, 1)


def _parquet(path: Path) -> Iterator[tuple[int, dict]]:
    """Reads one batch of rows into memory at a time."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            batches = (batch.to_pylist() for batch in file.iter_batches())
            yield from enumerate(itertools.chain.from_iterable(batches), 1)
    except pyarrow.ArrowException as error:
        raise UserError(
            f"{path}: not a readable parquet file ({error}); download or write it again"
        ) from error


def _table(path: Path) -> Iterator[tuple[int, list[str]]]:
    delimiter = "\t" if path.suffix == ".tsv" else ""
    for number, line in _lines(path):
        delimiter = delimiter or ("\t" if "\t" in line else ",")
        try:
            (cells,) = csv.reader([line], delimiter=delimiter, strict=True)
        except csv.Error as error:
            raise UserError(
                f"{path}: row {number}: a quotation mark that opens a cell must close it in the "
                f"same row ({error}); close it, or write a mark that belongs to the text as "
                '"" within a quoted cell'
            ) from error
        yield number, cells


READERS: dict[str, Callable[[Path], Iterator[tuple[int, Any]]]] = {
    ".jsonl": _json_lines,
    ".json": _json_list,
    ".parquet": _parquet,
    ".tsv": _table,
    ".csv": _table,
}
