"""What the learner minimises: one policy surrogate and the terms that go with it.

`Objective` names the terms; `policy_terms` and `value_terms` add them up for one microbatch. The
equations stand in `rl/losses.py`; the means' denominators come in the batch as the weight of
each token, so nothing here depends on how a batch is cut or packed.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from zerosearch_jax.errors import UserError
from zerosearch_jax.rl import losses

SURROGATES = ("clip", "sequence", "cispo")
KL_ESTIMATORS = {"k1": losses.kl_k1, "k2": losses.kl_k2, "k3": losses.kl_k3}
KL_PLACES = ("loss", "reward")


@dataclass(frozen=True)
class Objective:
    """The terms of the loss and their coefficients; hashable, so that a step is compiled for it.

    Attributes:
      surrogate: "clip" (PPO, GRPO), "sequence" (GSPO's ratio of a sequence) or "cispo".
      clip_low, clip_high: the ratio's range is [1 - low, 1 + high].
      dual_clip: where an advantage is negative the loss is at most this times its size; 0: off.
      kl_estimator: "k1", "k2" or "k3".
      kl_in: "loss", or "reward": then advantages hold it already.
      entropy: weight of the entropy bonus.
      llds: weight of the likelihood-preserving term.
      importance_cap: largest weight of truncated importance sampling; 0: off.
      temperature: the one that the tokens were sampled at.
      value: weight of the value loss; read only where there is a critic.
      value_clip: how far a value may move from the one that the advantages used; 0: off.
    """

    surrogate: str = "clip"
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float = 0.0
    kl_estimator: str = "k3"
    kl_in: str = "loss"
    entropy: float = 0.001
    llds: float = 0.0
    importance_cap: float = 0.0
    temperature: float = 1.0
    value: float = 0.5
    value_clip: float = 0.2

    def __post_init__(self):
        for name, known in (
            ("surrogate", SURROGATES),
            ("kl_estimator", tuple(KL_ESTIMATORS)),
            ("kl_in", KL_PLACES),
        ):
            if getattr(self, name) not in known:
                raise UserError(
                    f"rl.{name} is {getattr(self, name)!r}; choose one of {', '.join(known)}"
                )


def policy_terms(
    objective: Objective,
    kl_coef: jax.Array,
    logprobs: jax.Array,
    entropy: jax.Array,
    batch: Mapping[str, jax.Array],
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The policy's part of the loss, and sums of figures.

    Args:
      kl_coef: `[]` weight of the KL term; read where `objective.kl_in` is "loss" and the batch
        has "ref_logprobs".
      logprobs, entropy: `[R, T]` of the policy that is trained.
      batch: "mask", "segment_ids", "weights", "advantages", "old_logprobs" and, for a figure
        alone, "correct", all `[R, T]`; also "ref_logprobs" for a KL term and "sampler_logprobs"
        for importance weights.

    Returns:
      The loss `[]`, already divided (by the weights), and sums over the policy's tokens, but for
      names that begin with "loss/" (terms of the loss) or end in "_max".
    """
    mask, old, advantages = batch["mask"], batch["old_logprobs"], batch["advantages"]
    surrogate, clipped = _surrogate(objective, logprobs, old, advantages, batch)
    sums = {"clip_fraction": losses.masked_sum(clipped, mask)}
    if objective.importance_cap:
        weights = losses.truncated_importance_weights(
            old, batch["sampler_logprobs"], mask, cap=objective.importance_cap
        )
        surrogate = surrogate * weights
        at_cap = weights >= objective.importance_cap
        sums["importance_capped"] = losses.masked_sum(at_cap, mask)

    token_weights = jnp.where(mask > 0, batch["weights"], 0.0)

    def term(per_token):
        return losses.masked_sum(per_token * token_weights, mask)

    sums["loss/policy"] = term(surrogate)
    sums["entropy"] = losses.masked_sum(entropy, mask)
    total = sums["loss/policy"] - objective.entropy * term(entropy)
    if objective.kl_in == "loss" and "ref_logprobs" in batch:
        kl = KL_ESTIMATORS[objective.kl_estimator](logprobs, batch["ref_logprobs"], mask)
        sums["kl"] = losses.masked_sum(kl, mask)
        total += kl_coef * term(kl)
    if objective.llds:
        preserving = losses.likelihood_preserving(logprobs, old, advantages, mask)
        sums["loss/llds"] = term(preserving)
        total += objective.llds * sums["loss/llds"]
    return total, sums | _mismatch(logprobs, batch)


def value_terms(
    objective: Objective, values: jax.Array, batch: Mapping[str, jax.Array]
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The critic's part of the loss, and sums of figures.

    Args:
      values: `[R, T]`, of the state in which each policy token was chosen.
      batch: "mask", "weights", and "values" and "returns" as the advantages used them, `[R, T]`.
    """
    mask = batch["mask"]
    loss, clipped = losses.value_loss(
        values, batch["values"], batch["returns"], mask, clip=objective.value_clip
    )
    weights = jnp.where(mask > 0, batch["weights"], 0.0)
    sums = {
        "loss/value": losses.masked_sum(loss * weights, mask),
        "critic/clip_fraction": losses.masked_sum(clipped, mask),
        "critic/value": losses.masked_sum(values, mask),
    }
    return objective.value * sums["loss/value"], sums


def _surrogate(objective, logprobs, old, advantages, batch):
    clip = dict(clip_low=objective.clip_low, clip_high=objective.clip_high)
    given = (logprobs, old, advantages, batch["mask"])
    if objective.surrogate == "sequence":
        return losses.sequence_surrogate(*given, batch["segment_ids"], **clip)
    if objective.surrogate == "cispo":
        return losses.cispo_surrogate(*given, **clip)
    return losses.clipped_surrogate(*given, **clip, dual_clip=objective.dual_clip)


def _mismatch(logprobs, batch):
    """Sampler-learner log-prob difference and log-likelihood of correct trajectories, as sums."""
    mask = batch["mask"] > 0
    sampled = batch.get("sampler_logprobs", batch["old_logprobs"])
    difference = jnp.where(mask, jnp.abs(logprobs - sampled), 0.0)
    right = mask & (batch["correct"] > 0)
    return {
        "sampler_logprob_diff_mean": jnp.sum(difference),
        "sampler_logprob_diff_max": jnp.max(difference),
        "correct_loglik": losses.masked_sum(logprobs, right),
        "correct_tokens": jnp.sum(right.astype(jnp.float32)),
    }
