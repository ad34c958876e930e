"""Loads questions with gold answers from any source as one type of row.

Sources: "world" (the embedded world), "synthetic:COUNT:SEED" (a synthetic world), FlashRAG .jsonl,
ZeroSearch_dataset .parquet, DPR .tsv and .csv. Questions are not changed and get no prompt.

In every format, gold answers are a list, one answer, or a text that holds a list such as
`['Paris', 'City of Light']`. An answer may be a number. `data.rows` describes the file formats.
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from zerosearch_jax.data.embedded.synthetic import PREFIX, synthetic_world
from zerosearch_jax.data.embedded.world import Question, write_questions
from zerosearch_jax.data.rows import as_list, as_text, read_rows
from zerosearch_jax.errors import UserError, shown
from zerosearch_jax.text.matching import score_tokens

SUFFIXES = (".jsonl", ".parquet", ".tsv", ".csv")
TABLES = (".tsv", ".csv")
_ANSWER_COLUMNS = ("answer", "answers", "golden_answers")


@dataclass(frozen=True)
class QARow:
    """One question.

    Attributes:
      id: unique in its source.
      golden_answers: any of them is correct; at least one. Each has a token that can be scored.
      data_source: name of the data set.
      where: file and row, or source and id, for error messages.
    """

    id: str
    question: str
    golden_answers: tuple[str, ...]
    data_source: str
    where: str = field(default="", compare=False)


def load_qa(
    source: str, split: str, limit: int | None = None, data_dir: str | Path | None = None
) -> list[QARow]:
    """Loads the first `limit` rows of `source`, or all if `limit` is None.

    Gold answers without a token, such as "The" or "!", are dropped, and their number is printed:
    every score of them is 0.

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
        return [_world_row(q, source) for q in questions]
    if source.startswith(PREFIX):
        entities, seed = synthetic_world(source)
        questions = write_questions(entities, split, seed)[:limit]
        if not questions:
            raise UserError(f"{source} has no split {split!r}; use split 'train'")
        return [_world_row(q, source) for q in questions]
    path = Path(source)
    if path.suffix not in SUFFIXES:
        raise UserError(
            f"{source}: not a data source; use 'world', '{PREFIX}COUNT:SEED' or a file that ends "
            f"in {', '.join(SUFFIXES)}"
        )
    rows = ((n, raw) for n, raw in read_rows(path) if not _is_header(path, raw))
    loaded, dropped = [], []
    for number, raw in itertools.islice(rows, limit):
        row = _row(path, number, split, raw)
        kept = scored_answers(row.where, row.golden_answers)
        dropped += [(row.where, text) for text in row.golden_answers if text not in kept]
        loaded.append(replace(row, golden_answers=kept))
    if not loaded:
        raise UserError(f"{path}: the file has no rows; use a file with at least one question")
    if dropped:
        where, text = dropped[0]
        text = shown(text)
        print(f"{len(dropped)} gold answers without a word dropped, first in {where}: {text}")
    return loaded


def golden_answers(where: str, value: object) -> tuple[str, ...]:
    """Returns gold answers as texts.

    Args:
      where: file and row, for errors.
      value: a list, one answer, or a text that holds a list.

    Raises:
      UserError: there is no answer, or one is neither text nor number.
    """
    found = as_list(value)
    if found is None:
        raise UserError(
            f"{where}: key 'golden_answers': {shown(value)} is not a readable list; write a "
            "list such as ['Paris', 'City of Light']"
        )
    texts = [as_text(answer) for answer in found]
    if None in texts and value is not None:
        bad = shown(found[texts.index(None)])
        raise UserError(
            f"{where}: key 'golden_answers': {bad} is neither text nor a number; write it as a "
            "text or delete it"
        )
    if value is None or not texts:
        raise UserError(
            f"{where}: key 'golden_answers' (or reward_model.ground_truth.target) is missing or"
            " empty; set it to a list of texts"
        )
    return tuple(texts)


def scored_answers(where: str, answers: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the answers with a token that can be scored. Raises UserError if there is none."""
    kept = tuple(answer for answer in answers if score_tokens(answer))
    if not kept:
        raise UserError(
            f"{where}: key 'golden_answers': {shown(list(answers))}: only punctuation and "
            "articles, so no answer could score; add an answer or delete the row"
        )
    return kept


def _world_row(question: Question, source: str) -> QARow:
    where = f"{source}: question {question.id}"
    return QARow(question.id, question.question, question.golden_answers, source, where)


def _is_header(path: Path, raw: object) -> bool:
    """Whether the row of a table names its columns: "question", and "answers" or a similar name."""
    if path.suffix not in TABLES or len(raw) != 2:
        return False
    first, second = (cell.strip().lower() for cell in raw)
    return first == "question" and second in _ANSWER_COLUMNS


def _row(path: Path, number: int, split: str, raw: object) -> QARow:
    """Turns a row of a file into a `QARow`, with all its gold answers."""
    where = f"{path}: row {number}"
    if path.suffix in TABLES:
        if len(raw) != 2:
            raise UserError(
                f"{where}: {len(raw)} columns, expected two: question and answers; fix the row"
            )
        raw = dict(zip(("question", "golden_answers"), raw, strict=True))
    if not isinstance(raw, Mapping):
        raise UserError(
            f"{where}: expected an object with 'question' and 'golden_answers'; fix the row"
        )
    question = raw.get("question")
    if not isinstance(question, str) or not question.strip():
        raise UserError(f"{where}: key 'question' is missing, empty or not text; set it to a text")
    answers = raw.get("golden_answers")
    answers = golden_answers(where, _target(raw) if answers is None else answers)
    name = _label(where, raw, "data_source") or path.stem
    id_ = _label(where, raw, "id") or f"{path.stem}/{split}/{number}"
    return QARow(id_, question, answers, name, where)


def _label(where: str, raw: Mapping, key: str) -> str:
    """Returns the text or number under `key`; "" if it is missing or null."""
    value = raw.get(key)
    text = "" if value is None else as_text(value)
    if text is None:
        raise UserError(f"{where}: key {key!r} is {shown(value)}; set it to a text or delete it")
    return text


def _target(raw: Mapping) -> object:
    """Returns `reward_model.ground_truth.target`, or None if one of the three keys is missing."""
    node: object = raw
    for key in ("reward_model", "ground_truth", "target"):
        node = node.get(key) if isinstance(node, Mapping) else None
    return node
