"""Damaged and hostile data files: a loader returns rows or raises a UserError with the file."""

import contextlib
import copy
import csv
import datetime
import decimal
import gzip
import io
import json
import os
from random import Random

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from zerosearch_jax.data.passages import load_passages
from zerosearch_jax.data.qa import load_qa
from zerosearch_jax.data.recordings import load_recording
from zerosearch_jax.errors import UserError
from zerosearch_jax.search.bm25 import BM25Engine
from zerosearch_jax.search.web import RecordedWeb, record_of
from zerosearch_jax.simulator.pairs import load_pairs, pair_segments
from zerosearch_jax.text import prompts

QUESTIONS = [
    {
        "id": f"q{i}",
        "question": question,
        "golden_answers": ["Chari", "the Chari"],
        "data_source": "nq",
        "reward_model": {"ground_truth": {"target": ["Chari"]}},
    }
    for i, question in enumerate(["Which river?", "哪条河？", 'the "river"?'])
]
PASSAGES = [{"id": i, "contents": f'"Chad {i}"\nThe river is the Chari.'} for i in range(3)]
RECORDING = [
    record_of(q, [{"title": "Chad", "snippet": f"{q} river", "link": f"https://a.example/{q}#x"}])
    for q in ("one", "two")
]
PAIRS = [
    {"id": f"e/{i}", "query": "river", "question": "Which?", "golden_answers": ["Chari"]}
    | {"documents": ["The Chari.", "A lake."], "label": label, "last": True}
    for i, label in enumerate(["useful", "noisy"])
]
PROMPT = prompts.simulator_prompt("Which?", "Chari", "river", True, "finetuned", 2)
CHATS = [
    {"messages": [{"role": "user", "content": PROMPT}]}
    | {"id": i, "response": "Doc 1: The Chari\nDoc 2: Sand", "prompt": PROMPT}
    for i in range(2)
]
for chat in CHATS:
    chat["messages"].append({"role": "assistant", "content": chat["response"]})
RESPONSES = [{key: chat[key] for key in ("prompt", "response")} for chat in CHATS]


def _qa(path):
    return load_qa(path, "test"), lambda rows: [prompts.policy_prompt(r.question) for r in rows]


def _passages(path):
    return load_passages(path), lambda rows: BM25Engine(rows).ranked("river", 2)


def _recording(path):
    return load_recording(path), lambda rows: RecordedWeb(rows, topk=2, blocked_domains=["b.c"])


def _pairs(path):
    return load_pairs(path), lambda rows: pair_segments(rows, 2)


FILES = {
    "questions.jsonl": (_qa, QUESTIONS),
    "questions.parquet": (_qa, QUESTIONS),
    "questions.tsv": (_qa, QUESTIONS),
    "questions.csv": (_qa, QUESTIONS),
    "passages.jsonl": (_passages, PASSAGES),
    "recording.jsonl": (_recording, RECORDING),
    "pairs.jsonl": (_pairs, PAIRS),
    "pairs.json": (_pairs, PAIRS),
    "pairs.parquet": (_pairs, PAIRS),
    "chats.jsonl": (_pairs, CHATS),
    "chats.json": (_pairs, RESPONSES),
    "chats.parquet": (_pairs, CHATS),
}

TEXTS = [  # of JSON strings and of table cells
    "", " ", "!", "\0", "\ud800", "a\udfffb", "['x', '\\ud800']", '["\\ud800"]', "['x'", "[1",
    "[" * 100_000 + "]" * 100_000, "[" + "1" * 5000 + "]", "['a' 'b']", '"', 'a"b', "a\nb", "a\rb",
    "[" + " " * 20_000 + "x]", "[1" + " " * 20_000 + "x]", "[" + "1" * 20_000 + "x]", "['\\x']",
    "http://[bad#x", "http://a\u2100b/", "http://" + "\u0301\u0316" * 20_000, "x" * 200_000,
    f"Doc 1: a Doc {'1' * 5000}: b", "Doc " * 20_000, "\u0301\u0316" * 20_000, "<" + " " * 20_000,
    "answer the question: q whose answer is a\n" + "\n" * 20_000, "Query: \n" * 5_000,
]  # fmt: skip
TOKENS = [  # JSON values that are not texts
    "1" * 400, "1" * 5000, "-" + "1" * 5000, "1e999", "1.50", "NaN", "-Infinity", "null", "true",
    "[]", "{}", "[[]]", "[null]", '{"a": 1, "a": 2}', "[" * 100_000, '{"a":' * 100_000,
    "[" * 200 + "]" * 200, "[" * 600 + "]" * 600, "0x1", "'a'", "", "[1,]",
]  # fmt: skip
VALUES = [  # of parquet columns
    b"\xff", b"text", None, 1.5, float("nan"), 2**62, True, [], [None], [[["a"]]], {"a": {"b": 1}},
    decimal.Decimal("1.50"), datetime.date(1, 1, 1), datetime.timedelta(7), [b"\xff"], "", "\0",
    datetime.datetime(9999, 12, 31, tzinfo=datetime.UTC), {"ground_truth": 5}, [{"role": 1}],
    [{"role": "user", "content": None}], "x" * 200_000,
    pyarrow.scalar(2**60, pyarrow.timestamp("us")), pyarrow.scalar(1, pyarrow.timestamp("ns")),
    pyarrow.scalar(1, pyarrow.timestamp("s", "No/Zone")),
]  # fmt: skip
BYTES = [
    b"\0", b"\xff", b"\xff\xfe", b"\xed\xa0\x80", b"\xef\xbb\xbf", b'"', b"\\", b"\\ud800", b"[",
    b"[" * 100_000, b"1" * 5000, b"\r", b"\n", b"\t", b",", b"{", b"}", b"x" * 200_000, b"\x1a",
]  # fmt: skip


def _nodes(value):
    """Yields (container, key) of every value in nested dicts and lists."""
    for key, child in value.items() if isinstance(value, dict) else enumerate(value):
        yield value, key
        if isinstance(child, dict | list):
            yield from _nodes(child)


def _change_rows(rows: list, rng: Random, hostile: list) -> list:
    """Replaces, drops or renames values of the rows."""
    rows = copy.deepcopy(rows)
    for _ in range(rng.randint(0, 3)):
        if not (nodes := list(_nodes(rows))):
            break
        container, key = rng.choice(nodes)
        change = rng.randrange(4)
        if change == 0:
            del container[key]
        elif change == 1 and isinstance(container, dict):
            container[rng.choice(["\ud800", "", "documents", "prompt"])] = container.pop(key)
        else:
            container[key] = rng.choice(hostile)
    return rows


def _content(suffix: str, rows: list, rng: Random) -> bytes:
    """Writes the rows, after changes, in the format of the suffix."""
    if suffix == ".parquet":
        columns = {key: [row.get(key) for row in rows] for key in rows[0]}
        for _ in range(rng.randint(0, 3)):
            value = rng.choice(VALUES)
            columns[rng.choice(sorted(columns))] = [value] * len(rows)
        file = io.BytesIO()
        try:
            table = pyarrow.table({k: pyarrow.array(v) for k, v in columns.items()})
            pyarrow.parquet.write_table(table, file)
        except (pyarrow.ArrowException, UnicodeEncodeError):
            reject()  # a file that cannot be written
        return file.getvalue()
    if suffix in (".tsv", ".csv"):
        cells = [[row["question"], str(row["golden_answers"])] for row in rows]
        file = io.StringIO()
        delimiter = "\t" if suffix == ".tsv" else ","
        changed = [
            row if isinstance(row, list) else [row] for row in _change_rows(cells, rng, TEXTS)
        ]
        csv.writer(file, delimiter=delimiter).writerows(changed)
        return file.getvalue().encode("utf-8", "surrogatepass")
    marks = [f"@{i}@" for i in range(len(TOKENS))]
    changed = _change_rows(rows, rng, TEXTS + marks)
    text = json.dumps(changed) if suffix == ".json" else "\n".join(map(json.dumps, changed))
    for mark, token in zip(marks, TOKENS, strict=True):
        text = text.replace(f'"{mark}"', token)
    return text.encode()


def _damage(content: bytes, rng: Random) -> bytes:
    """Truncates, flips, inserts or re-encodes bytes."""
    kind, at = rng.randrange(8), rng.randint(0, len(content))
    if kind == 0:
        return content[:at]
    if kind == 1:
        return content[:at] + rng.choice(BYTES) + content[at:]
    if kind == 2 and at < len(content):
        return content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :]
    if kind == 3:
        whole = [
            lambda text: text.encode("utf-16", "surrogatepass"),
            lambda text: text.encode("utf-16-le", "surrogatepass"),
            lambda text: gzip.compress(text.encode("utf-8", "surrogatepass")),
            lambda text: b"",
        ]
        return rng.choice(whole)(content.decode("utf-8", "replace"))
    return content


@pytest.mark.parametrize("tries", [8, pytest.param(500, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_gives_rows_or_one_line_that_names_it(tmp_path, tally, name, tries):
    load, rows = FILES[name]
    path = tmp_path / name
    path.write_bytes(_content(path.suffix, rows, _Unchanged()))
    loaded, use = load(str(path))
    assert len(loaded) == len(rows) and use(loaded)
    seen = {"tries": 0}

    @settings(settings.get_profile("fuzz"), max_examples=tries)
    @given(st.randoms(use_true_random=True))
    def check(rng):
        content = _damage(_content(path.suffix, rows, rng), rng)
        path.write_bytes(content)
        seen["tries"] += 1
        try:
            loaded, use = load(str(path))
        except UserError as error:
            line = str(error)
            assert name in line and "\n" not in line and len(line) < 1000 + len(str(path))
            return
        assert loaded
        # No text that a later step could not write or tokenise.
        json.dumps(loaded, default=vars, ensure_ascii=False).encode()
        with contextlib.suppress(UserError):  # for example, no passage has a word
            use(loaded)

    failed = True
    try:
        check()
        failed = False
    finally:
        tally(f"damaged {name}", seen["tries"], int(failed))


class _Unchanged(Random):
    """Draws no changes."""

    def randint(self, a, b):
        return a


def _directory(path):
    path.mkdir()


def _gzip(path):
    path.write_bytes(gzip.compress(b"{}"))


@pytest.mark.parametrize(
    "make",
    [_directory, os.mkfifo, _gzip, lambda path: path.symlink_to("nowhere"),
     lambda path: path.symlink_to(path.name), lambda path: path.touch()],
    ids=["directory", "fifo", "gzip", "broken link", "link loop", "empty"],
)  # fmt: skip
@pytest.mark.parametrize("name", FILES)
def test_a_path_that_is_no_data_file_is_refused(tmp_path, name, make):
    make(tmp_path / name)
    with pytest.raises(UserError, match=name):
        FILES[name][0](str(tmp_path / name))


@pytest.mark.parametrize("stem", ["a" * 300, "a\0b", "a\ud800b"])
@pytest.mark.parametrize("name", FILES)
def test_a_name_that_no_file_can_have_is_refused(tmp_path, name, stem):
    with pytest.raises(UserError, match="no such file"):
        FILES[name][0](str(tmp_path / f"{stem}.{name}"))
