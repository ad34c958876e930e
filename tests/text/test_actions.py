"""Tests of parsing actions and final answers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zerosearch_jax.text import prompts
from zerosearch_jax.text.actions import INVALID, Action, final_answer, parse_action


@pytest.mark.parametrize(
    "text, action",
    [
        (
            "<think>hm</think><search> capital of Chad </search>",
            Action("search", "capital of Chad"),
        ),
        ("<answer>N'Djamena</answer>\n\n", Action("answer", "N'Djamena")),
        ("<search>two\nlines</search>,", Action("search", "two\nlines")),
        ("<think>I may <search> or <answer>.</think><search>q</search>", Action("search", "q")),
        ("<answer> a <search> q </search>", Action("search", "q")),
        ("<think>unclosed <search>q</search>", INVALID),
        ("<think>unclosed <answer>a</answer>", INVALID),
        ("<think>a <answer>a</answer> b</think><search>q</search>", Action("search", "q")),
        ("<think>a</think><think>b <answer>a</answer>", INVALID),
        ("<search> a <think> b </search>", INVALID),
        ("the prompt opened this </think><answer>a</answer>", Action("answer", "a")),
        ("<sea<think>x</think>rch>q</search>", INVALID),
        ("<search>q</search><answer>imagined</answer>", Action("search", "q")),
        ("<answer>5 < 6</answer>", Action("answer", "5 < 6")),
        ("", INVALID),
        ("no tags", INVALID),
        ("<search>never closed", INVALID),
        ("never opened</answer>", INVALID),
        ("<search> a </answer>", INVALID),
        ("<answer> a <search> q </answer>", INVALID),
        ("<search> \n </search>", INVALID),
        ("<answer></answer>", INVALID),
        ("<Search>q</Search>", INVALID),
        ("< search >q</ search >", INVALID),
    ],
)
def test_parse_action_follows_the_grammar(text, action):
    assert parse_action(text) == action


def test_forced_answer_needs_only_its_closing_tag():
    assert parse_action(" Lima </answer>\n", open_tag="answer") == Action("answer", "Lima")
    assert parse_action("<answer>Lima</answer>", open_tag="answer") == Action("answer", "Lima")
    assert parse_action("Lima</search>", open_tag="answer") == INVALID
    assert parse_action("Lima", open_tag="answer") == INVALID
    assert parse_action(" </answer>", open_tag="answer") == INVALID
    with pytest.raises(ValueError, match="anser"):
        parse_action("Lima</answer>", open_tag="anser")


@given(
    st.text(alphabet="ab <>/", max_size=20),
    st.sampled_from(["search", "answer"]),
    st.text(alphabet="ab", min_size=1, max_size=5),
    st.text(alphabet=" \n.,", max_size=3),
)
def test_block_that_ends_the_turn_is_the_action(before, kind, content, spare):
    text = f"<think>{before}</think><{kind}>{content}</{kind}>{spare}"
    assert parse_action(text) == Action(kind, content)


def test_final_answer_is_the_last_answer_of_the_policy():
    assert final_answer(["<search>q</search>", "<answer> Lima </answer>"]) == "Lima"
    assert final_answer(["<answer>a</answer>", "<answer>b</answer>"]) == "b"
    assert final_answer(["<answer>a</answer>", "nothing"]) == "a"
    assert final_answer(["<search>q</search>", " Lima</answer>"], open_tag="answer") == "Lima"
    assert final_answer([" Lima</answer>", "<search>q</search>"], open_tag="answer") is None
    assert final_answer(["<think><answer>a</answer>", "<answer>b</answer>"]) == "b"
    assert final_answer(["<answer>a</answer>", "<think>or <answer>b</answer>"]) == "a"
    assert final_answer(["<search>q</search>"]) is None
    assert final_answer([]) is None


def test_answer_cannot_span_turns():
    assert final_answer(["<answer> half", "other half </answer>"]) is None


def test_answers_in_prompt_and_documents_do_not_count():
    """The released code parses the whole episode, which contains answers of others."""
    prompt = prompts.policy_prompt("What is the capital of Peru?")
    turns = ["<think>hm</think><search>Peru</search>", "<think>I do not know."]
    document = prompts.information_block(prompts.format_documents(["<answer>Lima</answer>"]))
    whole_episode = prompt + turns[0] + document + turns[1]
    assert (
        parse_action(prompt[prompt.index("For example") :]).content == "Beijing"
    )  # a parser of the prompt finds it
    assert "Lima" in whole_episode
    assert final_answer(turns) is None
    assert parse_action(document) == INVALID
