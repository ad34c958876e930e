"""Advantages from rewards, as pure functions of arrays.

| advantages   | input                                      | functions                         |
|--------------|--------------------------------------------|-----------------------------------|
| per sequence | rewards `[Q, G]`: Q questions, G sequences | `group_advantages`,               |
|              |                                            | `leave_one_out_advantages`,       |
|              |                                            | `baseline_advantages`             |
| per token    | arrays `[N, T]`: N sequences, T positions  | `token_rewards`, then             |
|              |                                            | `returns_to_go` or `gae`,         |
|              |                                            | then `whiten`                     |

`mask` is provenance: true (or 1) where the policy sampled the token. Only these positions are time
steps. Inserted text is part of the transition between two policy tokens and adds no discount. Where
the mask is 0, array entries are not read (they may be inf or NaN), and the result is exactly 0. A
NaN where the mask is 1 is not hidden: every result that uses it is NaN.
"""

import jax
import jax.numpy as jnp


def group_advantages(
    rewards: jax.Array, *, normalize_std: bool = True, eps: float = 1e-6
) -> jax.Array:
    """Returns GRPO's group-relative advantages (DeepSeekMath, arXiv 2402.03300, §4.1.2).

        A_g = (r_g - mean(r)) / (std(r) + eps)

    The standard deviation is the unbiased one (divided by G - 1), as in ZeroSearch's released code.
    Two special cases:
      * the advantage in a group of one is its reward, as in that code;
      * a group with equal rewards gets exactly 0, not rounding error divided by eps.

    Args:
      rewards: [Q, G] float; G episodes of each of Q questions.
      normalize_std: False omits the division (Dr. GRPO, arXiv 2503.20783).
      eps: above 0, keeps the division finite; in units of reward.

    Returns:
      [Q, G] float32, or float64 for float64 rewards.
    """
    rewards = _group_rewards(rewards)
    if rewards.shape[1] == 1:
        return rewards
    advantages = _minus_mean(rewards, axis=1)
    if normalize_std:
        variance = (advantages**2).sum(axis=1, keepdims=True) / (rewards.shape[1] - 1)
        advantages = advantages / (jnp.sqrt(variance) + eps)
    return advantages


def leave_one_out_advantages(rewards: jax.Array) -> jax.Array:
    """Returns RLOO's advantages, whose baseline is the mean of the others (arXiv 2402.14740).

        A_g = r_g - sum_{h != g} r_h / (G - 1) = G / (G - 1) * (r_g - mean(r))

    A group with equal rewards gets exactly 0.

    Args:
      rewards: [Q, G] float; G episodes of each of Q questions, G at least 2 (ValueError).

    Returns:
      [Q, G] float32, or float64 for float64 rewards.
    """
    rewards = _group_rewards(rewards)
    group = _at_least_two(rewards)
    # The docstring's right-hand form: sum(r) - r_g loses digits if r_g is most of sum(r).
    return _minus_mean(rewards, axis=1) * (group / (group - 1))


def baseline_advantages(rewards: jax.Array, *, baseline: str) -> jax.Array:
    """Returns REINFORCE's advantages A = r - b (Williams, Machine Learning 8, 1992).

    Args:
      rewards: [Q, G] float; G episodes of each of Q questions.
      baseline: "none", b = 0; "batch_mean", the mean of all Q * G rewards; "group_mean", the
        mean of the question's G rewards, G at least 2. The means include the sequence's own
        reward. If all rewards of a mean are equal, the advantages are exactly 0.

    Returns:
      [Q, G] float32, or float64 for float64 rewards.

    Raises:
      ValueError: unknown `baseline`, or "group_mean" with G below 2.
    """
    rewards = _group_rewards(rewards)
    if baseline == "none":
        return rewards
    if baseline == "batch_mean":
        return _minus_mean(rewards, axis=None)
    if baseline == "group_mean":
        _at_least_two(rewards)
        return _minus_mean(rewards, axis=1)
    raise ValueError(f"baseline is {baseline!r}; choose one of none, batch_mean, group_mean")


def token_rewards(
    scores: jax.Array, mask: jax.Array, *, kl: jax.Array | None = None, kl_coef: float = 0.0
) -> jax.Array:
    """Returns the reward of each policy token (Ziegler et al., arXiv 1909.08593, eq. 2).

        r_t = -kl_coef * kl_t, plus the sequence's score at its last policy token

    Args:
      scores: [N] float; not read for a sequence without policy tokens, whose rewards are 0.
      mask: [N, T] bool or 0/1.
      kl: [N, T] estimate of KL(policy || reference) per token in nats; None: no penalty.
      kl_coef: reward per nat.

    Returns:
      [N, T] float32, or float64 for float64 input.

    Raises:
      ValueError: `kl_coef` is not 0, but `kl` is None; or shapes that do not match.
    """
    if kl is None:
        if kl_coef != 0.0:
            raise ValueError(f"kl_coef is {kl_coef}, but kl is None")
        kl = jnp.zeros(mask.shape, jnp.float32)
    mask, kl = _token_arrays(mask, kl)
    scores = _at_least_float32(scores)
    if scores.shape != mask.shape[:1]:
        raise ValueError(f"scores {scores.shape} must be [N], one per row of mask {mask.shape}")
    remaining = jax.lax.cumsum(mask.astype(jnp.int32), axis=1, reverse=True)
    rewards = jnp.where(remaining == 1, scores[:, None], 0.0) - kl_coef * kl
    return jnp.where(mask, rewards, 0.0)


@jax.jit  # without it, every slice of the associative scan is compiled separately
def returns_to_go(rewards: jax.Array, mask: jax.Array, *, gamma: float) -> jax.Array:
    """Returns the discounted sum of the rewards from each policy token on.

        R_t = r_t + gamma * R_{t+1}, where t counts policy tokens

    Args:
      rewards: [N, T] float, per policy token.
      mask: [N, T] bool or 0/1.
      gamma: discount per policy token, in [0, 1].

    Returns:
      [N, T] float32, or float64 for float64 rewards; 0 where the mask is 0.
    """
    mask, rewards = _token_arrays(mask, rewards)
    return _discounted_sums(rewards, mask, gamma)


@jax.jit
def gae(
    rewards: jax.Array, values: jax.Array, mask: jax.Array, *, gamma: float, gae_lambda: float
) -> tuple[jax.Array, jax.Array]:
    """Returns generalized advantage estimates (Schulman et al., arXiv 1506.02438, eq. 11-16).

        delta_t = r_t + gamma * V_{t+1} - V_t, where t counts policy tokens
        A_t = sum_l (gamma * gae_lambda)^l * delta_{t+l}

    The value after a sequence's last policy token is 0, so a truncated episode is treated as one
    that ended.

    Args:
      rewards: [N, T] float, per policy token.
      values: [N, T] float; values[t] is the value of the state in which token t was chosen. This
        state includes everything before t, inserted documents too, but not t itself.
      mask: [N, T] bool or 0/1.
      gamma: discount per policy token, in [0, 1].
      gae_lambda: in [0, 1]; 0 is the one-step error delta, 1 is `returns_to_go` - values.

    Returns:
      advantages, and returns = advantages + values, the target of the value function. Both are
      [N, T] float32, or float64 for float64 input; 0 where the mask is 0.
    """
    mask, rewards, values = _token_arrays(mask, rewards, values)
    length = mask.shape[1]
    # next_at[t]: position of the next policy token after t, or `length`, where the value is 0.
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
    """Normalises x by its mean and standard deviation over all policy tokens of the batch.

        (x - mean(x)) / (std(x) + eps)

    This is REINFORCE++'s global normalisation of advantages (arXiv 2501.03262), also common in
    PPO. The standard deviation is the population's (divided by the count). Pass all episodes of a
    step; microbatches must not be whitened separately.

    Args:
      x: [N, T] float.
      mask: [N, T] bool or 0/1.
      eps: above 0, keeps the division finite; in units of x.

    Returns:
      [N, T] float32, or float64 for float64 x; exactly 0 where the mask is 0, and everywhere if
      x is equal at all policy tokens.
    """
    mask, x = _token_arrays(mask, x)
    count = jnp.maximum(mask.sum(), 1)
    # Subtract one of the entries first, as in `_minus_mean`.
    x = jnp.where(mask, x - jnp.where(mask, x, -jnp.inf).max(), 0.0)
    x = jnp.where(mask, x - x.sum() / count, 0.0)
    std = jnp.sqrt((x**2).sum() / count)
    return jnp.where(mask, x / (std + eps), 0.0)


def adapted_kl_coef(coef: float, kl: float, *, target: float, horizon: int, episodes: int) -> float:
    """Returns the next KL coefficient, which steers the KL to a target (arXiv 1909.08593, §2.2).

        error = clip(kl / target - 1, -0.2, 0.2)
        coef * (1 + error * episodes / horizon)

    The paper's constant K (0.1) becomes episodes / horizon, so the coefficient changes equally fast
    per episode for any number of episodes per step. A NaN kl gives NaN.

    Args:
      coef: coefficient of this step.
      kl: measured KL(policy || reference) of this step, in the units of `target` (in the paper,
        nats per sequence).
      target: desired KL, above 0.
      horizon: episodes within which the coefficient changes by at most about 20%. It must exceed
        a fifth of `episodes`, or one step could turn the coefficient negative.
      episodes: episodes of this step.

    Raises:
      ValueError: target or horizon out of range.
    """
    if not (target > 0 and 0 <= episodes < 5 * horizon):
        raise ValueError(
            f"target is {target} and horizon is {horizon}; the target must be above 0 and the "
            f"horizon above a fifth of the step's {episodes} episodes"
        )
    error = min(max(kl / target - 1.0, -0.2), 0.2)  # max and min return a NaN first argument
    return coef * (1.0 + error * episodes / horizon)


def _at_least_float32(x: jax.Array) -> jax.Array:
    x = jnp.asarray(x)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _group_rewards(rewards: jax.Array) -> jax.Array:
    if rewards.ndim != 2:
        raise ValueError(f"rewards {rewards.shape} must be [questions, group]")
    return _at_least_float32(rewards)


def _at_least_two(rewards: jax.Array) -> int:
    group = rewards.shape[1]
    if group < 2:
        raise ValueError(f"the group has {group} episode; a group baseline needs 2 or more")
    return group


def _minus_mean(x: jax.Array, axis: int | None) -> jax.Array:
    """x - mean(x), after subtracting min(x).

    Equal entries give exactly 0. The rounding error is relative to the range of x and not to its
    size, so entries such as 1000 ± 0.001 keep their difference.
    """
    x = x - x.min(axis=axis, keepdims=True)
    return x - x.mean(axis=axis, keepdims=True)


def _token_arrays(mask: jax.Array, *arrays: jax.Array) -> list[jax.Array]:
    """Returns the mask as bool, and the arrays in float32 or wider, 0 where the mask is 0."""
    shapes = [array.shape for array in (mask, *arrays)]
    if len(shapes[0]) != 2 or len(set(shapes)) != 1:
        raise ValueError(f"mask and token arrays must have one shape [N, T], not {shapes}")
    mask = jnp.asarray(mask).astype(bool)
    return [mask, *(jnp.where(mask, _at_least_float32(array), 0.0) for array in arrays)]


def _discounted_sums(x: jax.Array, mask: jax.Array, discount: float) -> jax.Array:
    """Returns sum_l discount^l * x_{t+l} at each policy token t, 0 elsewhere.

    In the equation t counts policy tokens. In the scan, each array position is a map of y, the sum
    over later positions: y -> discount * y + x at a policy token, y -> y elsewhere. An associative
    scan combines these maps in log T steps.
    """
    factors = jnp.where(mask, discount, 1.0).astype(x.dtype)
    terms = jnp.where(mask, x, 0.0)

    def combine(later, earlier):
        factor, term = earlier
        return factor * later[0], factor * later[1] + term

    _, sums = jax.lax.associative_scan(combine, (factors, terms), reverse=True, axis=1)
    return jnp.where(mask, sums, 0.0)
