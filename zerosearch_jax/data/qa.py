"""Loads questions with gold answers from any source as one type of row.

Sources: "world" (the embedded world), "synthetic:COUNT:SEED" (a synthetic world), FlashRAG .jsonl,
ZeroSearch_dataset .parquet, DPR .tsv and .csv. Questions are not changed and get no prompt.
"""

import ast
import csv
import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from zerosearch_jax.data.embedded.synthetic import PREFIX, synthetic_world
from zerosearch_jax.data.embedded.world import write_questions
from zerosearch_jax.errors import UserError


@dataclass(frozen=True)
class QARow:
    """One question.

    Attributes:
      id: unique in its source.
      golden_answers: any of them is correct; at least one.
      data_source: name of the data set.
    """

    id: str
    question: str
    golden_answers: tuple[str, ...]
    data_source: str


def load_qa(
    source: str, split: str, limit: int | None = None, data_dir: str | Path | None = None
) -> list[QARow]:
    """Loads the first `limit` rows of `source`, or all if `limit` is None.

    Args:
      source: "world", "synthetic:COUNT:SEED", or the path of a .jsonl, .parquet, .tsv or .csv file.
      split: the split of the world. A file has one split, so `split` only enters its rows' ids.
      limit: at least 1, or None.
      data_dir: folder for the prepared files of "world"; None: a folder below ~/.cache.

    Raises:
      UserError: unknown source or split, a missing or empty file, or an invalid row.
    """
    if limit is not None and limit < 1:
        raise UserError(f"data limit {limit}: set it to at least 1, or to None for all rows")
    if source == "world":
        # TFDS takes seconds to import, and only this source needs it.
        from zerosearch_jax.data.embedded.world_tfds import load_questions

        questions = load_questions(split, data_dir)[:limit]
        return [QARow(q.id, q.question, q.golden_answers, "world") for q in questions]
    if source.startswith(PREFIX):
        entities, seed = synthetic_world(source)
        questions = write_questions(entities, split, seed)[:limit]
        if not questions:
            raise UserError(f"{source} has no split {split!r}; use split 'train'")
        return [QARow(q.id, q.question, q.golden_answers, source) for q in questions]
    path = Path(source)
    readers = {".jsonl": _jsonl, ".parquet": _parquet, ".tsv": _delimited, ".csv": _delimited}
    if path.suffix not in readers:
        raise UserError(
            f"{source}: not a data source; use 'world', '{PREFIX}COUNT:SEED' or a file that ends "
            f"in {', '.join(readers)}"
        )
    if not path.is_file():
        raise UserError(f"{source}: no such file; fix the path of the data set")
    try:
        rows = list(itertools.islice(readers[path.suffix](path, split), limit))
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error}); convert it") from error
    except csv.Error as error:
        raise UserError(f"{path}: not a readable table ({error}); fix it") from error
    if not rows:
        raise UserError(f"{source}: the file has no rows; use a file with at least one question")
    return rows


def _jsonl(path: Path, split: str) -> Iterator[QARow]:
    with path.open(encoding="utf-8-sig", newline="") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                raw = json.loads(line)
            except ValueError as error:
                raise UserError(f"{path}: row {number}: not JSON ({error}); fix the row") from error
            yield _row(path, number, split, raw)


def _parquet(path: Path, split: str) -> Iterator[QARow]:
    for number, raw in enumerate(parquet_rows(path), 1):
        yield _row(path, number, split, raw)


def parquet_rows(path: Path) -> Iterator[dict]:
    """Yields the rows of a parquet file, one batch in memory at a time.

    Raises:
      UserError: the file is not a readable parquet file.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                yield from batch.to_pylist()
    except pyarrow.ArrowException as error:
        raise UserError(
            f"{path}: not a readable parquet file ({error}); download or write it again"
        ) from error


def _delimited(path: Path, split: str) -> Iterator[QARow]:
    """Reads DPR rows: a question and a Python list of answers, separated by a tab or a comma."""
    delimiter = "\t" if path.suffix == ".tsv" else ","
    with path.open(encoding="utf-8-sig", newline="") as lines:
        for number, fields in enumerate(csv.reader(lines, delimiter=delimiter), 1):
            if not fields:
                continue
            if len(fields) != 2:
                raise UserError(
                    f"{path}: row {number}: {len(fields)} columns, expected two: question and "
                    "answers; fix the row"
                )
            try:
                answers = ast.literal_eval(fields[1])
            except (ValueError, SyntaxError) as error:
                raise UserError(
                    f"{path}: row {number}: key 'golden_answers': {fields[1]!r} is not a list; "
                    "write a list such as ['Paris']"
                ) from error
            yield _row(path, number, split, {"question": fields[0], "golden_answers": answers})


def _row(path: Path, number: int, split: str, raw: object) -> QARow:
    where = f"{path}: row {number}"
    if not isinstance(raw, Mapping):
        raise UserError(
            f"{where}: expected an object with 'question' and 'golden_answers'; fix the row"
        )
    question = raw.get("question")
    if not isinstance(question, str) or not question.strip():
        raise UserError(f"{where}: key 'question' is missing or empty; set it to a text")
    answers = raw.get("golden_answers")
    if answers is None:
        answers = _target(raw)
    if isinstance(answers, str):
        answers = [answers]
    if (
        not isinstance(answers, list | tuple)
        or not answers
        or not all(isinstance(a, str) and a.strip() for a in answers)
    ):
        raise UserError(
            f"{where}: key 'golden_answers' (or reward_model.ground_truth.target) is missing or"
            " empty; set it to a list of texts"
        )
    name = raw.get("data_source") or path.stem
    key = raw.get("id")
    identity = f"{path.stem}/{split}/{number}" if key is None else str(key)
    return QARow(identity, question, tuple(answers), str(name))


def _target(raw: Mapping) -> object:
    """Returns `reward_model.ground_truth.target`, or None if one of the three keys is missing."""
    node: object = raw
    for key in ("reward_model", "ground_truth", "target"):
        node = node.get(key) if isinstance(node, Mapping) else None
    return node
