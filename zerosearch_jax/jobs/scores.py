"""Figures of a set of played episodes, under the names of the metric glossary."""

import math
from collections.abc import Sequence

import numpy as np

from zerosearch_jax.rl import rewards
from zerosearch_jax.rollout.trajectory import Trajectory


def reward_of(trajectory: Trajectory, name: str, format_weight: float) -> float:
    """The episode's reward, from the policy's own last answer (FACTS §5, defect 2)."""
    return rewards.score(
        name,
        trajectory.answer,
        trajectory.episode.golden_answers,
        policy_texts=[turn.text for turn in trajectory.turns],
        action_kinds=[turn.action.kind for turn in trajectory.turns],
        format_weight=format_weight,
    )


def answer_scores(trajectories: Sequence[Trajectory], name: str) -> list[float]:
    """ "em", "f1" or "cover_em" of each episode's last answer."""
    return [reward_of(trajectory, name, 0.0) for trajectory in trajectories]


def episode_figures(trajectories: Sequence[Trajectory]) -> dict[str, float]:
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


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if len(values) else 0.0
