"""(query, documents) pairs that the simulator is fine-tuned on: our own files and released ones.

Ours are written by the collect job. The released SimulationTuning set and its like are rows of
chats: the simulator's prompt, fine-tuned form, and the documents as its answer.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from zerosearch_jax.data.embedded.scripted_agent import Segment
from zerosearch_jax.errors import UserError
from zerosearch_jax.files import write_atomically
from zerosearch_jax.text import prompts

LABELS = ("useful", "noisy")
_TEXTS = ("id", "query", "question", "label")
_USER, _ASSISTANT = ("user", "human"), ("assistant", "gpt")
_ALL = 1_000_000  # documents; `cut_documents` wants a limit

# Tolerant of quotes and blanks, which differ between the sets that are about.
_PROMPT = re.compile(
    r'\A.*answer the question:\s*"?(?P<question>.+?)"?\s+whose answer is (?P<answer>.+?)\.?\s*\n'
    r".*\n\s*Query:\s*(?P<query>[^\n]+?)\s*\n\s*(?P<label>Useful|Noisy) Output:\s*\Z",
    re.DOTALL,
)


@dataclass(frozen=True)
class Pair:
    """One search as an example for the simulator.

    Attributes:
      id: "EPISODE/TURN" of the search; FILE/ROW of a chat.
      documents: best first.
      question: what the searching agent had to answer.
      golden_answers: its gold answers, the first of which the simulator is told; a chat has one.
      label: "useful" or "noisy".
      last: whether it was its episode's last search; True where that is not known.
      prompt: the prompt of a chat row as it is written there; "" for our own pairs.
    """

    id: str
    query: str
    documents: tuple[str, ...]
    question: str
    golden_answers: tuple[str, ...]
    label: str
    last: bool
    prompt: str = ""


def load_pairs(path: str | Path) -> list[Pair]:
    """Reads a file of pairs: .jsonl, .json (a list) or .parquet.

    A row is one of
      - our own, as the collect job writes it;
      - "messages" or "conversations": a list of turns `{"role", "content"}` or
        `{"from", "value"}`, one by the user and one by the assistant. A system turn is left out:
        the simulated engine sends an empty one;
      - "prompt" (a text, or such a list) with "response" or "output".

    Raises:
      UserError: no such file, a row of another form, or a prompt that is not the simulator's.
    """
    path = Path(path)
    pairs = []
    for number, row in enumerate(_rows(path), 1):
        where = f"{path}: row {number}"
        if not isinstance(row, Mapping):
            raise UserError(f"{where}: expected an object, not {type(row).__name__}")
        pairs.append(_own(where, row) if "documents" in row else _chat(path, number, row))
    if not pairs:
        raise UserError(f"{path}: the file holds no pairs; give one with at least one row")
    return pairs


def save_pairs(path: str | Path, pairs: Sequence[Pair]) -> None:
    """Writes our own pairs, a JSON line each, in the place of what was there."""
    rows = [{key: value for key, value in asdict(p).items() if key != "prompt"} for p in pairs]
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows))


def pair_segments(pairs: Sequence[Pair], topk: int) -> list[list[Segment]]:
    """(prompt, documents) examples, as fine-tuning reads them.

    Args:
      topk: documents that are asked for and written. A chat keeps its own prompt, which names a
        number, and all its documents.

    Raises:
      UserError: one of our pairs has fewer documents than `topk`.
    """
    examples = []
    for pair in pairs:
        prompt, documents = pair.prompt, pair.documents
        if not prompt:
            if len(documents) < topk:
                raise UserError(
                    f"pair {pair.id!r} has {len(documents)} documents, topk is {topk}; lower topk "
                    "or collect with more documents a search"
                )
            documents = documents[:topk]
            noisy = pair.label == "noisy"
            prompt = prompts.simulator_prompt(
                pair.question, pair.golden_answers[0], pair.query, noisy, "finetuned", topk
            )
        completion = " " + prompts.format_documents(documents)
        examples.append([Segment(prompt, False), Segment(completion, True)])
    return examples


def _rows(path: Path) -> Iterator[object]:
    readers = {".jsonl": _json_lines, ".json": _json_list, ".parquet": _parquet}
    if path.suffix not in readers:
        raise UserError(f"{path}: not a file of pairs; give one ending in {', '.join(readers)}")
    if not path.is_file():
        raise UserError(f"{path}: no such file; configs/collect.py makes one")
    try:
        yield from readers[path.suffix](path)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error})") from error


def _json_lines(path: Path) -> Iterator[object]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{path}: row {number}: not JSON ({error})") from error


def _json_list(path: Path) -> Iterator[object]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not JSON ({error})") from error
    if not isinstance(rows, list):
        raise UserError(f"{path}: expected a list of rows, not {type(rows).__name__}")
    yield from rows


def _parquet(path: Path) -> Iterator[object]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                yield from batch.to_pylist()
    except pyarrow.ArrowException as error:
        raise UserError(f"{path}: not a readable parquet file ({error})") from error


def _own(where: str, row: Mapping) -> Pair:
    for key in _TEXTS:
        if not isinstance(row.get(key), str) or not row[key]:
            raise UserError(f"{where}: key {key!r} is missing or empty; it must be a text")
    if row["label"] not in LABELS:
        raise UserError(f"{where}: key 'label' is {row['label']!r}; use {' or '.join(LABELS)}")
    for key in ("documents", "golden_answers"):
        if not isinstance(row.get(key), list) or not all(isinstance(t, str) for t in row[key]):
            raise UserError(f"{where}: key {key!r} must be a list of texts")
    if not row["golden_answers"]:
        raise UserError(f"{where}: key 'golden_answers' is empty; give at least one")
    if not isinstance(row.get("last"), bool):
        raise UserError(f"{where}: key 'last' must be true or false")
    texts = {key: row[key] for key in _TEXTS}
    return Pair(
        **texts,
        documents=tuple(row["documents"]),
        golden_answers=tuple(row["golden_answers"]),
        last=row["last"],
    )


def _chat(path: Path, number: int, row: Mapping) -> Pair:
    where = f"{path}: row {number}"
    key = next((key for key in ("messages", "conversations", "prompt") if key in row), None)
    if key is None:
        raise UserError(
            f"{where}: none of the keys 'documents', 'messages', 'conversations' and 'prompt' is "
            f"there, only {', '.join(map(repr, row))}"
        )
    if key == "prompt":
        answer_key = next((name for name in ("response", "output") if name in row), None)
        if answer_key is None:
            raise UserError(f"{where}: a row with 'prompt' needs 'response' or 'output', too")
        prompt, answer = row[key], row[answer_key]
        if isinstance(prompt, list):
            prompt = _turn(where, key, prompt, _USER)
    else:
        answer_key = key
        prompt = _turn(where, key, row[key], _USER)
        answer = _turn(where, key, row[key], _ASSISTANT)
    match = _PROMPT.search(prompt) if isinstance(prompt, str) else None
    if match is None:
        raise UserError(
            f"{where}: key {key!r}: the user's text is not the simulator's prompt "
            "(question, answer, query, 'Useful Output:' or 'Noisy Output:')"
        )
    documents = prompts.cut_documents(answer, _ALL) if isinstance(answer, str) else []
    if not documents:
        raise UserError(f"{where}: key {answer_key!r}: no document 'Doc 1: …' in the answer")
    return Pair(
        id=f"{path.stem}/{number}",
        query=match["query"],
        documents=tuple(documents),
        question=match["question"],
        golden_answers=(match["answer"],),
        label=match["label"].lower(),
        last=True,
        prompt=prompt,
    )


def _turn(where: str, key: str, turns: object, roles: tuple[str, str]) -> str:
    """The text of the one turn by one of `roles`."""
    if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
        raise UserError(f"{where}: key {key!r} must be a list of turns")
    texts = [
        turn.get("content", turn.get("value"))
        for turn in turns
        if turn.get("role", turn.get("from")) in roles
    ]
    if len(texts) != 1 or not isinstance(texts[0], str):
        raise UserError(f"{where}: key {key!r} must hold one text by {' or '.join(roles)}")
    return texts[0]
