"""Policy-gradient losses per token: equations and nothing else.

Shapes are `[B, T]`: B rows, T tokens. `mask` is provenance: true (or 1) where the policy itself
sampled the token. Everywhere else the values are unread: they may be inf or nan, the result is
exactly 0 there and so is the gradient. Sums come without a denominator, because the learner
adds numerators and denominators over microbatches and devices before it divides.
"""

import jax
import jax.numpy as jnp

_MAX_LOG_RATIO = 20.0
"""Log-ratios are clamped to ±20 (a ratio of 5e8), so that no exp overflows; a token beyond has
left every trust region and gets no gradient."""


def clipped_surrogate(
    logprobs: jax.Array,
    old_logprobs: jax.Array,
    advantages: jax.Array,
    mask: jax.Array,
    *,
    clip_low: float,
    clip_high: float,
) -> tuple[jax.Array, jax.Array]:
    """PPO's clipped surrogate as a loss (Schulman et al., arXiv 1707.06347, eq. 7).

        ratio = exp(logprobs - old_logprobs)
        loss  = -min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A)

    Args:
      logprobs: [B, T] of the tokens under the policy that is trained.
      old_logprobs: [B, T] of the same tokens under the policy that sampled them; a constant.
      advantages: [B, T]; a constant.
      mask: [B, T] bool or 0/1.
      clip_low, clip_high: 0.2 and 0.2 in the paper; a higher `clip_high` is DAPO's clip-higher.

    Returns:
      loss_per_token [B, T] and clipped [B, T] bool: where the clip holds and stops the gradient.
    """
    _assert_same_2d(logprobs, old_logprobs, advantages, mask)
    mask = mask.astype(bool)
    log_ratio = _log_ratio(logprobs, jax.lax.stop_gradient(old_logprobs), mask)
    advantages = jnp.where(mask, jax.lax.stop_gradient(advantages), 0.0)
    ratio = jnp.exp(log_ratio)
    loss = -ratio * advantages
    loss_at_clip = -jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high) * advantages
    clipped = loss_at_clip > loss
    return jnp.where(clipped, loss_at_clip, loss), clipped


def kl_k3(logprobs: jax.Array, ref_logprobs: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """The k3 estimate of KL(policy || reference) per token, never negative.

        d = ref_logprobs - logprobs
        k3 = exp(d) - d - 1

    Schulman, http://joschu.net/blog/kl-approx.html; "low_var_kl" in the released code, which
    also clamps the result to ±10 (and so drops the gradient of the tokens that have drifted
    furthest); here only d is clamped, to ±20.

    Args:
      logprobs: [B, T] under the policy that is trained and that sampled the tokens.
      ref_logprobs: [B, T] under the frozen reference.
      mask: [B, T] bool or 0/1; give it where the inputs may hold inf or nan. None: all read.

    Returns:
      [B, T].
    """
    mask = jnp.ones_like(logprobs, bool) if mask is None else mask.astype(bool)
    _assert_same_2d(logprobs, ref_logprobs, mask)
    d = _log_ratio(jax.lax.stop_gradient(ref_logprobs), logprobs, mask)
    # Near 0 the terms of exp(d) - d - 1 cancel and float32 loses the result, even its sign.
    small = jnp.abs(d) < 0.01
    d_small = jnp.where(small, d, 0.0)
    series = d_small**2 * (1 / 2 + d_small * (1 / 6 + d_small / 24))
    return jnp.where(small, series, jnp.expm1(d) - d)


def masked_sum(x: jax.Array, mask: jax.Array) -> jax.Array:
    """Sum of x [B, T] where mask [B, T]; a scalar in float32 or wider.

    Divide by `masked_sum(jnp.ones_like(x), mask)` for the mean over the policy's tokens.
    """
    _assert_same_2d(x, mask)
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return jnp.where(mask.astype(bool), x, 0.0).sum()


def _log_ratio(logprobs: jax.Array, base_logprobs: jax.Array, mask: jax.Array) -> jax.Array:
    # Masked here, before exp: masking only the loss would leave nan in the gradient, where exp
    # overflows or its input is nan (0 * inf is nan).
    log_ratio = jnp.where(mask, logprobs - base_logprobs, 0.0)
    return jnp.clip(log_ratio, -_MAX_LOG_RATIO, _MAX_LOG_RATIO)


def _assert_same_2d(*arrays: jax.Array) -> None:
    shapes = [array.shape for array in arrays]
    if len(shapes[0]) != 2 or len(set(shapes)) != 1:
        raise ValueError(f"losses take arrays of one shape [B, T], not {shapes}")
