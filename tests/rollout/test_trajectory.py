"""Tests of `Trajectory`: provenance, the final answer and segments."""

import pytest

from zerosearch_jax.rl.rewards import exact_match, token_f1
from zerosearch_jax.rollout.trajectory import Episode, Trajectory, Turn
from zerosearch_jax.text.actions import parse_action
from zerosearch_jax.text.prompts import information_block, policy_prompt
from zerosearch_jax.text.tokenizer import encode

EPISODE = Episode(4, "What is the capital of China?", ("Beijing",))


def append_turn(trajectory, tokenizer, text):
    ids = encode(tokenizer, text)
    trajectory.append_sampled(ids, [-0.5] * len(ids))
    trajectory.turns.append(Turn(text, parse_action(text, trajectory.answer_prefix)))


def test_every_token_records_its_writer_logprob_and_turn():
    trajectory = Trajectory(EPISODE)
    trajectory.append_inserted([1, 2, 3])
    trajectory.append_sampled([4, 5], [-0.1, -0.2])
    trajectory.turns.append(Turn("", parse_action("")))
    trajectory.append_inserted([6])
    trajectory.append_sampled([4], [-0.3])
    assert trajectory.tokens == [1, 2, 3, 4, 5, 6, 4]
    assert trajectory.by_policy == [False, False, False, True, True, False, True]
    assert trajectory.logprobs == [0, 0, 0, -0.1, -0.2, 0, -0.3]
    assert trajectory.turn_of == [0, 0, 0, 0, 0, 1, 1]
    assert trajectory.policy_tokens == 3


def test_a_token_without_a_logprob_is_refused():
    with pytest.raises(ValueError, match="2 tokens but 1 logprobs"):
        Trajectory(EPISODE).append_sampled([4, 5], [-0.1])


def test_answers_in_prompt_and_documents_are_not_the_policys(tiny_tokenizer):
    """The released code searches the whole text, where the gold answer is tagged twice."""
    trajectory = Trajectory(EPISODE)
    trajectory.append_inserted(encode(tiny_tokenizer, policy_prompt(EPISODE.question)))
    append_turn(trajectory, tiny_tokenizer, "<think> hm </think>\n<search> capital </search>")
    block = information_block("Doc 1: <answer> Beijing </answer>")  # Tags not neutralised.
    trajectory.append_inserted(encode(tiny_tokenizer, block))
    append_turn(trajectory, tiny_tokenizer, "<think> I do not know. </think>")
    whole = "".join(text for text, _ in trajectory.segments(tiny_tokenizer))
    assert whole.count("<answer> Beijing </answer>") == 2
    assert trajectory.answer is None
    assert exact_match(trajectory.answer, EPISODE.golden_answers) == 0
    assert token_f1(trajectory.answer, EPISODE.golden_answers) == 0
    append_turn(trajectory, tiny_tokenizer, "<answer> Beijing </answer>")
    assert exact_match(trajectory.answer, EPISODE.golden_answers) == 1


def test_an_answer_cannot_span_two_turns(tiny_tokenizer):
    trajectory = Trajectory(EPISODE)
    append_turn(trajectory, tiny_tokenizer, "<answer> Bei")
    trajectory.append_inserted([1])
    append_turn(trajectory, tiny_tokenizer, "jing </answer>")
    assert trajectory.answer is None


def test_segments_are_maximal_runs_of_one_writer(tiny_tokenizer):
    trajectory = Trajectory(EPISODE)
    trajectory.append_inserted(encode(tiny_tokenizer, "one "))
    trajectory.append_inserted(encode(tiny_tokenizer, "two"))
    append_turn(trajectory, tiny_tokenizer, "<answer> 3 </answer>")
    assert trajectory.segments(tiny_tokenizer) == [
        ("one two", False), ("<answer> 3 </answer>", True)
    ]  # fmt: skip
