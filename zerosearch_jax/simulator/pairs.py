"""Pairs of a query and its documents, on which the simulator is fine-tuned.

The collect job extracts our own pairs from its episodes. The released SimulationTuning set and
similar ones are chats: the simulator's prompt (fine-tuned form), then the documents as its answer.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from zerosearch_jax.data.embedded.scripted_agent import Segment
from zerosearch_jax.data.qa import golden_answers, scored_answers
from zerosearch_jax.data.rows import read_rows
from zerosearch_jax.errors import UserError, shown
from zerosearch_jax.files import write_atomically
from zerosearch_jax.text import prompts

LABELS = ("useful", "noisy")
SUFFIXES = (".jsonl", ".json", ".parquet")
_TEXT_KEYS = ("id", "query", "question", "label")
_USER, _ASSISTANT = ("user", "human"), ("assistant", "gpt")
_ALL_DOCUMENTS = 1_000_000  # `cut_documents` requires a limit.

_TASK = "answer the question:"
_ANSWER_IS = re.compile(r"\swhose answer is ")
_OUTPUTS = {f"{label.capitalize()} Output:": label for label in LABELS}


@dataclass(frozen=True)
class Pair:
    """One search as a training example for the simulator.

    Attributes:
      id: "EPISODE/TURN" of the search; "FILE/ROW" of a chat.
      documents: best first.
      question: the question that the searching agent answered.
      golden_answers: its gold answers; the simulator's prompt holds the first. A chat has one.
      label: "useful" or "noisy".
      last: whether it was its episode's last search; True if unknown.
      prompt: a chat's prompt, unchanged; "" for our own pairs.
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

    A row has one of three forms:
      - our own, as the collect job writes it;
      - "messages" or "conversations": a list of turns `{"role", "content"}` or
        `{"from", "value"}`, one by the user and one by the assistant. A system turn is dropped,
        because the simulated engine sends an empty one;
      - "prompt" (a text, or such a list) with "response" or "output".

    Raises:
      UserError: the file is missing, a row has another form, or a prompt is not the simulator's.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise UserError(f"{path}: not a file of pairs; give a file ending in {', '.join(SUFFIXES)}")
    pairs = []
    for number, row in read_rows(path):
        where = f"{path}: row {number}"
        if not isinstance(row, Mapping):
            raise UserError(f"{where}: expected an object, not {type(row).__name__}")
        id_ = f"{path.stem}/{number}"
        pairs.append(_own_pair(where, row) if "documents" in row else _chat_pair(where, id_, row))
    return pairs


def save_pairs(path: str | Path, pairs: Sequence[Pair]) -> None:
    """Writes our own pairs as JSON lines; replaces the file."""
    rows = [{key: value for key, value in asdict(p).items() if key != "prompt"} for p in pairs]
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows))


def pair_segments(pairs: Sequence[Pair], topk: int) -> list[list[Segment]]:
    """Converts pairs to (prompt, documents) segments for fine-tuning.

    Args:
      topk: number of documents that the prompt requests and the completion holds. A chat keeps
        its prompt, which states a number, and all its documents.

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
                    "or collect more documents per search"
                )
            documents = documents[:topk]
            noisy = pair.label == "noisy"
            prompt = prompts.simulator_prompt(
                pair.question, pair.golden_answers[0], pair.query, noisy, "finetuned", topk
            )
        completion = " " + prompts.format_documents(documents)
        examples.append([Segment(prompt, False), Segment(completion, True)])
    return examples


def search_id(episode: Mapping, search: Mapping) -> str:
    """Returns "EPISODE/TURN", the id of a search of an episode record."""
    return f"{episode['id']}/{search['turn']}"


def extract_pairs(
    episodes: Iterable[Mapping],
    labels: Mapping[str, str | None],
    *,
    topk: int,
    last_only: bool,
    balance: bool,
    heldout_share: float,
    seed: int,
) -> tuple[list[Pair], list[Pair], dict[str, dict[str, int]]]:
    """Filters labeled searches into pairs and splits them by gold answer.

    Always dropped:
      * searches without a label, or with fewer than `topk` documents;
      * all searches of an episode with a failed search: the failure may have made its answer, and
        so the labels, wrong;
      * searches of episodes cut by length;
      * repetitions of (question, query, label).

    Args:
      episodes: records of the collect job's first stage.
      labels: "useful", "noisy" or None by `search_id`.
      last_only: keep only the last search of each episode. The rule labels every search of a
        correct episode useful, even one that found nothing; this filter is stricter.
      balance: cut the more frequent label of each part to the size of the other, see `balanced`.
      heldout_share: share of the (first) gold answers whose pairs are held out, chosen by a hash.
        All pairs of one answer stay together, so a paraphrase of a held-out question is not
        trained on.

    Returns:
      Training pairs, held-out pairs, and the counts by label after each filter.
    """
    filters = {
        "searches": lambda pair, episode, search: True,
        "labelled": lambda pair, episode, search: pair.label in LABELS,
        "not failed": lambda pair, episode, search: (
            not any(s["failure"] for s in episode["searches"])
        ),
        f"with {topk} documents": lambda pair, episode, search: len(pair.documents) >= topk,
        "not cut by length": lambda pair, episode, search: episode["finish"] != "length",
    }
    if last_only:
        filters["last of their episode"] = lambda pair, episode, search: pair.last
    counts = {}
    kept = [(_pair(e, s, labels), e, s) for e in episodes for s in e["searches"]]
    for name, keep in filters.items():
        kept = [candidate for candidate in kept if keep(*candidate)]
        counts[name] = _count_labels([pair for pair, *_ in kept])
    unique: dict[tuple[str, str, str], Pair] = {}
    for pair, *_ in kept:
        unique.setdefault((pair.question, pair.query, pair.label), pair)
    counts["without repetitions"] = _count_labels(unique.values())
    parts: dict[str, list[Pair]] = {"train": [], "held out": []}
    for pair in unique.values():
        heldout = stable_hash(f"{seed}/heldout/{pair.golden_answers[0]}") < heldout_share * 2**64
        parts["held out" if heldout else "train"].append(pair)
    if balance:
        parts = {name: balanced(pairs, seed) for name, pairs in parts.items()}
    counts |= {name: _count_labels(pairs) for name, pairs in parts.items()}
    return parts["train"], parts["held out"], counts


def balanced(pairs: Sequence[Pair], seed: int) -> list[Pair]:
    """Returns equally many pairs of each label, in the given order.

    A hash of seed and id decides which pairs stay, so the choice does not depend on the order.
    """
    size = min(sum(pair.label == label for pair in pairs) for label in LABELS)
    kept: set[str] = set()
    for label in LABELS:
        ids = [pair.id for pair in pairs if pair.label == label]
        kept |= set(sorted(ids, key=lambda id_: stable_hash(f"{seed}/balance/{id_}"))[:size])
    return [pair for pair in pairs if pair.id in kept]


def stable_hash(key: str) -> int:
    """Returns a hash in [0, 2⁶⁴) that is the same on every machine and in every run."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big")


def _pair(episode: Mapping, search: Mapping, labels: Mapping[str, str | None]) -> Pair:
    id_ = search_id(episode, search)
    return Pair(
        id=id_,
        query=search["query"],
        documents=tuple(search["documents"]),
        question=episode["question"],
        golden_answers=tuple(episode["golden_answers"]),
        label=labels[id_] or "",
        last=search is episode["searches"][-1],
    )


def _count_labels(pairs: Collection[Pair]) -> dict[str, int]:
    counts = Counter(pair.label for pair in pairs)
    return {label: counts[label] for label in LABELS} | {"all": len(pairs)}


def _own_pair(where: str, row: Mapping) -> Pair:
    for key in _TEXT_KEYS:
        if not isinstance(row.get(key), str) or not row[key]:
            raise UserError(f"{where}: key {key!r} is missing or empty; give a string")
    if row["label"] not in LABELS:
        raise UserError(f"{where}: key 'label' is {shown(row['label'])}; use {' or '.join(LABELS)}")
    documents = row["documents"]
    if not isinstance(documents, list) or not all(isinstance(text, str) for text in documents):
        raise UserError(f"{where}: key 'documents' must be a list of strings")
    if not isinstance(row.get("last"), bool):
        raise UserError(f"{where}: key 'last' must be true or false")
    return Pair(
        **{key: row[key] for key in _TEXT_KEYS},
        documents=tuple(documents),
        golden_answers=scored_answers(where, golden_answers(where, row.get("golden_answers"))),
        last=row["last"],
    )


def _chat_pair(where: str, id_: str, row: Mapping) -> Pair:
    key = next((key for key in ("messages", "conversations", "prompt") if key in row), None)
    if key is None:
        raise UserError(
            f"{where}: needs one of the keys 'documents', 'messages', 'conversations' and "
            f"'prompt', but has only {shown(list(row))[1:-1]}"
        )
    if key == "prompt":
        answer_key = next((name for name in ("response", "output") if name in row), None)
        if answer_key is None:
            raise UserError(f"{where}: a row with 'prompt' also needs 'response' or 'output'")
        prompt, answer = row[key], row[answer_key]
        if isinstance(prompt, list):
            prompt = _only_turn(where, key, prompt, _USER)
    else:
        answer_key = key
        prompt = _only_turn(where, key, row[key], _USER)
        answer = _only_turn(where, key, row[key], _ASSISTANT)
    parsed = parse_prompt(prompt) if isinstance(prompt, str) else None
    if parsed is None:
        raise UserError(
            f"{where}: key {key!r}: the user's text is not the simulator's prompt, which holds a "
            "question, an answer, a query and 'Useful Output:' or 'Noisy Output:'"
        )
    documents = prompts.cut_documents(answer, _ALL_DOCUMENTS) if isinstance(answer, str) else []
    if not documents:
        raise UserError(f"{where}: key {answer_key!r}: the answer holds no document 'Doc 1: …'")
    question, answer, query, label = parsed
    return Pair(
        id=id_,
        query=query,
        documents=tuple(documents),
        question=question,
        golden_answers=(answer,),
        label=label,
        last=True,
        prompt=prompt,
    )


def parse_prompt(text: str) -> tuple[str, str, str, str] | None:
    """Returns question, answer, query and label of the simulator's prompt; None for other texts.

    A prompt has this form. Quotes are optional and whitespace may differ, as in the released sets:

        … answer the question: "QUESTION" whose answer is ANSWER.
        …
        Query: QUERY
        Useful Output:

    The last task counts, because the form "prompted" has an example before it. Each phrase is
    searched from one end of the text, so parsing takes linear time.
    """
    head, _, output = text.rstrip().rpartition("\n")
    head, _, line = head.rstrip().rpartition("\n")
    if not line.lstrip().startswith("Query:"):  # the query is on the next line
        head, _, name = head.rstrip().rpartition("\n")
        line = name.strip() + line if name.strip() == "Query:" else ""
    query = line.strip().removeprefix("Query:").strip()
    # The answer's line ends at or before the last line break of the head.
    answers = list(_ANSWER_IS.finditer(head, 0, max(head.rfind("\n"), 0)))
    task = head.rfind(_TASK, 0, answers[-1].end()) if answers else -1
    if task < 0 or output.strip() not in _OUTPUTS or not query:
        return None
    start = task + len(_TASK)
    found = next((match for match in answers if match.start() >= start), answers[-1])
    question = head[start : found.start()].lstrip().removeprefix('"').rstrip().removesuffix('"')
    answer = head[found.end() :].partition("\n")[0].rstrip().removesuffix(".")
    if not question.strip() or not answer.strip():
        return None
    return question, answer, query, _OUTPUTS[output.strip()]


def _only_turn(where: str, key: str, turns: object, roles: tuple[str, str]) -> str:
    """Returns the text of the only turn by one of `roles`."""
    if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
        raise UserError(f"{where}: key {key!r} must be a list of turns")
    texts = [
        turn.get("content", turn.get("value"))
        for turn in turns
        if turn.get("role", turn.get("from")) in roles
    ]
    if len(texts) != 1 or not isinstance(texts[0], str):
        raise UserError(f"{where}: key {key!r} must hold exactly one text by {' or '.join(roles)}")
    return texts[0]
