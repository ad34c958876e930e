"""What an episode is worth: the policy's final answer against the gold answers.

Every score is named for what it computes (the released "EM" is substring
containment and its validation "F1" a copy of it). Nothing here ever sees a prompt or a
document: scores take the answer that `text.actions.final_answer` found in the policy's own
turns, the format takes those turns (defect 2). This module must not know tokens, engines or jax.

All scores are in [0, 1], take the best alias, and give 0 to an episode without an answer.
`episode_reward` makes a reward of them by a rule: ZeroSearch's or another paper's. The other
papers' equations are given as understood from the papers, and "the format" is always ours,
`has_valid_format`: theirs are checked on their own tags and prompts.
"""

import re
import string
from collections import Counter
from collections.abc import Sequence

from zerosearch_jax.errors import UserError

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLE = re.compile(r"\b(a|an|the)\b")
_THINK_FIRST = re.compile(r"\s*<think>(.*?)</think>(.*)", re.DOTALL)


def normalise(text: str) -> str:
    """SQuAD's normal form: lower case, no ASCII punctuation, no a/an/the, single spaces.

    Rajpurkar et al. 2016 (arXiv 1606.05250). Nothing more is normalised, so that figures
    compare with published ones.
    """
    return " ".join(_ARTICLE.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(answer: str | None, golds: Sequence[str]) -> float:
    """1.0 if the normalised answer *equals* a normalised gold answer."""
    _check_golds(golds)
    if answer is None:
        return 0.0
    return float(normalise(answer) in {normalise(gold) for gold in golds})


def token_f1(answer: str | None, golds: Sequence[str]) -> float:
    """Harmonic mean of token precision and recall (bags of tokens), best gold answer.

    The reward of ZeroSearch (arXiv 2505.04588): f = 2 IN / (PN + RN), where IN is the number
    of shared tokens, PN those of the answer, RN those of the gold answer. When either has no
    token after normalisation, 1.0 if both have none, as in SQuAD 2.
    """
    _check_golds(golds)
    if answer is None:
        return 0.0
    return max(_f1(normalise(answer).split(), normalise(gold).split()) for gold in golds)


def _f1(answer: list[str], gold: list[str]) -> float:
    if not answer or not gold:
        return float(answer == gold)
    shared = sum((Counter(answer) & Counter(gold)).values())
    return 2 * shared / (len(answer) + len(gold))


def cover_exact_match(answer: str | None, golds: Sequence[str]) -> float:
    """1.0 if a normalised gold answer stands in the answer as a run of whole tokens.

    The released ZeroSearch code calls containment "EM" (and tests for a substring: there "art"
    is covered by "party", here it is not). It rewards long answers; do not report it as EM.
    """
    _check_golds(golds)
    if answer is None:
        return 0.0
    tokens = normalise(answer).split()
    return float(any(_covers(tokens, normalise(gold).split()) for gold in golds))


def _covers(tokens: list[str], gold: list[str]) -> bool:
    if not gold:  # an empty run stands everywhere; only an empty answer may score with it
        return not tokens
    starts = range(len(tokens) - len(gold) + 1)
    return any(tokens[i : i + len(gold)] == gold for i in starts)


def has_valid_format(policy_texts: Sequence[str], action_kinds: Sequence[str]) -> bool:
    """Whether every turn thinks first and then acts, and only the last turn answers.

    Args:
      policy_texts: the policy's own text of every turn.
      action_kinds: for each turn, the kind that `parse_action` gave: "search", "answer",
        "invalid". An answer whose opening tag was inserted by the caller does not count.

    Raises:
      ValueError: the lengths differ.
    """
    turns = list(zip(policy_texts, action_kinds, strict=True))
    if not turns:
        return False
    wanted = ["search"] * (len(turns) - 1) + ["answer"]
    return list(action_kinds) == wanted and all(_thinks_first(*turn) for turn in turns)


def _thinks_first(text: str, kind: str) -> bool:
    match = _THINK_FIRST.match(text)
    if match is None:
        return False
    thought, rest = match.groups()
    return bool(thought.strip()) and f"<{kind}>" in rest


def format_reward(policy_texts: Sequence[str], action_kinds: Sequence[str]) -> float:
    """1.0 for an episode in the valid format, else 0.0; see `has_valid_format`."""
    return float(has_valid_format(policy_texts, action_kinds))


REWARDS = {"f1": token_f1, "em": exact_match, "cover_em": cover_exact_match}


def score(
    reward: str,
    answer: str | None,
    golds: Sequence[str],
    *,
    policy_texts: Sequence[str] = (),
    action_kinds: Sequence[str] = (),
    format_weight: float = 0.0,
) -> float:
    """The rule "answer": REWARDS[reward] + format_weight * format_reward.

    The paper uses "f1" and no format reward (`format_weight` 0, the texts are not looked at).

    Raises:
      UserError: unknown reward name, or no gold answer.
    """
    if reward not in REWARDS:
        raise UserError(f"reward is {reward!r}: use one of {', '.join(REWARDS)}")
    value = REWARDS[reward](answer, golds)
    if format_weight:
        value += format_weight * format_reward(policy_texts, action_kinds)
    return value


def f1_or_format_credit(f1: float, valid: bool) -> float:
    """ReSearch (arXiv 2503.19470, section 2.3, as understood): F1; 0.1 for the format alone.

    r = F1 if F1 > 0; else 0.1 if the format is valid; else 0
    """
    if f1 > 0:
        return f1
    return 0.1 if valid else 0.0


def f1_or_format_penalty(f1: float, valid: bool) -> float:
    """DeepResearcher (arXiv 2504.03160, as understood): F1 if the format is valid, else -1."""
    return f1 if valid else -1.0


def search_and_format_credit(searches: int, valid: bool) -> float:
    """Stage 1 of R1-Searcher (arXiv 2503.05592, as understood): to learn to search at all.

    r = 0.5 [at least one search] + 0.5 [valid format]
    """
    return 0.5 * (searches > 0) + 0.5 * valid


def f1_minus_format_penalty(f1: float, valid: bool) -> float:
    """Stage 2 of R1-Searcher (as understood): F1, less 2 if the format is not valid."""
    return f1 - 2.0 * (not valid)


RULES = ("answer", "research", "deepresearcher", "r1_searcher")


def episode_reward(
    rule: str,
    answer: str | None,
    golds: Sequence[str],
    *,
    policy_texts: Sequence[str],
    action_kinds: Sequence[str],
    searches: int,
    step: int,
    name: str,
    format_weight: float,
    stage_one_steps: int,
) -> float:
    """What an episode is worth to training.

    Args:
      rule: "answer" (`score`, which reads `name` and `format_weight`), or one paper's rule:
        "research", "deepresearcher", or "r1_searcher", whose first stage lasts
        `stage_one_steps` training steps.
      searches: how many searches the policy made.
      step: the training step, from 0.

    Raises:
      UserError: unknown rule or reward name, or no gold answer.
    """
    if rule == "answer":
        return score(
            name,
            answer,
            golds,
            policy_texts=policy_texts,
            action_kinds=action_kinds,
            format_weight=format_weight,
        )
    f1, valid = token_f1(answer, golds), has_valid_format(policy_texts, action_kinds)
    if rule == "research":
        return f1_or_format_credit(f1, valid)
    if rule == "deepresearcher":
        return f1_or_format_penalty(f1, valid)
    if rule == "r1_searcher":
        if step < stage_one_steps:
            return search_and_format_credit(searches, valid)
        return f1_minus_format_penalty(f1, valid)
    raise UserError(f"reward.rule is {rule!r}: use one of {', '.join(RULES)}")


def _check_golds(golds: Sequence[str]) -> None:
    if isinstance(golds, str):
        raise TypeError("gold answers are one string: pass a sequence of strings")
    if not golds:
        raise UserError("a question has no gold answer: fill golden_answers or drop the row")
