"""Losses of policy-gradient methods, per token, as pure functions of arrays.

Shapes are `[B, T]`: B rows, T tokens. `mask` is provenance: true (or 1) where the policy sampled
the token. Values elsewhere are not read and may be inf or NaN; the result and its gradient are
exactly 0 there. Losses are not averaged. `aggregation_weights` gives the tokens of each sequence
their weight in the mean over the whole batch; the learner sums weighted losses over microbatches
and devices.

A row may hold several packed sequences. `segment_ids` [B, T] int32 distinguishes them: from 1
within a row, 0 in padding.
"""

import functools

import jax
import jax.numpy as jnp

AGGREGATES = ("token_mean", "sequence_mean", "fixed_length")
"""Means over the tokens of a batch, see `aggregation_weights`."""

_MAX_LOG_RATIO = 20.0
"""Log-ratios are clamped to ±20 (a ratio of 5e8), so that exp does not overflow. A token beyond
the clamp gets no gradient through its ratio."""


def clipped_surrogate(
    logprobs: jax.Array,
    old_logprobs: jax.Array,
    advantages: jax.Array,
    mask: jax.Array,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float = 0.0,
) -> tuple[jax.Array, jax.Array]:
    """Returns PPO's clipped surrogate as a loss (Schulman et al., arXiv 1707.06347, eq. 7).

        ratio = exp(logprobs - old_logprobs)
        loss  = -min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A)

    The dual clip (Ye et al., arXiv 1912.09729, eq. 5) bounds the loss of a token that has become
    likelier although A < 0. The clip above leaves this loss unbounded; the dual clip limits it to
    -dual_clip * A.

    Args:
      logprobs: [B, T] log-probs of the tokens under the policy that is trained.
      old_logprobs: [B, T] log-probs under the policy that sampled the tokens; a constant.
      advantages: [B, T]; a constant.
      mask: [B, T] bool or 0/1.
      clip_low, clip_high: 0.2 and 0.2 in the paper; a higher `clip_high` is DAPO's clip-higher.
      dual_clip: above 1 (3 in its paper), or 0 to disable the dual clip.

    Returns:
      loss_per_token [B, T], and clipped [B, T] bool, where a clip stops the gradient.

    Raises:
      ValueError: `dual_clip` is neither 0 nor above 1.
    """
    _assert_same_2d(logprobs, old_logprobs, advantages, mask)
    if dual_clip != 0 and not dual_clip > 1:
        raise ValueError(f"dual_clip is {dual_clip}; it must be 0 (off) or above 1")
    mask = mask.astype(bool)
    log_ratio = _log_ratio(logprobs, jax.lax.stop_gradient(old_logprobs), mask)
    advantages = _constant(advantages, mask)
    loss, clipped = _clip_objective(jnp.exp(log_ratio), advantages, clip_low, clip_high)
    if dual_clip == 0:
        return loss, clipped
    bound = -dual_clip * advantages
    bounded = (advantages < 0) & (loss > bound)
    return jnp.where(bounded, bound, loss), clipped | bounded


def sequence_surrogate(
    logprobs: jax.Array,
    old_logprobs: jax.Array,
    advantages: jax.Array,
    mask: jax.Array,
    segment_ids: jax.Array,
    *,
    clip_low: float,
    clip_high: float,
) -> tuple[jax.Array, jax.Array]:
    """Returns GSPO's loss, one ratio per sequence (Zheng et al., arXiv 2507.18071, eq. 5-7).

        ratio = exp(mean over the sequence's policy tokens of (logprobs - old_logprobs))
        loss  = -min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A)

    Every policy token of a sequence has the sequence's loss, so the mean over its policy tokens is
    the loss of the sequence. The gradient flows through the mean: the gradient of the sequence's
    loss with respect to each token's log-prob is -ratio * A / length. The paper's variant with an
    advantage per token (GSPO-token) has another gradient; here A belongs to the sequence.

    Args:
      logprobs, old_logprobs, mask: as in `clipped_surrogate`.
      advantages: [B, T]; a constant, the same at all tokens of a sequence.
      segment_ids: [B, T] int32, at most T.
      clip_low, clip_high: 3e-4 and 4e-4 in the paper; a mean log-ratio varies less than a token's.

    Returns:
      loss_per_token [B, T], and clipped [B, T] bool, the policy tokens of clipped sequences.
    """
    _assert_same_2d(logprobs, old_logprobs, advantages, mask, segment_ids)
    mask = mask.astype(bool)
    difference = jnp.where(mask, logprobs - jax.lax.stop_gradient(old_logprobs), 0.0)
    length = _sum_by_id(mask.astype(difference.dtype), segment_ids)
    mean = _sum_by_id(difference, segment_ids) / jnp.maximum(length, 1.0)
    # Clamp the mean and not each token, which would change the mean.
    return _clip_objective(jnp.exp(_clamp(mean)), _constant(advantages, mask), clip_low, clip_high)


def cispo_surrogate(
    logprobs: jax.Array,
    old_logprobs: jax.Array,
    advantages: jax.Array,
    mask: jax.Array,
    *,
    clip_low: float,
    clip_high: float,
) -> tuple[jax.Array, jax.Array]:
    """Returns CISPO's loss, REINFORCE with a clipped importance weight (arXiv 2506.13585, eq. 4-5).

        loss = -stop_gradient(clip(ratio, 1 - clip_low, 1 + clip_high)) * A * logprobs

    Unlike in the clipped surrogate, a token whose ratio is out of range keeps its gradient; only
    its weight is bounded. The value of this loss means little; only its gradient matters.

    Args:
      logprobs, old_logprobs, advantages, mask: as in `clipped_surrogate`.
      clip_low: 1 or more sets no lower bound, as in the paper.
      clip_high: the weight is at most 1 + clip_high.

    Returns:
      loss_per_token [B, T], and clipped [B, T] bool, where the ratio was out of range.
    """
    _assert_same_2d(logprobs, old_logprobs, advantages, mask)
    mask = mask.astype(bool)
    ratio = jax.lax.stop_gradient(jnp.exp(_log_ratio(logprobs, old_logprobs, mask)))
    weight = jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high)
    loss = -weight * _constant(advantages, mask) * jnp.where(mask, logprobs, 0.0)
    return loss, mask & (weight != ratio)


def truncated_importance_weights(
    old_logprobs: jax.Array, sampler_logprobs: jax.Array, mask: jax.Array, *, cap: float
) -> jax.Array:
    """Returns loss weights that correct for the difference between generator and learner.

        weight = min(exp(old_logprobs - sampler_logprobs), cap)

    With the same parameters, a generator and a learner still differ in precision and kernels.
    Multiply the loss with these weights (truncated importance sampling; Yao et al. 2025, "Your
    Efficient RL Framework Secretly Brings You Off-Policy RL Training").

    Args:
      old_logprobs: [B, T] log-probs by the learner, with the parameters that sampled.
      sampler_logprobs: [B, T] log-probs by the generator, at sampling.
      mask: [B, T] bool or 0/1.
      cap: the largest weight, above 0; Yao et al. use 2.

    Returns:
      [B, T], a constant; 0 where the mask is 0.

    Raises:
      ValueError: `cap` is not above 0.
    """
    _assert_same_2d(old_logprobs, sampler_logprobs, mask)
    if not cap > 0:
        raise ValueError(f"cap, the largest weight, is {cap}; it must be above 0")
    mask = mask.astype(bool)
    weight = jnp.minimum(jnp.exp(_log_ratio(old_logprobs, sampler_logprobs, mask)), cap)
    return _constant(weight, mask)


def likelihood_preserving(
    logprobs: jax.Array, old_logprobs: jax.Array, advantages: jax.Array, mask: jax.Array
) -> jax.Array:
    """Returns LLDS's loss, which preserves the likelihood of good actions (arXiv 2512.04220).

        loss = max(0, old_logprobs - logprobs)   in actions with A >= 0 that have become less
                                                 likely as a whole; 0 elsewhere

    An action is a maximal run of policy tokens, one turn of an episode; documents separate the
    turns. Packed sequences need no segment ids: the last token of a sequence predicts nothing, so
    its mask is 0 and separates it from the next sequence. No gradient flows through the
    test whether an action has become less likely.

    In a step's first update old and new policy are equal, so the loss and its gradient are 0. (If
    `old_logprobs` are the sampler's, the loss is the mismatch between sampler and learner.) The
    loss is active from the step's second update.

    The log-ratio is not clamped here: the gradient is constant, and tokens that have lost the most
    probability need it most.

    Args:
      logprobs, old_logprobs, mask: as in `clipped_surrogate`.
      advantages: [B, T]; with one sign within an action.

    Returns:
      [B, T].
    """
    _assert_same_2d(logprobs, old_logprobs, advantages, mask)
    mask = mask.astype(bool)
    change = jnp.where(mask, logprobs - jax.lax.stop_gradient(old_logprobs), 0.0)
    starts = mask & ~jnp.pad(mask, ((0, 0), (1, 0)))[:, :-1]
    action_ids = jnp.where(mask, jnp.cumsum(starts, axis=1), 0)
    less_likely = _sum_by_id(jax.lax.stop_gradient(change), action_ids) < 0
    kept = mask & less_likely & (_constant(advantages, mask) >= 0)
    return jnp.where(kept & (change < 0), -change, 0.0)


def value_loss(
    values: jax.Array,
    old_values: jax.Array,
    returns: jax.Array,
    mask: jax.Array,
    *,
    clip: float,
) -> tuple[jax.Array, jax.Array]:
    """Returns a critic's squared error with the value clipping of OpenAI Baselines' ppo2.

        loss = 0.5 * max((v - R)^2, (clip(v, old - clip, old + clip) - R)^2)

    Args:
      values: [B, T] values of the critic that is trained.
      old_values: [B, T] values of the critic at sampling; a constant.
      returns: [B, T] regression targets of the values; a constant.
      mask: [B, T] bool or 0/1.
      clip: largest change of a value, in units of return; 0: no clip, 0.5 * (v - R)^2.

    Returns:
      loss_per_token [B, T], and clipped [B, T] bool, where the clip stops the gradient.
    """
    _assert_same_2d(values, old_values, returns, mask)
    mask = mask.astype(bool)
    values = jnp.where(mask, values, 0.0)
    old_values, returns = _constant(old_values, mask), _constant(returns, mask)
    loss = 0.5 * (values - returns) ** 2
    if clip == 0:
        return loss, jnp.zeros_like(mask)
    loss_at_clip = 0.5 * (jnp.clip(values, old_values - clip, old_values + clip) - returns) ** 2
    clipped = loss_at_clip > loss
    return jnp.where(clipped, loss_at_clip, loss), clipped


def kl_k1(logprobs: jax.Array, ref_logprobs: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """Returns the k1 estimate of KL(policy || reference) per token: unbiased, may be negative.

        k1 = logprobs - ref_logprobs

    Use it in metrics or in a reward. As a loss it has no effect: its gradient is that of the
    log-prob, and the expectation of this gradient under the policy is 0. Arguments, clamp and
    result are as in `kl_k3`.
    """
    return _drift(logprobs, ref_logprobs, mask)


def kl_k2(logprobs: jax.Array, ref_logprobs: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """Returns the k2 estimate of KL(policy || reference) per token: biased, never negative.

        k2 = 0.5 * (logprobs - ref_logprobs)^2

    As a loss on the policy's tokens, its expected gradient is that of KL(policy || reference).
    Arguments, clamp and result are as in `kl_k3`.
    """
    return 0.5 * _drift(logprobs, ref_logprobs, mask) ** 2


def kl_k3(logprobs: jax.Array, ref_logprobs: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """Returns the k3 estimate of KL(policy || reference) per token: unbiased, never negative.

        d = ref_logprobs - logprobs
        k3 = exp(d) - d - 1

    Schulman, http://joschu.net/blog/kl-approx.html. ZeroSearch's released code ("low_var_kl") also
    clamps the result to ±10, so a token with a larger value has no gradient. Here only d is
    clamped, to ±20, so that exp does not overflow.

    As a loss on the policy's tokens, its expected gradient is that of KL(reference || policy), not
    of KL(policy || reference). Near the reference the two gradients are equal to first order.

    Args:
      logprobs: [B, T] log-probs under the policy that is trained and that sampled the tokens.
      ref_logprobs: [B, T] log-probs under the frozen reference.
      mask: [B, T] bool or 0/1; required if the inputs may hold inf or NaN. None: all are read.

    Returns:
      [B, T].
    """
    d = -_drift(logprobs, ref_logprobs, mask)
    # Near 0 the terms of exp(d) - d - 1 cancel, and float32 loses even the sign of the result.
    small = jnp.abs(d) < 0.01
    d_small = jnp.where(small, d, 0.0)
    series = d_small**2 * (1 / 2 + d_small * (1 / 6 + d_small / 24))
    return jnp.where(small, series, jnp.expm1(d) - d)


KL_ESTIMATORS = {"k1": kl_k1, "k2": kl_k2, "k3": kl_k3}


def masked_sum(x: jax.Array, mask: jax.Array) -> jax.Array:
    """Returns the sum of x [B, T] over mask [B, T], a scalar in float32 or wider.

    Divide it by `masked_sum(jnp.ones_like(x), mask)` for the mean over the policy's tokens.
    """
    _assert_same_2d(x, mask)
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return jnp.where(mask.astype(bool), x, 0.0).sum()


def aggregation_weights(lengths: jax.Array, *, aggregate: str, fixed_tokens: int = 0) -> jax.Array:
    """Returns, per sequence, the weight of each of its tokens in sum(weight * loss_per_token).

        token_mean     1 / sum(lengths)        every token counts the same (DAPO, arXiv 2503.14476)
        sequence_mean  1 / (n * length)        every sequence counts the same (GRPO, 2402.03300)
        fixed_length   1 / (n * fixed_tokens)  Dr. GRPO, arXiv 2503.20783

    n is the number of sequences with any policy token.

    Args:
      lengths: [N] policy tokens of each sequence of the whole batch; 0 is allowed.
      aggregate: one of `AGGREGATES`.
      fixed_tokens: divisor of "fixed_length", such as the maximum number of policy tokens in an
        episode.

    Returns:
      [N] float32, or float64 for float64 lengths; 0 where the length is 0.

    Raises:
      ValueError: unknown `aggregate`, or "fixed_length" without `fixed_tokens` above 0.
    """
    if aggregate not in AGGREGATES:
        raise ValueError(f"aggregate is {aggregate!r}; choose one of {', '.join(AGGREGATES)}")
    if aggregate == "fixed_length" and not fixed_tokens > 0:
        raise ValueError(f"fixed_tokens is {fixed_tokens}; fixed_length needs it above 0")
    lengths = jnp.asarray(lengths)
    if lengths.ndim != 1:
        raise ValueError(f"lengths {lengths.shape} must be [sequences]")
    lengths = lengths.astype(jnp.promote_types(lengths.dtype, jnp.float32))
    filled = lengths > 0
    n = filled.sum().astype(lengths.dtype)
    denominator = {
        "token_mean": jnp.broadcast_to(lengths.sum(), lengths.shape),
        "sequence_mean": n * lengths,
        "fixed_length": jnp.broadcast_to(n * fixed_tokens, lengths.shape),
    }[aggregate]
    return jnp.where(filled, 1.0 / jnp.where(filled, denominator, 1.0), 0.0)


def _clip_objective(
    ratio: jax.Array, advantages: jax.Array, clip_low: float, clip_high: float
) -> tuple[jax.Array, jax.Array]:
    loss = -ratio * advantages
    loss_at_clip = -jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high) * advantages
    clipped = loss_at_clip > loss
    return jnp.where(clipped, loss_at_clip, loss), clipped


def _constant(x: jax.Array, mask: jax.Array) -> jax.Array:
    return jnp.where(mask, jax.lax.stop_gradient(x), 0.0)


def _drift(logprobs: jax.Array, ref_logprobs: jax.Array, mask: jax.Array | None) -> jax.Array:
    mask = jnp.ones_like(logprobs, bool) if mask is None else mask.astype(bool)
    _assert_same_2d(logprobs, ref_logprobs, mask)
    return _log_ratio(logprobs, jax.lax.stop_gradient(ref_logprobs), mask)


def _log_ratio(logprobs: jax.Array, base_logprobs: jax.Array, mask: jax.Array) -> jax.Array:
    # Mask before exp. Masking only the loss would leave NaN in the gradient where exp overflows or
    # its input is NaN, because 0 * inf is NaN.
    return _clamp(jnp.where(mask, logprobs - base_logprobs, 0.0))


def _clamp(log_ratio: jax.Array) -> jax.Array:
    return jnp.clip(log_ratio, -_MAX_LOG_RATIO, _MAX_LOG_RATIO)


def _sum_by_id(x: jax.Array, ids: jax.Array) -> jax.Array:
    """Replaces each entry of x [B, T] by the sum of the entries of its row that share its id."""
    # Row by row, so that sharded rows need no communication.
    segment_sum = functools.partial(jax.ops.segment_sum, num_segments=x.shape[1] + 1)
    return jnp.take_along_axis(jax.vmap(segment_sum)(x, ids), ids, axis=1)


def _assert_same_2d(*arrays: jax.Array) -> None:
    shapes = [array.shape for array in arrays]
    if len(shapes[0]) != 2 or len(set(shapes)) != 1:
        raise ValueError(f"arrays must have one shape [B, T], not {shapes}")
