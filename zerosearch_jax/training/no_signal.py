"""Explains steps and evaluations from which nothing can be learned: the cause and the remedy.

A step has no signal if the rewards that its advantages compare are all equal. The update then
holds only KL and entropy terms, and the progress line looks like any other.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from zerosearch_jax.rollout.trajectory import Trajectory
from zerosearch_jax.search.engine import describe_failures, failure_counts
from zerosearch_jax.training.config import RLConfig

Reason = tuple[str, str]
"""A cause's name, and a sentence with its metrics and the keys that remedy it."""

# A cause explains episodes without an answer if it holds for this share of them.
_MOST = 0.5
_NO_BASELINE = ("reinforce", "none")


class Notices:
    """Prints each cause once per run."""

    def __init__(self):
        self._shown: set[str] = set()

    def show(self, where: str, reason: Reason | None) -> None:
        """Prints the reason, if any, unless its cause was printed before."""
        if reason is not None and reason[0] not in self._shown:
            self._shown.add(reason[0])
            print(f"\nnote: {where}: {reason[1]}", flush=True)


def failed_searches(trajectories: Sequence[Trajectory]) -> Reason | None:
    """Returns how many searches failed, by kind and address; None if none did.

    Each new combination of kinds is a cause, so it is printed once. Queries that are too long for
    the engine are the policy's failures and are not counted.
    """
    results = [result for t in trajectories for _, result in t.searches]
    failed = [result for result in results if result.failure and not result.too_long]
    if not failed:
        return None
    cause = f"failed searches, {', '.join(failure_counts(failed))}"
    return cause, f"{len(failed)} of {len(results)} searches failed ({describe_failures(failed)})"


def unanswered(metrics: Mapping[str, float], limits: str) -> Reason | None:
    """Returns why no episode ended with an answer, or None if one did.

    Args:
      metrics: episode metrics, see `telemetry/metrics.py`.
      limits: config section with `max_turns` and `response_tokens`.
    """
    if metrics["finish_ratio"] > 0:
        return None
    causes = (
        (
            "failed_search_ratio",
            "of the searches failed: fix the search engine or its server",
        ),
        (
            "truncated_ratio",
            f"of the episodes were cut: raise policy.generator.max_tokens or "
            f"{limits}.response_tokens, or lower {limits}.observation_tokens",
        ),
        (
            "invalid_ratio",
            "of the turns have no valid action: the policy does not know the format; fine-tune it "
            f"first (configs/sft_policy.py), or raise {limits}.response_tokens if its turns are "
            "cut",
        ),
    )
    for name, remedy in causes:
        if metrics[name] >= _MOST:
            return f"unanswered, {name}", f"no episode has an answer; {metrics[name]:.0%} {remedy}"
    return (
        "unanswered",
        f"no episode has an answer within its turns; raise {limits}.max_turns, or fine-tune the "
        "policy first (configs/sft_policy.py)",
    )


def no_signal(config: RLConfig, metrics: Mapping[str, float], rewards: np.ndarray) -> Reason | None:
    """Returns why a step's policy gradient is 0, or None if it need not be.

    Args:
      metrics: episode metrics of the step.
      rewards: `[Q, G]` rewards of the episodes to train on.
    """
    if config.rl.overlong == "mask" and metrics["truncated_ratio"] == 1:
        return (
            "masked",
            "every episode was cut, and rl.overlong=mask trains on none; raise "
            "policy.generator.max_tokens or rollout.response_tokens",
        )
    if _differ(config, rewards):
        return None
    if reason := unanswered(metrics, "rollout"):
        return reason
    if metrics["em"] == 1:
        return (
            "right",
            "all answers are right, so no episode is better than another; use harder questions "
            "(data.source), or end the run",
        )
    if metrics["em"] == 0:
        return (
            "wrong",
            "no answer is right and all rewards are equal; use easier questions (data.source), a "
            "better start policy (configs/sft_policy.py) or a reward with partial credit "
            "(reward.name=f1), or raise rollout.group_size",
        )
    return (
        "equal",
        "the episodes of each group have the same reward; raise rollout.group_size or "
        "rollout.temperature, or rollout.max_rounds (dynamic sampling)",
    )


def _differ(config: RLConfig, rewards: np.ndarray) -> bool:
    """Whether the advantages of `rewards` are not all 0, apart from rounding and a critic."""
    estimator, baseline = config.advantage.estimator, config.advantage.baseline
    if estimator == "grpo" and rewards.shape[1] == 1 or (estimator, baseline) == _NO_BASELINE:
        return bool(rewards.any())  # the advantage is the reward
    if estimator in ("grpo", "rloo") or (estimator, baseline) == ("reinforce", "group_mean"):
        return bool((np.ptp(rewards, axis=1) != 0).any())
    return bool(np.ptp(rewards) != 0)
