"""Tests of removing thoughts from a model's text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zerosearch_jax.text.thoughts import CLOSE, OPEN, continue_thought, without_thoughts


@pytest.mark.parametrize(
    ("text", "rest"),
    [
        ("yes", "yes"),
        (" a < b\n", " a < b\n"),
        ("<think>no</think>yes", "yes"),
        ("a <think>no</think> b <think>no</think> c", "a b c"),
        ("<think>no", ""),
        ("yes <think>no", "yes"),
        ("no</think>yes", "yes"),
        ("no</think>yes<think>no</think>", "yes"),
        ("<think>no<think>no</think>no</think>yes", "yes"),
        ("<think></think>", ""),
        ("<Think>yes</Think>", "<Think>yes</Think>"),
        ("", ""),
    ],
)
def test_only_text_outside_thoughts_remains(text, rest):
    assert " ".join(without_thoughts(text).split()) == " ".join(rest.split())


@given(st.lists(st.sampled_from([OPEN, CLOSE, "x", "<", "think>", "</", "<sea", "rch>"])))
def test_no_think_tag_remains_and_no_tag_forms(fragments):
    text = "".join(fragments)
    rest = without_thoughts(text)
    assert OPEN not in rest and CLOSE not in rest
    assert rest.count("<search>") <= text.count("<search>")
    assert without_thoughts(rest) == rest
    if OPEN not in text and CLOSE not in text:
        assert rest == text


@pytest.mark.parametrize(
    "text", ["<think> hm </think>\n<answer> Lima </answer>", "Doc 1: a\nDoc 2: b"]
)
def test_a_text_after_an_open_thought_keeps_its_thought_and_its_rest(text):
    after_prompt = f"{OPEN}\n{continue_thought(text)}"
    assert without_thoughts(after_prompt).strip() == without_thoughts(text).strip()
    assert after_prompt.count(OPEN) == after_prompt.count(CLOSE) == 1
