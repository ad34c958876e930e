"""Rewards, scores and metrics of episodes, under the names of the metric glossary."""

from collections.abc import Sequence

import numpy as np

from zerosearch_jax.rl import rewards
from zerosearch_jax.rollout.trajectory import Trajectory
from zerosearch_jax.search.engine import failure_counts
from zerosearch_jax.training.config import RewardConfig


def reward_of(trajectory: Trajectory, step: int, reward: RewardConfig) -> float:
    """Returns the reward of an episode in training step `step` (from 0).

    It reads only the policy's turns and its last answer. The released code also finds answers in
    documents.
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
    """Returns "em", "f1" or "cover_em" of each episode's last answer."""
    return [rewards.score(name, t.answer, t.episode.golden_answers) for t in trajectories]


def answers(trajectories: Sequence[Trajectory]) -> list[dict]:
    """Returns each episode's last answer (or None), its scores and its number of searches."""
    ems, f1s = (answer_scores(trajectories, name) for name in ("em", "f1"))
    return [
        {"answer": t.answer, "em": em, "f1": f1, "searches": len(t.searches)}
        for t, em, f1 in zip(trajectories, ems, f1s, strict=True)
    ]


def episode_metrics(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """Returns the glossary's episode metrics, except "reward", which depends on the config.

    Kinds of failed searches that did not occur are absent.
    """
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
        **{f"failed_searches/{kind}": float(n) for kind, n in failure_counts(searches).items()},
        "policy_tokens_per_episode": _mean([t.policy_tokens for t in trajectories]),
        "tokens_per_episode": _mean([len(t.tokens) for t in trajectories]),
    }


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if len(values) else 0.0
