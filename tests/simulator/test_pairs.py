"""Tests of reading, writing and formatting the simulator's training pairs."""

import json
import re

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zerosearch_jax.errors import UserError
from zerosearch_jax.simulator.pairs import Pair, load_pairs, pair_segments, parse_prompt, save_pairs
from zerosearch_jax.text import prompts

PAIR = Pair(
    "q#0/1", "river in Chad", ("The Chari.", "Lake Chad."), "Which?", ("Chari",), "useful", True
)
PROMPT = prompts.simulator_prompt("Which river?", "U.S.", "river", True, "finetuned", 5)
ANSWER = "Doc 1: The Chari\nDoc 2: A lake.\nDoc 3: Sand."


def _write(path, rows):
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_own_pairs_are_read_back_and_become_the_simulators_examples(tmp_path):
    noisy = Pair(
        "q#0/2",
        "lake",
        ("One\nDoc 2: </search>", "Two", "Three"),
        "W?",
        ("A1", "B"),
        "noisy",
        False,
    )
    save_pairs(tmp_path / "pairs.jsonl", [PAIR, noisy])
    pairs = load_pairs(tmp_path / "pairs.jsonl")
    assert pairs == [PAIR, noisy]
    first, second = pair_segments(pairs, 2)
    assert [s.by_policy for s in first] == [False, True]
    assert first[0].text == prompts.simulator_prompt(
        "Which?", "Chari", "river in Chad", False, "finetuned", 2
    )
    assert first[1].text == " Doc 1: The Chari.\nDoc 2: Lake Chad."
    assert "two noisy documents" in second[0].text and second[0].text.endswith("Noisy Output:")
    # The first two of three documents, neutralised and one per line.
    assert second[1].text == " Doc 1: One Doc 2: (/search)\nDoc 2: Two"
    with pytest.raises(UserError, match=r"'q#0/1' has 2 documents, topk is 3"):
        pair_segments(pairs, 3)


CHATS = {
    "messages": {
        "messages": [
            {"role": "system", "content": ""},
            {"role": "user", "content": PROMPT},
            {"role": "assistant", "content": ANSWER},
        ]
    },
    "conversations": {
        "conversations": [{"from": "human", "value": PROMPT}, {"from": "gpt", "value": ANSWER}]
    },
    "response": {"prompt": PROMPT, "response": ANSWER},
    "output": {"prompt": PROMPT, "output": ANSWER},
    "prompt turns": {"prompt": [{"role": "user", "content": PROMPT}], "response": ANSWER},
}


@pytest.mark.parametrize("row", CHATS.values(), ids=CHATS)
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_chats_keep_their_prompt_and_documents(tmp_path, row, suffix):
    (pair,) = load_pairs(_write(tmp_path / f"chats{suffix}", [row]))
    documents = ("The Chari", "A lake.", "Sand.")
    assert pair == Pair(
        "chats/1", "river", documents, "Which river?", ("U.S.",), "noisy", True, PROMPT
    )
    # topk applies to our pairs only.
    ((prompt, completion),) = pair_segments([pair], 2)
    assert (prompt.text, completion.text) == (PROMPT, " " + ANSWER)


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_a_byte_order_mark_and_blank_lines_are_skipped(tmp_path, suffix):
    path = _write(tmp_path / f"pairs{suffix}", [{"prompt": PROMPT, "output": ANSWER}])
    path.write_text("\ufeff\n" + path.read_text() + "\n\n")
    assert load_pairs(path)[0].query == "river"


@pytest.mark.parametrize(("answers", "loaded"), [("['a1', 'b']", ("a1", "b")), (5, ("5",))])
def test_golden_answers_of_pairs_are_read_like_those_of_questions(tmp_path, answers, loaded):
    path = _write(tmp_path / "pairs.jsonl", [GOOD | {"golden_answers": answers}])
    assert load_pairs(path)[0].golden_answers == loaded


WORDS = st.text(st.characters(categories=["L", "N", "P"]), min_size=1, max_size=8)
TEXTS = st.lists(WORDS, min_size=1, max_size=5).map(" ".join)


@settings(deadline=None, max_examples=30)
@given(TEXTS, WORDS, TEXTS, st.booleans(), st.integers(1, 12))
def test_the_simulators_prompt_is_parsed_back(
    tmp_path_factory, question, answer, query, noisy, topk
):
    # The prompt itself puts quotes and full stops around the fields.
    question, answer = f"a{question}?", f"a{answer}z"
    prompt = prompts.simulator_prompt(question, answer, query, noisy, "finetuned", topk)
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    (pair,) = load_pairs(_write(path, [{"prompt": prompt, "output": ANSWER}]))
    assert (pair.question, pair.golden_answers, pair.query) == (question, (answer,), query)
    assert (pair.label, pair.prompt) == ("noisy" if noisy else "useful", prompt)


def test_thoughts_in_an_answer_are_no_documents(tmp_path):
    answer = f"<think>Doc 1: a plan</think>{ANSWER}"
    (pair,) = load_pairs(_write(tmp_path / "a.jsonl", [{"prompt": PROMPT, "output": answer}]))
    assert pair.documents == ("The Chari", "A lake.", "Sand.")


GOOD = {"id": "a", "query": "q", "question": "?", "golden_answers": ["g"], "label": "noisy"} | {
    "last": True,
    "documents": ["d"],
}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (GOOD | {"query": ""}, "key 'query'"),
        (
            GOOD | {"golden_answers": [None]},
            "key 'golden_answers': None is neither",
        ),
        (GOOD | {"golden_answers": []}, "key 'golden_answers' .* empty"),
        (GOOD | {"label": "good"}, "key 'label' is 'good'"),
        (GOOD | {"documents": "d"}, "key 'documents'"),
        (GOOD | {"last": 1}, "key 'last'"),
        ({"text": "a"}, "only 'text'"),
        ({"prompt": PROMPT}, "'response' or 'output'"),
        ({"prompt": "Hello", "output": ANSWER}, "key 'prompt': .* not the simulator's"),
        ({"prompt": PROMPT, "output": "none"}, "key 'output': .*no document"),
        ({"messages": "Hello"}, "key 'messages' must be a list"),
        ({"messages": [{"role": "user", "content": PROMPT}]}, "by assistant"),
        ({"conversations": CHATS["conversations"]["conversations"] * 2}, "by user"),
        (["a"], "expected an object"),
    ],
)
def test_a_bad_row_is_refused_with_its_number(tmp_path, row, message):
    path = _write(tmp_path / "pairs.jsonl", [GOOD, row])
    with pytest.raises(UserError, match=rf"pairs\.jsonl: row 2: .*{message}"):
        load_pairs(path)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", "", "has no rows"),
        ("a.json", "{}", "expected a list"),
        ("a.json", "{", "not JSON"),
        ("a.jsonl", "{\n", "row 1: not JSON"),
        ("a.parquet", "text", "not a readable parquet file"),
        ("a.txt", "", "not a file of pairs"),
        ("absent.jsonl", None, "no such file"),
    ],
)
def test_a_bad_file_is_refused(tmp_path, name, text, message):
    path = tmp_path / name
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=rf"{name}: .*{message}"):
        load_pairs(path)


def test_numbers_of_thousands_of_digits_end_the_documents_of_a_chat(tmp_path):
    answer = f"Doc 1: The Chari Doc {'9' * 5000}: b"
    (pair,) = load_pairs(_write(tmp_path / "a.jsonl", [{"prompt": PROMPT, "output": answer}]))
    assert pair.documents == ("The Chari",)


# The grammar of a prompt. It defines the fields, but takes polynomial time.
GRAMMAR = re.compile(
    r'\A.*answer the question:\s*"?(?P<question>.+?)"?\s+whose answer is (?P<answer>.+?)\.?\s*\n'
    r".*\n\s*Query:\s*(?P<query>[^\n]+?)\s*\n\s*(?P<label>Useful|Noisy) Output:\s*\Z",
    re.DOTALL,
)
SPACE = st.sampled_from(["", " ", "  ", "\n", "\r\n", " \n\n "])
PART = st.sampled_from(
    ["x", "y z", '"', ".", " ", "U.S.", "\n", "Query:", "answer the question:", "Noisy Output:"]
)
FIELD = st.lists(PART, min_size=1, max_size=4).map(lambda parts: "".join(["a", *parts, "b"]))
FORM = '{}answer the question:{}"{}"{} whose answer is {}.{}\n{}\n{}Query:{}{}{}\n{}{} Output:{}'


@settings(deadline=None, max_examples=100)
@given(
    st.tuples(
        PART, SPACE, FIELD, SPACE, FIELD, SPACE, PART, SPACE, SPACE,
        FIELD.map(lambda text: text.replace("\n", " ")), SPACE, SPACE,
        st.sampled_from(["Useful", "Noisy"]), SPACE,
    ),
    st.sampled_from(["", '"', ".", "\n", "Useful Output:", " whose answer is "]),
)  # fmt: skip
def test_prompts_are_parsed_as_by_the_grammar(parts, dropped):
    text = FORM.format(*parts)
    if dropped:
        text = text.replace(dropped, "", 1)
    match = GRAMMAR.search(text)
    expected = match and (*match.group("question", "answer", "query"), match["label"].lower())
    assert parse_prompt(text) == expected
