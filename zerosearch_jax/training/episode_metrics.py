"""Figures of a set of played episodes, under the names of the metric glossary."""

import math
from collections.abc import Sequence

import numpy as np
from ml_collections import ConfigDict

from zerosearch_jax.rl import rewards
from zerosearch_jax.rollout.trajectory import Trajectory


def reward_of(trajectory: Trajectory, step: int, reward: ConfigDict) -> float:
    """The episode's reward in training step `step` (from 0), by a config's `reward` section.

    It reads the policy's own turns and last answer alone; the released code finds answers in
    documents, too.
    """
    return rewards.episode_reward(
        reward.rule,
        trajectory.answer,
        trajectory.episode.golden_answers,
        policy_texts=[turn.text for turn in trajectory.turns],
        action_kinds=[turn.action.kind for turn in trajectory.turns],
        searches=len(trajectory.searches),
        step=step,
        name=reward.name,
        format_weight=reward.format_weight,
        stage_one_steps=reward.stage_one_steps,
    )


def answer_scores(trajectories: Sequence[Trajectory], name: str) -> list[float]:
    """ "em", "f1" or "cover_em" of each episode's last answer."""
    return [rewards.score(name, t.answer, t.episode.golden_answers) for t in trajectories]


def answers(trajectories: Sequence[Trajectory]) -> list[dict]:
    """Each episode's last answer (or None) with its scores and number of searches."""
    return [
        {"answer": t.answer, "em": em, "f1": f1, "searches": len(t.searches)}
        for t, em, f1 in zip(
            trajectories,
            answer_scores(trajectories, "em"),
            answer_scores(trajectories, "f1"),
            strict=True,
        )
    ]


def episode_metrics(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """The glossary's episode metrics (all but "reward", which is the config's)."""
    turns = [turn for t in trajectories for turn in t.turns]
    searches = [result for t in trajectories for _, result in t.searches]
    return {
        "em": _mean(answer_scores(trajectories, "em")),
        "f1": _mean(answer_scores(trajectories, "f1")),
        "cover_em": _mean(answer_scores(trajectories, "cover_em")),
        "searches_per_episode": _mean([len(t.searches) for t in trajectories]),
        "finish_ratio": _mean([t.finish == "answer" for t in trajectories]),
        "invalid_ratio": _mean([turn.action.kind == "invalid" for turn in turns]),
        "truncated_ratio": _mean([t.finish == "length" for t in trajectories]),
        "failed_search_ratio": _mean([bool(result.failure) for result in searches]),
        "policy_tokens_per_episode": _mean([t.policy_tokens for t in trajectories]),
        "tokens_per_episode": _mean([len(t.tokens) for t in trajectories]),
    }


def wilson_interval(successes: float, total: int) -> tuple[float, float]:
    """The 95% score interval of a share (Wilson 1927)."""
    if total == 0:
        return 0.0, 1.0
    z, share = 1.959964, successes / total
    centre = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total**2)) / (1 + z * z / total)
    return max(0.0, centre - half), min(1.0, centre + half)


def bootstrap_interval(
    values: Sequence[float], resamples: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """The 95% percentile interval of a mean over questions (Efron 1979), values in [0, 1]."""
    if not len(values):
        return 0.0, 1.0
    generator, values = np.random.default_rng(seed), np.asarray(values)
    means = [generator.choice(values, len(values)).mean() for _ in range(resamples)]
    low, high = np.percentile(means, (2.5, 97.5))
    return float(low), float(high)


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if len(values) else 0.0
