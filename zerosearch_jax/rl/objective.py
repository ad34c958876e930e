"""The learner's loss: one policy surrogate, its extra terms, and the critic's term.

`policy_terms` and `value_terms` sum the terms of one microbatch. `rl/losses.py` has the equations.
Each token's `weights` entry already contains the denominator of the mean, so the sums do not depend
on how a batch is cut or packed.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax

from zerosearch_jax.rl import losses
from zerosearch_jax.rl.batch import LearnerBatch
from zerosearch_jax.rl.config import CriticConfig, KLConfig, LossConfig


@dataclass(frozen=True)
class Objective:
    """Settings of the loss; hashable, because a learner step is compiled for one objective.

    Attributes:
      loss: settings of the policy loss.
      kl: settings of the KL penalty. `kl.coef` is not read: a step takes the coefficient as an
        argument, because it may adapt.
      critic: settings of the value loss, read only if there is a critic.
      temperature: temperature at which the tokens were sampled.
      on_policy: the trained policy is the old policy, as in a step's first update. Its log-probs
        are then also the old log-probs: every ratio is exactly 1, and `old_logprobs` is not read.
        Another program's log-probs differ by rounding, in bfloat16 by about 0.01 per token.
    """

    loss: LossConfig = LossConfig()
    kl: KLConfig = KLConfig()
    critic: CriticConfig = CriticConfig()
    temperature: float = 1.0
    on_policy: bool = False


def policy_terms(
    objective: Objective,
    kl_coef: jax.Array,
    logprobs: jax.Array,
    entropy: jax.Array,
    batch: LearnerBatch,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns the policy's part of the loss, and metrics as sums.

    Args:
      kl_coef: `[]` weight of the KL term; read if `objective.kl.apply_to` is "loss" and the batch
        has `ref_logprobs`.
      logprobs, entropy: `[R, T]` of the policy that is trained.
      batch: one microbatch with `weights`, `advantages`, `old_logprobs` and, for a metric,
        `correct`. A KL term also reads `ref_logprobs`; importance weights also read
        `sampler_logprobs`, and so do metrics if it is set.

    Returns:
      The loss `[]`, already a mean because of the weights, and metrics. Metrics are sums over the
      policy's tokens, except terms of the loss ("loss/…") and maxima ("…_max").
    """
    loss, mask, old = objective.loss, batch.mask, batch.old_logprobs
    if objective.on_policy:
        old = lax.stop_gradient(logprobs)
    surrogate, clipped = _surrogate(loss, logprobs, old, batch)
    sums = {"clip_fraction": losses.masked_sum(clipped, mask)}
    if loss.importance_cap:
        weights = losses.truncated_importance_weights(
            old, batch.sampler_logprobs, mask, cap=loss.importance_cap
        )
        surrogate = surrogate * weights
        sums["importance_capped"] = losses.masked_sum(weights >= loss.importance_cap, mask)

    token_weights = jnp.where(mask > 0, batch.weights, 0.0)

    def term(per_token):
        return losses.masked_sum(per_token * token_weights, mask)

    sums["loss/policy"] = term(surrogate)
    sums["entropy"] = losses.masked_sum(entropy, mask)
    total = sums["loss/policy"] - loss.entropy * term(entropy)
    if objective.kl.apply_to == "loss" and batch.ref_logprobs is not None:
        kl = losses.KL_ESTIMATORS[objective.kl.estimator](logprobs, batch.ref_logprobs, mask)
        sums["kl"] = losses.masked_sum(kl, mask)
        total += kl_coef * term(kl)
    if loss.llds:
        preserving = losses.likelihood_preserving(logprobs, old, batch.advantages, mask)
        sums["loss/llds"] = term(preserving)
        total += loss.llds * sums["loss/llds"]
    return total, sums | _diagnostics(logprobs, batch)


def value_terms(
    objective: Objective, values: jax.Array, batch: LearnerBatch
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns the critic's part of the loss, and metrics as sums (see `policy_terms`).

    Args:
      values: `[R, T]` values of the states in which the policy tokens were chosen.
      batch: one microbatch with `weights`, and the `values` and `returns` of GAE.
    """
    mask, critic = batch.mask, objective.critic
    loss, clipped = losses.value_loss(
        values, batch.values, batch.returns, mask, clip=critic.value_clip
    )
    weights = jnp.where(mask > 0, batch.weights, 0.0)
    sums = {
        "loss/value": losses.masked_sum(loss * weights, mask),
        "critic/clip_fraction": losses.masked_sum(clipped, mask),
        "critic/value": losses.masked_sum(values, mask),
    }
    return critic.coef * sums["loss/value"], sums


def _surrogate(
    loss: LossConfig, logprobs: jax.Array, old_logprobs: jax.Array, batch: LearnerBatch
) -> tuple[jax.Array, jax.Array]:
    clip = dict(clip_low=loss.clip_low, clip_high=loss.clip_high)
    inputs = (logprobs, old_logprobs, batch.advantages, batch.mask)
    if loss.surrogate == "sequence":
        return losses.sequence_surrogate(*inputs, batch.segment_ids, **clip)
    if loss.surrogate == "cispo":
        return losses.cispo_surrogate(*inputs, **clip)
    return losses.clipped_surrogate(*inputs, **clip, dual_clip=loss.dual_clip)


def _diagnostics(logprobs: jax.Array, batch: LearnerBatch) -> dict[str, jax.Array]:
    """Sampler-learner log-prob differences (sum, maximum) and log-prob sums of correct episodes."""
    mask = batch.mask > 0
    sampled = batch.old_logprobs if batch.sampler_logprobs is None else batch.sampler_logprobs
    difference = jnp.where(mask, jnp.abs(logprobs - sampled), 0.0)
    correct = mask & (batch.correct > 0)
    return {
        "sampler_logprob_diff_mean": jnp.sum(difference),
        "sampler_logprob_diff_max": jnp.max(difference),
        "correct_loglik": losses.masked_sum(logprobs, correct),
        "correct_tokens": jnp.sum(correct.astype(jnp.float32)),
    }
