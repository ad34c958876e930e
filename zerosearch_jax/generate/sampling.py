"""Sampling of one token per row of logits.

Each row draws from its own key, so its tokens do not depend on the other rows of the batch.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from zerosearch_jax.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters.

    Attributes:
      temperature: divides the logits; 0 selects the most likely token.
      top_k: keeps the k most likely tokens; 0 keeps all.
      top_p: keeps the smallest set of most likely tokens whose mass reaches p; 1 keeps all.

    Raises:
      UserError: a parameter is out of range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self):
        if self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise UserError(
                f"sampling needs temperature ≥ 0, top_k ≥ 0 and 0 < top_p ≤ 1, got {self}"
            )


GREEDY = Sampling(temperature=0.0)


def sample(logits: jax.Array, keys: jax.Array, sampling: Sampling) -> tuple[jax.Array, jax.Array]:
    """Draws one token per row.

    Args:
      logits: `[S, V]` float32.
      keys: `[S]` typed PRNG keys, one per row.

    Returns:
      Tokens `[S]` int32 and their log-probs `[S]` float32. The log-probs belong to the tempered
      distribution *before* top-k and top-p, because the learner recomputes these. At temperature 0
      they belong to the untempered distribution.
    """
    if sampling.temperature == 0:
        tokens = jnp.argmax(logits, axis=-1)
        return tokens.astype(jnp.int32), _pick(jax.nn.log_softmax(logits), tokens)
    logprobs = jax.nn.log_softmax(logits / sampling.temperature)
    kept = keep_top_p(keep_top_k(logprobs, sampling.top_k), sampling.top_p)
    noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:]))(keys)
    tokens = jnp.argmax(kept + noise, axis=-1)
    return tokens.astype(jnp.int32), _pick(logprobs, tokens)


def keep_top_k(logprobs: jax.Array, k: int) -> jax.Array:
    """Sets all but the k most likely tokens of `[S, V]` to -inf; keeps ties, and all if k is 0."""
    if k == 0 or k >= logprobs.shape[-1]:
        return logprobs
    least = jax.lax.top_k(logprobs, k)[0][:, -1:]
    return jnp.where(logprobs >= least, logprobs, -jnp.inf)


def keep_top_p(logprobs: jax.Array, p: float) -> jax.Array:
    """Sets `[S, V]` to -inf outside the smallest set of most likely tokens with mass at least p."""
    if p == 1:
        return logprobs
    ordered = jnp.sort(jax.nn.log_softmax(logprobs), axis=-1, descending=True)
    before = jnp.cumsum(jnp.exp(ordered), axis=-1) - jnp.exp(ordered)
    count = jnp.sum(before < p, axis=-1, keepdims=True)
    least = jnp.take_along_axis(jnp.sort(logprobs, axis=-1, descending=True), count - 1, axis=-1)
    return jnp.where(logprobs >= least, logprobs, -jnp.inf)


def _pick(logprobs: jax.Array, tokens: jax.Array) -> jax.Array:
    return jnp.take_along_axis(logprobs, tokens[:, None], axis=-1)[:, 0]
