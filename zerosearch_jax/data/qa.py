"""Questions with gold answers, from wherever they come, as one kind of row.

Sources: "world" (the embedded world), "made_up:COUNT:SEED" (a world of what does not exist),
FlashRAG .jsonl, ZeroSearch_dataset .parquet, DPR .tsv and .csv. Questions are
passed on as they are written. No prompts here.
"""

import ast
import csv
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from zerosearch_jax.data.embedded.synthetic import PREFIX, synthetic_world
from zerosearch_jax.data.embedded.world import write_questions
from zerosearch_jax.errors import UserError


@dataclass(frozen=True)
class QARow:
    """One question; any of `golden_answers` is right. `data_source` names the set it is from."""

    id: str
    question: str
    golden_answers: tuple[str, ...]
    data_source: str


def load_qa(
    source: str, split: str, limit: int | None = None, data_dir: str | Path | None = None
) -> list[QARow]:
    """The first `limit` rows of `source` (all when None).

    Args:
      source: "world", "made_up:COUNT:SEED", or the path of a .jsonl, .parquet, .tsv or .csv file.
      split: which split of the world; a file is one split already, so it only names its rows.
      limit: at least 1, or None.
      data_dir: where the world's prepared files are kept; a folder of the user's by default.

    Raises:
      UserError: unknown source or split, a missing or empty file, a row that lacks a key.
    """
    if limit is not None and limit < 1:
        raise UserError(f"data limit {limit}: it must be at least 1, or None for all rows")
    if source == "world":
        # Imported here because TFDS takes seconds to import and files do not need it.
        from zerosearch_jax.data.embedded.world_tfds import load_questions

        questions = load_questions(split, data_dir)[:limit]
        return [QARow(q.id, q.question, q.golden_answers, "world") for q in questions]
    if source.startswith(PREFIX):
        entities, seed = synthetic_world(source)
        questions = write_questions(entities, split, seed)[:limit]
        if not questions:
            raise UserError(f"{source} has no split {split!r}; its entities are all in train")
        return [QARow(q.id, q.question, q.golden_answers, source) for q in questions]
    path = Path(source)
    readers = {".jsonl": _jsonl, ".parquet": _parquet, ".tsv": _delimited, ".csv": _delimited}
    if path.suffix not in readers:
        raise UserError(
            f"{source}: not a data source; give 'world', '{PREFIX}COUNT:SEED' or a file ending in "
            f"{', '.join(readers)}"
        )
    if not path.is_file():
        raise UserError(f"{source}: no such file; check the path of the data set")
    rows = []
    for row in readers[path.suffix](path, split):
        rows.append(row)
        if len(rows) == limit:
            break
    if not rows:
        raise UserError(f"{source}: the file has no rows; give a file with at least one question")
    return rows


def _jsonl(path: Path, split: str) -> Iterator[QARow]:
    with _opened(path) as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                raw = json.loads(line)
            except ValueError as error:
                raise UserError(f"{path}: row {number}: not JSON ({error})") from error
            yield _row(path, number, split, raw)


def _parquet(path: Path, split: str) -> Iterator[QARow]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches():
                for raw in batch.to_pylist():
                    number += 1
                    yield _row(path, number, split, raw)
    except pyarrow.ArrowException as error:
        raise UserError(f"{path}: not a readable parquet file ({error})") from error


def _delimited(path: Path, split: str) -> Iterator[QARow]:
    """DPR rows: question, then a Python list of aliases, separated by a tab or a comma."""
    delimiter = "\t" if path.suffix == ".tsv" else ","
    with _opened(path) as lines:
        for number, fields in enumerate(csv.reader(lines, delimiter=delimiter), 1):
            if not fields:
                continue
            if len(fields) != 2:
                raise UserError(
                    f"{path}: row {number}: {len(fields)} columns; expected question and answers"
                )
            try:
                answers = ast.literal_eval(fields[1])
            except (ValueError, SyntaxError) as error:
                raise UserError(
                    f"{path}: row {number}: key 'golden_answers': {fields[1]!r} is not a list"
                    " such as ['Paris']"
                ) from error
            yield _row(path, number, split, {"question": fields[0], "golden_answers": answers})


class _opened:
    """An open UTF-8 text file; what cannot be read is the user's to mend."""

    def __init__(self, path: Path):
        self._path = path

    def __enter__(self):
        self._file = open(self._path, encoding="utf-8-sig", newline="")  # noqa: SIM115
        return self._file

    def __exit__(self, kind, error, trace) -> None:
        self._file.close()
        if isinstance(error, UnicodeDecodeError):
            raise UserError(f"{self._path}: not UTF-8 text ({error})") from error
        if isinstance(error, csv.Error):
            raise UserError(f"{self._path}: not a readable table ({error})") from error


def _row(path: Path, number: int, split: str, raw: object) -> QARow:
    where = f"{path}: row {number}"
    if not isinstance(raw, Mapping):
        raise UserError(f"{where}: expected an object with 'question' and 'golden_answers'")
    question = raw.get("question")
    if not isinstance(question, str) or not question.strip():
        raise UserError(f"{where}: key 'question' is missing or empty; it must be a text")
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
            " empty; it must be a list of texts"
        )
    name = raw.get("data_source") or path.stem
    key = raw.get("id")
    identity = f"{path.stem}/{split}/{number}" if key is None else str(key)
    return QARow(identity, question, tuple(answers), str(name))


def _target(raw: Mapping) -> object:
    """`reward_model.ground_truth.target`, or None where any of the three is missing."""
    node: object = raw
    for key in ("reward_model", "ground_truth", "target"):
        node = node.get(key) if isinstance(node, Mapping) else None
    return node
