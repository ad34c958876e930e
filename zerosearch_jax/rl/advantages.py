"""From rewards to advantages. Pure functions of arrays; they know nothing of tokens or models."""

import jax
import jax.numpy as jnp


def group_advantages(
    rewards: jax.Array, *, normalize_std: bool = True, eps: float = 1e-6
) -> jax.Array:
    """GRPO's group-relative advantages (DeepSeekMath, arXiv 2402.03300, §4.1.2).

        A_g = (r_g - mean(r)) / (std(r) + eps)

    The std is the unbiased one (divided by G - 1), as in the released code. Two cases by hand:
      * a group of one has nothing to compare with: mean 0 and std 1 are taken, so its advantage
        is its reward (the released code does the same), with or without `normalize_std`;
      * a group whose rewards are all equal gets exactly 0, not rounding error divided by eps.

    Args:
      rewards: [Q, G] float; G episodes of each of Q questions.
      normalize_std: False leaves the division out (Dr. GRPO, arXiv 2503.20783).
      eps: keeps the division finite; in units of reward.

    Returns:
      [Q, G] float32, or float64 for float64 rewards.
    """
    if rewards.ndim != 2:
        raise ValueError(f"rewards must be [questions, group], not of shape {rewards.shape}")
    rewards = jnp.asarray(rewards, jnp.promote_types(rewards.dtype, jnp.float32))
    if rewards.shape[1] == 1:
        return rewards
    advantages = rewards - rewards.mean(axis=1, keepdims=True)
    if normalize_std:
        advantages = advantages / (rewards.std(axis=1, ddof=1, keepdims=True) + eps)
    all_equal = rewards.max(axis=1, keepdims=True) == rewards.min(axis=1, keepdims=True)
    return jnp.where(all_equal, 0.0, advantages)
