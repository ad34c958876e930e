"""Scores and rewards of an episode: the policy's final answer against the gold answers.

Every score is named for what it computes. (The "EM" of the released code is substring containment,
and its validation "F1" is a copy of it.) No function sees a prompt or a document: scores take the
answer that `text.actions.final_answer` found in the policy's own turns, and the format takes these
turns. This module knows no tokens, engines or jax.

Scores are in [0, 1], take the best alias, and are 0 without an answer. `episode_reward` combines
them by a rule, ZeroSearch's or another paper's. The rules of other papers follow our reading of
these papers, with our format check `has_valid_format` in place of their tags and prompts.
"""

import operator
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TypeVar

from zerosearch_jax.errors import UserError
from zerosearch_jax.text.matching import normalise, score_tokens

_INFORMATION_TAG = re.compile(r"<\s*+/?\s*+information\s*+>", re.IGNORECASE)
_Form = TypeVar("_Form", str, list[str])
_THINK_FIRST = re.compile(r"\s*<think>(.*?)</think>(.*)", re.DOTALL)


def exact_match(answer: str | None, golden_answers: Sequence[str]) -> float:
    """Returns 1.0 if the normalised answer *equals* a normalised gold answer, else 0.0."""
    return _best(operator.eq, normalise, answer, golden_answers)


def token_f1(answer: str | None, golden_answers: Sequence[str]) -> float:
    """Returns the F1 of the answer's bag of tokens against the best gold answer.

        F1 = 2 IN / (PN + RN)

    IN is the number of shared tokens, PN that of the answer's and RN that of the gold answer's
    tokens. This is the reward of ZeroSearch (arXiv 2505.04588). A Chinese or Japanese character is
    one token, see `text.matching`.
    """
    return _best(_f1, score_tokens, answer, golden_answers)


def _f1(answer: list[str], gold: list[str]) -> float:
    shared = sum((Counter(answer) & Counter(gold)).values())
    return 2 * shared / (len(answer) + len(gold))


def cover_exact_match(answer: str | None, golden_answers: Sequence[str]) -> float:
    """Returns 1.0 if the answer contains a gold answer as a run of whole tokens, else 0.0.

    The released ZeroSearch code calls containment "EM" and tests for a substring, so that "party"
    contains "art"; here it does not. Containment rewards long answers; do not report it as EM.
    """
    return _best(_covers, score_tokens, answer, golden_answers)


def _covers(tokens: list[str], gold: list[str]) -> bool:
    # Tokens contain no spaces. Unlike comparing slices, searching a text takes linear time.
    return f" {' '.join(gold)} " in f" {' '.join(tokens)} "


def _best(
    compare: Callable[[_Form, _Form], float],
    normal: Callable[[str], _Form],
    answer: str | None,
    golden_answers: Sequence[str],
) -> float:
    """Returns the best `compare` of the normal forms of the answer and a gold answer.

    An empty normal form scores 0. SQuAD's metric would give 1 to an empty answer if the gold answer
    is "The".
    """
    if isinstance(golden_answers, str):
        raise TypeError("golden_answers is one string; pass a sequence of strings")
    if not golden_answers:
        raise UserError("a question has no gold answer; fill golden_answers or drop the row")
    given, golden = normal(answer or ""), filter(None, map(normal, golden_answers))
    return float(max((compare(given, gold) for gold in golden), default=0)) if given else 0.0


def has_valid_format(policy_texts: Sequence[str], action_kinds: Sequence[str]) -> bool:
    """Returns whether every turn thinks first and then acts, and only the last turn answers.

    An information tag in a turn makes the format invalid, also inside a thought: only searches
    insert documents.

    Args:
      policy_texts: the policy's text of every turn.
      action_kinds: the kind of every turn's action from `parse_action`: "search", "answer" or
        "invalid". An answer whose opening tag was inserted does not count.

    Raises:
      ValueError: the lengths differ.
    """
    turns = list(zip(policy_texts, action_kinds, strict=True))
    valid = ["search"] * (len(turns) - 1) + ["answer"]
    return list(action_kinds) == valid and all(_thinks_first(*turn) for turn in turns)


def _thinks_first(text: str, kind: str) -> bool:
    match = _THINK_FIRST.match(text)
    if match is None or _INFORMATION_TAG.search(text):
        return False
    return bool(match[1].strip()) and f"<{kind}>" in match[2]


def format_reward(policy_texts: Sequence[str], action_kinds: Sequence[str]) -> float:
    """Returns 1.0 if `has_valid_format`, else 0.0."""
    return float(has_valid_format(policy_texts, action_kinds))


REWARDS = {"f1": token_f1, "em": exact_match, "cover_em": cover_exact_match}


def score(
    reward: str,
    answer: str | None,
    golden_answers: Sequence[str],
    *,
    policy_texts: Sequence[str] = (),
    action_kinds: Sequence[str] = (),
    format_weight: float = 0.0,
) -> float:
    """Returns the reward of the rule "answer".

        REWARDS[reward] + format_weight * format_reward

    The paper uses "f1" without a format reward. With `format_weight` 0 the texts are not read.

    Raises:
      UserError: unknown reward name, or no gold answer.
    """
    if reward not in REWARDS:
        raise UserError(f"reward.name is {reward!r}; choose one of {', '.join(REWARDS)}")
    value = REWARDS[reward](answer, golden_answers)
    if format_weight:
        value += format_weight * format_reward(policy_texts, action_kinds)
    return value


def f1_or_format_credit(f1: float, valid: bool) -> float:
    """Returns the reward of ReSearch (arXiv 2503.19470, §2.3): F1, or 0.1 for the format alone.

    r = F1 if F1 > 0; else 0.1 if the format is valid; else 0
    """
    return f1 if f1 > 0 else 0.1 * valid


def f1_or_format_penalty(f1: float, valid: bool) -> float:
    """Returns the reward of DeepResearcher (arXiv 2504.03160): F1 in a valid format, else -1."""
    return f1 if valid else -1.0


def search_and_format_credit(searches: int, valid: bool) -> float:
    """Returns the reward of R1-Searcher's stage 1 (arXiv 2503.05592), which teaches to search.

    r = 0.5 [at least one search] + 0.5 [valid format]
    """
    return 0.5 * (searches > 0) + 0.5 * valid


def f1_minus_format_penalty(f1: float, valid: bool) -> float:
    """Returns the reward of R1-Searcher's stage 2: F1, minus 2 if the format is invalid."""
    return f1 - 2.0 * (not valid)


RULES = ("answer", "research", "deepresearcher", "r1_searcher")


def episode_reward(
    rule: str,
    answer: str | None,
    golden_answers: Sequence[str],
    *,
    policy_texts: Sequence[str],
    action_kinds: Sequence[str],
    searches: int,
    step: int,
    name: str,
    format_weight: float,
    stage_one_steps: int,
) -> float:
    """Returns the training reward of an episode.

    Args:
      rule: "answer" (see `score`, which reads `name` and `format_weight`) or the rule of another
        paper: "research", "deepresearcher", or "r1_searcher", whose first stage lasts
        `stage_one_steps` training steps.
      searches: number of searches that the policy made.
      step: training step, from 0.

    Raises:
      UserError: unknown rule or reward name, or no gold answer.
    """
    if rule == "answer":
        return score(
            name,
            answer,
            golden_answers,
            policy_texts=policy_texts,
            action_kinds=action_kinds,
            format_weight=format_weight,
        )
    f1, valid = token_f1(answer, golden_answers), has_valid_format(policy_texts, action_kinds)
    if rule == "research":
        return f1_or_format_credit(f1, valid)
    if rule == "deepresearcher":
        return f1_or_format_penalty(f1, valid)
    if rule == "r1_searcher":
        if step < stage_one_steps:
            return search_and_format_credit(searches, valid)
        return f1_minus_format_penalty(f1, valid)
    raise UserError(f"reward.rule is {rule!r}; choose one of {', '.join(RULES)}")
