"""From rewarded episodes to what an update learns from: advantages, returns and loss weights.

Host code over ragged sequences: each function adds columns to them. The estimators stand in
`rl/advantages.py`; the models that score tokens are the learner's.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import jax.numpy as jnp
import numpy as np

from zerosearch_jax.data.packing import PackedBatch, TokenSequence
from zerosearch_jax.errors import UserError
from zerosearch_jax.rl import advantages as estimators
from zerosearch_jax.rl.losses import aggregation_weights
from zerosearch_jax.rl.objective import KL_ESTIMATORS

ESTIMATORS = ("grpo", "rloo", "reinforce", "reinforce_pp", "ppo")
BY_TOKEN = ("reinforce_pp", "ppo")  # a token's advantage is its own, not its sequence's
BASELINES = ("none", "batch_mean", "group_mean")


@dataclass(frozen=True)
class AdvantageEstimator:
    """How rewards become advantages.

    Attributes:
      name: "grpo"; "rloo"; "reinforce" with a `baseline`; "reinforce_pp": whitened returns of
        each token; "ppo": GAE with a critic, whitened.
      baseline: of "reinforce": "none", "batch_mean" or "group_mean".
      normalize_std: of "grpo": divide by the group's standard deviation (Dr. GRPO does not).
      gamma, gae_lambda: discount of a policy token, and GAE's λ.
    """

    name: str = "grpo"
    baseline: str = "group_mean"
    normalize_std: bool = True
    gamma: float = 1.0
    gae_lambda: float = 1.0

    def __post_init__(self):
        for key, value, known in (
            ("estimator", self.name, ESTIMATORS),
            ("baseline", self.baseline, BASELINES),
        ):
            if value not in known:
                raise UserError(f"rl.{key} is {value!r}; choose one of {', '.join(known)}")


def with_scores(
    sequences: Sequence[TokenSequence],
    batch: PackedBatch,
    scores: dict[str, np.ndarray],
) -> list[TokenSequence]:
    """Adds `scores` `[M, R, T]` of `batch`, which packs `sequences`, as columns."""
    unpacked = {name: batch.unpack(values) for name, values in scores.items()}
    return [
        _with(sequence, **{name: column[i] for name, column in unpacked.items()})
        for i, sequence in enumerate(sequences)
    ]


def with_advantages(
    sequences: Sequence[TokenSequence],
    rewards: np.ndarray,
    estimator: AdvantageEstimator,
    *,
    row_tokens: int,
    kl_in_reward: str = "",
    kl_coef: float = 0.0,
) -> tuple[list[TokenSequence], dict[str, float]]:
    """Adds the column "advantages", and "returns" where there is a critic.

    A KL penalty in the reward is taken off each token's reward ("reinforce_pp", "ppo"), or off
    its sequence's in the sum (the others).

    Args:
      sequences: Q·G, group by group; with "values" for "ppo", and with "old_logprobs" and
        "ref_logprobs" for a KL in the reward.
      rewards: `[Q, G]` of the episodes.
      row_tokens: the longest that a sequence may be; keeps the arrays' shape fixed.
      kl_in_reward: the KL's estimator, a key of `KL_ESTIMATORS`; empty: there is none.

    Returns:
      The sequences and, for a KL in the reward, its mean over policy tokens as "kl".
    """
    mask = _padded([s.mask for s in sequences], row_tokens) > 0
    kl, figures = jnp.zeros(mask.shape), {}
    if kl_in_reward:
        old, ref = (_column(sequences, f"{name}_logprobs", row_tokens) for name in ("old", "ref"))
        kl = KL_ESTIMATORS[kl_in_reward](old, ref, mask)
        figures["kl"] = float(kl.sum() / max(mask.sum(), 1))
    if estimator.name not in BY_TOKEN:
        penalised = rewards - kl_coef * np.asarray(kl.sum(axis=1)).reshape(rewards.shape)
        of_sequence = np.asarray(_group_estimate(estimator, penalised)).ravel()
        return [
            _with(s, advantages=np.full(len(s.tokens), advantage, np.float32))
            for s, advantage in zip(sequences, of_sequence, strict=True)
        ], figures
    per_token = estimators.token_rewards(jnp.asarray(rewards.ravel()), mask, kl=kl, kl_coef=kl_coef)
    columns = {}
    if estimator.name == "ppo":
        raw, columns["returns"] = estimators.gae(
            per_token,
            _column(sequences, "values", row_tokens),
            mask,
            gamma=estimator.gamma,
            gae_lambda=estimator.gae_lambda,
        )
    else:
        raw = estimators.returns_to_go(per_token, mask, gamma=estimator.gamma)
    columns["advantages"] = estimators.whiten(raw, mask)
    host = {name: np.asarray(column) for name, column in columns.items()}
    return [
        _with(s, **{name: column[i, : len(s.tokens)] for name, column in host.items()})
        for i, s in enumerate(sequences)
    ], figures


def with_weights(
    sequences: Sequence[TokenSequence], aggregate: str, fixed_tokens: int
) -> list[TokenSequence]:
    """Adds the column "weights": what each token counts in the loss of these sequences."""
    lengths = np.array([sum(s.mask[1:]) for s in sequences], np.float32)
    weights = aggregation_weights(
        jnp.asarray(lengths), aggregate=aggregate, fixed_tokens=fixed_tokens
    )
    return [
        _with(s, weights=np.full(len(s.tokens), weight, np.float32))
        for s, weight in zip(sequences, np.asarray(weights), strict=True)
    ]


def minibatches(
    sequences: Sequence[TokenSequence], count: int, key: tuple[int, ...]
) -> list[list[TokenSequence]]:
    """The sequences in `count` parts as equal as can be, shuffled by `key` when there are many."""
    order = np.arange(len(sequences))
    if count > 1:
        order = np.random.default_rng(key).permutation(len(sequences))
    return [[sequences[i] for i in sorted(part)] for part in np.array_split(order, count)]


def _group_estimate(estimator: AdvantageEstimator, rewards: np.ndarray):
    estimate: dict[str, Callable] = {
        "grpo": lambda r: estimators.group_advantages(r, normalize_std=estimator.normalize_std),
        "rloo": estimators.leave_one_out_advantages,
        "reinforce": lambda r: estimators.baseline_advantages(r, baseline=estimator.baseline),
    }
    return estimate[estimator.name](jnp.asarray(rewards))


def _with(sequence: TokenSequence, **columns) -> TokenSequence:
    return replace(sequence, columns={**sequence.columns, **columns})


def _column(sequences: Sequence[TokenSequence], name: str, row_tokens: int) -> jnp.ndarray:
    return jnp.asarray(_padded([s.columns[name] for s in sequences], row_tokens))


def _padded(rows: Sequence[Sequence[float]], length: int) -> np.ndarray:
    padded = np.zeros((len(rows), length), np.float32)
    for row, values in zip(padded, rows, strict=True):
        row[: len(values)] = values
    return padded
