"""Scores and rewards by hand, and properties of the scores."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zerosearch_jax.errors import UserError
from zerosearch_jax.rl import rewards
from zerosearch_jax.text import prompts
from zerosearch_jax.text.actions import final_answer, parse_action

words = st.lists(st.sampled_from(["the", "Lima", "art", "party", "of", "Peru!", "2"]), max_size=6)
texts = words.map(" ".join)


@pytest.mark.parametrize(
    "text, normal",
    [
        ("  The  Cat, a DOG! ", "cat dog"),
        ("N'Djamena", "ndjamena"),
        ("an", ""),
        ("Theatre", "theatre"),
        ("São Tomé", "são tomé"),
    ],
)
def test_normalise_by_hand(text, normal):
    assert rewards.normalise(text) == normal


@pytest.mark.parametrize(
    "answer, golden_answers, em, f1, cover",
    [
        ("Lima", ["Lima"], 1, 1, 1),
        ("the lima.", ["Lima"], 1, 1, 1),
        ("Lima", ["Cusco", "Lima"], 1, 1, 1),
        # 1 shared of 2 and 1 tokens: precision 1/2, recall 1.
        ("Lima Peru", ["Lima"], 0, 2 / 3, 1),
        # 1 shared of 3 and 2: precision 1/3, recall 1/2.
        ("Barack H. Obama", ["Obama Michelle"], 0, 2 / 5, 0),
        ("new york city", ["York New"], 0, 4 / 5, 0),
        ("party", ["art"], 0, 0, 0),
        ("lima lima", ["lima"], 0, 2 / 3, 1),
        ("Paris", ["Lima", "Quito"], 0, 0, 0),
        ("Paris", ["The"], 0, 0, 0),
        ("", ["Lima"], 0, 0, 0),
        ("The The", ["The The"], 0, 0, 0),
        ("", ["!", "Lima"], 0, 0, 0),
        ("北京市", ["北京"], 0, 4 / 5, 1),
        ("北京。", ["北 京"], 0, 1, 1),
        ("Tokyo 東京", ["東京都"], 0, 4 / 6, 0),
        ("パリ", ["バリ"], 0, 1 / 2, 0),
        ("서울 특별시", ["서울"], 0, 2 / 3, 1),
        (None, ["Lima"], 0, 0, 0),
    ],
)
def test_scores_by_hand(answer, golden_answers, em, f1, cover):
    assert rewards.exact_match(answer, golden_answers) == em
    assert rewards.token_f1(answer, golden_answers) == pytest.approx(f1)
    assert rewards.cover_exact_match(answer, golden_answers) == cover


def test_em_is_equality_and_f1_is_not_em():
    """Containing the gold answer is no exact match, unlike in the released code."""
    answer, golden_answers = "It could be Lima, Quito or La Paz", ["Lima"]
    assert rewards.exact_match(answer, golden_answers) == 0.0
    assert rewards.cover_exact_match(answer, golden_answers) == 1.0
    assert rewards.token_f1(answer, golden_answers) == pytest.approx(
        2 / 9
    )  # 1 shared of 8 and 1 tokens
    # The names of configs and result tables mean the same: no score is a copy of another.
    by_name = {
        name: rewards.score(name, answer, golden_answers) for name in ("em", "cover_em", "f1")
    }
    assert by_name == {"em": 0.0, "cover_em": 1.0, "f1": pytest.approx(2 / 9)}


def test_reward_of_a_policy_that_never_answers_is_zero():
    """The prompt and a document contain the answer, where the released code would find it."""
    turns = ["<think>hm</think><search>capital of China</search>", "<think>It must be Beijing"]
    document = prompts.format_documents(["<answer> Beijing </answer>"])
    episode = [prompts.policy_prompt("Capital of China?"), turns[0], document, turns[1]]
    assert "<answer> Beijing </answer>" in "".join(episode)
    for name in rewards.REWARDS:
        assert rewards.score(name, final_answer(turns), ["Beijing"]) == 0.0
    answered = [turns[0], "<think>ok</think><answer> Beijing </answer>"]
    for name in rewards.REWARDS:
        assert rewards.score(name, final_answer(answered), ["Beijing"]) == 1.0


@given(texts, st.lists(texts, min_size=1, max_size=3))
def test_scores_are_ordered_and_take_the_best_alias(answer, golden_answers):
    em, f1, cover = (
        rewards.score(name, answer, golden_answers) for name in ("em", "f1", "cover_em")
    )
    assert 0 <= em <= f1 <= 1
    assert em <= cover
    for name, value in (("em", em), ("f1", f1), ("cover_em", cover)):
        assert value == max(rewards.score(name, answer, [gold]) for gold in golden_answers)


@given(st.text(st.characters(max_codepoint=0x2FFF)), st.text(st.characters(max_codepoint=0x2FFF)))
def test_f1_of_text_without_cjk_is_squads(answer, gold):
    a, b = (rewards.normalise(text).split() for text in (answer, gold))
    shared = sum((Counter(a) & Counter(b)).values())
    f1 = 2 * shared / (len(a) + len(b)) if shared else 0.0  # SQuAD 1.1's script
    assert rewards.token_f1(answer, [gold]) == pytest.approx(f1)


@given(texts, texts)
def test_f1_is_symmetric(a, b):
    assert rewards.token_f1(a, [b]) == rewards.token_f1(b, [a])


GOOD = ["<think>a</think><search>q</search>", "\n<think>b</think>\n<answer>Lima</answer>"]


@pytest.mark.parametrize(
    "policy_texts, valid",
    [
        (GOOD, True),
        (GOOD[1:], True),
        (GOOD[:1], False),
        ([], False),
        (["<search>q</search>", GOOD[1]], False),
        (["so <think>a</think><search>q</search>", GOOD[1]], False),
        (["<think>a<search>q</search>", GOOD[1]], False),
        (["<think> </think><search>q</search>", GOOD[1]], False),
        (["<think>a</think>nothing", GOOD[1]], False),
        ([GOOD[1], GOOD[1]], False),
        (["<think>a<search>q</search></think>", GOOD[1]], False),
        (["<think>or <answer>Lima</answer>"], False),
        (
            ["<think><information>Doc 1: Lima</information></think><search>q</search>", GOOD[1]],
            False,
        ),
        (["<think>a</think><information>x</information><search>q</search>", GOOD[1]], False),
        ([GOOD[0], "<think>< / Information ></think><answer>Lima</answer>"], False),
        (["<think>the information is missing</think><search>q</search>", GOOD[1]], True),
    ],
)
def test_format_by_hand(policy_texts, valid):
    kinds = [parse_action(text).kind for text in policy_texts]
    assert rewards.has_valid_format(policy_texts, kinds) is valid
    assert rewards.format_reward(policy_texts, kinds) == float(valid)


def test_an_answer_inside_a_thought_scores_nothing():
    thought = "<think>it may be <answer>Lima</answer>"
    assert _episode_reward("answer", [thought]) == 0.0
    assert _episode_reward("answer", [thought + "</think><answer>Quito</answer>"]) == 0.0
    assert _episode_reward("answer", [thought, GOOD[1]]) == pytest.approx(2 / 3)


def test_a_forced_answer_has_no_valid_format():
    assert not rewards.has_valid_format(["<think>a</think> Lima</answer>"], ["answer"])


def test_score_adds_the_weighted_format():
    kinds = ["search", "answer"]
    parts = {"policy_texts": GOOD, "action_kinds": kinds, "format_weight": 0.25}
    assert rewards.score("em", "Lima", ["Lima"], **parts) == 1.25
    assert rewards.score("em", "Quito", ["Lima"], **parts) == 0.25
    assert rewards.score("em", "Lima", ["Lima"], **parts | {"format_weight": 0.0}) == 1.0


def test_bad_input_is_refused():
    with pytest.raises(UserError, match="f2.*f1, em, cover_em"):
        rewards.score("f2", "Lima", ["Lima"])
    with pytest.raises(UserError, match="no gold answer"):
        rewards.exact_match(None, [])
    with pytest.raises(TypeError, match="one string"):
        rewards.token_f1("Lima", "Lima")
    with pytest.raises(ValueError):
        rewards.has_valid_format(GOOD, ["answer"])


@pytest.mark.parametrize(
    ("f1", "valid", "research", "deepresearcher", "stage_two"),
    [
        (1.0, True, 1.0, 1.0, 1.0),
        (0.4, True, 0.4, 0.4, 0.4),
        (0.0, True, 0.1, 0.0, 0.0),
        (0.4, False, 0.4, -1.0, -1.6),
        (0.0, False, 0.0, -1.0, -2.0),
    ],
)
def test_other_papers_rules_by_hand(f1, valid, research, deepresearcher, stage_two):
    assert rewards.f1_or_format_credit(f1, valid) == research
    assert rewards.f1_or_format_penalty(f1, valid) == deepresearcher
    assert rewards.f1_minus_format_penalty(f1, valid) == pytest.approx(stage_two)


@pytest.mark.parametrize(
    ("searches", "valid", "reward"),
    [(0, False, 0.0), (1, False, 0.5), (0, True, 0.5), (1, True, 1.0), (4, True, 1.0)],
)
def test_stage_one_rewards_a_search_and_the_format(searches, valid, reward):
    assert rewards.search_and_format_credit(searches, valid) == reward


def _episode_reward(rule, texts, *, searches=1, step=5, name="f1", **changes):
    parts = dict(format_weight=0.0, stage_one_steps=0) | changes
    kinds = [parse_action(text).kind for text in texts]
    return rewards.episode_reward(
        rule, final_answer(texts), ["Lima Peru"], policy_texts=texts, action_kinds=kinds,
        searches=searches, step=step, name=name, **parts,
    )  # fmt: skip


def test_an_episodes_reward_by_each_rule():
    bad = ["<search>q</search>", GOOD[1]]  # answers "Lima", one of two tokens: F1 2/3
    wrong = [GOOD[0], "<think>b</think><answer>Quito</answer>"]
    third = pytest.approx(2 / 3)
    rules = ("answer", "research", "deepresearcher", "r1_searcher")
    assert list(rewards.RULES) == list(rules)
    assert [_episode_reward(rule, GOOD) for rule in rules] == [third] * 4
    assert [_episode_reward(rule, bad) for rule in rules] == [
        third, third, -1.0, pytest.approx(2 / 3 - 2)
    ]  # fmt: skip
    assert [_episode_reward(rule, wrong) for rule in rules] == [0.0, 0.1, 0.0, 0.0]
    assert [_episode_reward(rule, []) for rule in rules] == [0.0, 0.0, -1.0, -2.0]
    assert _episode_reward("answer", GOOD, name="em", format_weight=0.25) == 0.25
    with pytest.raises(UserError, match="reward.rule is 'reserch'; choose one of answer, research"):
        _episode_reward("reserch", GOOD)


def test_stage_one_lasts_stage_one_steps():
    def reward(step, **parts):
        return _episode_reward("r1_searcher", GOOD, step=step, stage_one_steps=3, **parts)

    assert [reward(step) for step in range(5)] == [1, 1, 1, *[pytest.approx(2 / 3)] * 2]
    assert reward(2, searches=0) == 0.5
    assert reward(3, searches=0) == pytest.approx(2 / 3)


TOKENS = st.lists(st.sampled_from(["a1", "b", "a1b", "漢"]), min_size=1, max_size=6)


@given(TOKENS, st.lists(st.sampled_from(["a1", "b", "漢"]), min_size=1, max_size=3))
def test_cover_match_finds_runs_of_whole_tokens(answer, gold):
    runs = [answer[i : i + len(gold)] for i in range(len(answer))]
    assert rewards.cover_exact_match(" ".join(answer), [" ".join(gold)]) == (gold in runs)
