"""From rewards to advantages. Pure functions of arrays; they know nothing of tokens or models.

Two families. One advantage per sequence, from `[Q, G]` rewards (Q questions, G sequences each):
`group_advantages`, `leave_one_out_advantages`, `baseline_advantages`. One per token, from `[N, T]`
arrays (N sequences, T positions): `token_rewards`, then `returns_to_go` or `gae`, then `whiten`.

`mask` is provenance: true (or 1) where the policy itself sampled the token. Only these positions
are time steps. Text that the environment inserts between two of them is part of the transition
from one to the next: it is not discounted, its values are unread (they may be inf or nan), and
the result there is exactly 0. A nan that is read is never hidden: it reaches every result that
depends on it.
"""

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
    rewards = _group_rewards(rewards)
    if rewards.shape[1] == 1:
        return rewards
    advantages = rewards - rewards.mean(axis=1, keepdims=True)
    if normalize_std:
        advantages = advantages / (rewards.std(axis=1, ddof=1, keepdims=True) + eps)
    all_equal = rewards.max(axis=1, keepdims=True) == rewards.min(axis=1, keepdims=True)
    return jnp.where(all_equal, 0.0, advantages)


def leave_one_out_advantages(rewards: jax.Array) -> jax.Array:
    """RLOO: the mean of the group's other members is the baseline (arXiv 2402.14740).

        A_g = r_g - sum_{h != g} r_h / (G - 1) = G / (G - 1) * (r_g - mean(r))

    A group whose rewards are all equal gets exactly 0.

    Args:
      rewards: [Q, G] float; G episodes of each of Q questions, G at least 2 (ValueError).

    Returns:
      [Q, G] float32, or float64 for float64 rewards.
    """
    rewards = _group_rewards(rewards)
    group = _at_least_two(rewards)
    # The second form: where r_g is most of the sum, the sum less r_g would lose its digits.
    return _less_mean(rewards, axis=1) * (group / (group - 1))


def baseline_advantages(rewards: jax.Array, *, baseline: str) -> jax.Array:
    """REINFORCE with a baseline: A = r - b (Williams, Machine Learning 8, 1992).

    Args:
      rewards: [Q, G] float; G episodes of each of Q questions.
      baseline: "none", b = 0; "batch_mean", the mean of all Q * G rewards; "group_mean", the
        mean of the question's G rewards, G at least 2. ValueError for any other and for G < 2.
        The means include the sequence's own reward; where all of their rewards are equal, the
        advantages are exactly 0.

    Returns:
      [Q, G] float32, or float64 for float64 rewards.
    """
    rewards = _group_rewards(rewards)
    if baseline == "none":
        return rewards
    if baseline == "batch_mean":
        return _less_mean(rewards, axis=None)
    if baseline == "group_mean":
        _at_least_two(rewards)
        return _less_mean(rewards, axis=1)
    raise ValueError(f"baseline is {baseline!r}; it must be none, batch_mean or group_mean")


def token_rewards(
    scores: jax.Array, mask: jax.Array, *, kl: jax.Array | None = None, kl_coef: float = 0.0
) -> jax.Array:
    """The reward of each policy token (Ziegler et al., arXiv 1909.08593, eq. 2, by tokens).

        r_t = -kl_coef * kl_t, plus the sequence's score at its last policy token

    Args:
      scores: [N] float; unread for a sequence without policy tokens, which gets all 0.
      mask: [N, T] bool or 0/1.
      kl: [N, T] estimate of KL(policy || reference) per token in nats; None: no penalty.
      kl_coef: reward per nat; ValueError if it is not 0 and there is no `kl`.

    Returns:
      [N, T] float32, or float64 for float64 input.
    """
    if kl is None:
        if kl_coef != 0.0:
            raise ValueError(f"kl_coef is {kl_coef}, but no kl was given")
        kl = jnp.zeros(mask.shape, jnp.float32)
    mask, kl = _token_arrays(mask, kl)
    scores = _at_least_float32(scores)
    if scores.shape != mask.shape[:1]:
        raise ValueError(f"scores {scores.shape} must be [N], one for each row of {mask.shape}")
    policy_tokens_left = jax.lax.cumsum(mask.astype(jnp.int32), axis=1, reverse=True)
    rewards = jnp.where(policy_tokens_left == 1, scores[:, None], 0.0) - kl_coef * kl
    return jnp.where(mask, rewards, 0.0)


@jax.jit  # eagerly, every slice of the tree below would be compiled by itself
def returns_to_go(rewards: jax.Array, mask: jax.Array, *, gamma: float) -> jax.Array:
    """Discounted sum of the rewards from each policy token on.

        R_t = r_t + gamma * R_{t+1}, where t counts policy tokens

    Args:
      rewards: [N, T] float, per policy token.
      mask: [N, T] bool or 0/1.
      gamma: discount of one policy token, in [0, 1].

    Returns:
      [N, T] float32, or float64 for float64 rewards; 0 where masked.
    """
    mask, rewards = _token_arrays(mask, rewards)
    return _discounted_sums(rewards, mask, gamma)


@jax.jit
def gae(
    rewards: jax.Array, values: jax.Array, mask: jax.Array, *, gamma: float, gae_lambda: float
) -> tuple[jax.Array, jax.Array]:
    """Generalized advantage estimation (Schulman et al., arXiv 1506.02438, eq. 11-16).

        delta_t = r_t + gamma * V_{t+1} - V_t, where t counts policy tokens
        A_t = sum_l (gamma * gae_lambda)^l * delta_{t+l}

    The value after the sequence's last policy token is 0: an episode that was cut short is
    treated as one that ended.

    Args:
      rewards: [N, T] float, per policy token.
      values: [N, T] float; at t the value of the state in which token t was chosen, which has
        read everything before t (an inserted document too) and not t itself.
      mask: [N, T] bool or 0/1.
      gamma: discount of one policy token, in [0, 1].
      gae_lambda: in [0, 1]; 0 is the one-step error delta, 1 is `returns_to_go` - values.

    Returns:
      advantages and returns = advantages + values, the target of the value function; both
      [N, T] float32, or float64 for float64 input; 0 where masked.
    """
    mask, rewards, values = _token_arrays(mask, rewards, values)
    length = mask.shape[1]
    # next_at[t]: where the next policy token after t is; `length`, where the value is 0, if none.
    at = jnp.where(mask, jnp.arange(length), length)
    at_or_after = jax.lax.cummin(at, axis=1, reverse=True)
    next_at = jnp.pad(at_or_after, ((0, 0), (0, 1)), constant_values=length)[:, 1:]
    values_and_end = jnp.pad(values, ((0, 0), (0, 1)))
    next_values = jnp.take_along_axis(values_and_end, next_at, axis=1)
    deltas = rewards + gamma * next_values - values
    advantages = _discounted_sums(deltas, mask, gamma * gae_lambda)
    return advantages, advantages + values


@jax.jit
def whiten(x: jax.Array, mask: jax.Array, *, eps: float = 1e-8) -> jax.Array:
    """x less its mean, over its std, both over all policy tokens of the batch.

        (x - mean(x)) / (std(x) + eps)

    REINFORCE++'s global normalisation of advantages (arXiv 2501.03262) and common in PPO. The
    std is the population's (divided by the count). The batch is the whole step's: microbatches
    must not be whitened one by one.

    Args:
      x: [N, T] float.
      mask: [N, T] bool or 0/1.
      eps: above 0, keeps the division finite; in units of x.

    Returns:
      [N, T] float32, or float64 for float64 x; exactly 0 where masked and where all policy
      tokens' x are equal.
    """
    mask, x = _token_arrays(mask, x)
    count = jnp.maximum(mask.sum(), 1)
    # Less the largest first, as in `_less_mean`.
    x = jnp.where(mask, x - jnp.where(mask, x, -jnp.inf).max(), 0.0)
    x = jnp.where(mask, x - x.sum() / count, 0.0)
    std = jnp.sqrt((x**2).sum() / count)
    return jnp.where(mask, x / (std + eps), 0.0)


def adapted_kl_coef(coef: float, kl: float, *, target: float, horizon: int, episodes: int) -> float:
    """The next KL coefficient: steers the measured KL to a target (arXiv 1909.08593, §2.2).

        error = clip(kl / target - 1, -0.2, 0.2)
        coef * (1 + error * episodes / horizon)

    The paper's constant K (0.1) is written as episodes / horizon, so that the speed does not
    depend on the episodes per step. A nan kl gives nan.

    Args:
      coef: the coefficient that this step used.
      kl: this step's measured KL(policy || reference), in the target's units (the paper: nats
        per sequence).
      target: above 0.
      horizon: within this many episodes the coefficient changes by about 20 % at most; more
        than a fifth of `episodes`, or one step could turn the coefficient negative.
      episodes: of this step.

    Raises:
      ValueError: target or horizon out of range.
    """
    if not (target > 0 and 0 <= episodes < 5 * horizon):
        raise ValueError(
            f"target is {target}, horizon is {horizon}: the target must be above 0 and the "
            f"horizon above a fifth of the step's {episodes} episodes"
        )
    error = min(max(kl / target - 1.0, -0.2), 0.2)  # error first: min and max then keep a nan
    return coef * (1.0 + error * episodes / horizon)


def _at_least_float32(x: jax.Array) -> jax.Array:
    x = jnp.asarray(x)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _group_rewards(rewards: jax.Array) -> jax.Array:
    if rewards.ndim != 2:
        raise ValueError(f"rewards must be [questions, group], not of shape {rewards.shape}")
    return _at_least_float32(rewards)


def _at_least_two(rewards: jax.Array) -> int:
    group = rewards.shape[1]
    if group < 2:
        raise ValueError(f"a group of {group} has no mean to compare with; take 2 or more")
    return group


def _less_mean(x: jax.Array, axis: int | None) -> jax.Array:
    """x - mean(x). Less the largest first: equal x then give exactly 0, near ones keep digits."""
    x = x - x.max(axis=axis, keepdims=True)
    return x - x.mean(axis=axis, keepdims=True)


def _token_arrays(mask: jax.Array, *arrays: jax.Array) -> list[jax.Array]:
    """The mask as bool, the arrays in float32 or wider with 0 where masked."""
    shapes = [array.shape for array in (mask, *arrays)]
    if len(shapes[0]) != 2 or len(set(shapes)) != 1:
        raise ValueError(f"mask and token arrays must be of one shape [N, T], not {shapes}")
    mask = jnp.asarray(mask).astype(bool)
    return [mask, *(jnp.where(mask, _at_least_float32(array), 0.0) for array in arrays)]


def _discounted_sums(x: jax.Array, mask: jax.Array, discount: float) -> jax.Array:
    """sum_l discount^l * x_{t+l} at each policy token t (t counts policy tokens); 0 elsewhere.

    Each position maps what follows it, y, to factor * y + term: a policy token to discount * y
    + x, any other to y. Maps are combined in a tree, of depth log T where a loop takes T steps.
    """
    factors = jnp.where(mask, discount, 1.0).astype(x.dtype)
    terms = jnp.where(mask, x, 0.0)

    def combine(later, earlier):
        factor, term = earlier
        return factor * later[0], factor * later[1] + term

    _, sums = jax.lax.associative_scan(combine, (factors, terms), reverse=True, axis=1)
    return jnp.where(mask, sums, 0.0)
