"""From logits to one token a row. Each row draws from its own key, so a row's tokens do not
depend on which other rows it is decoded with."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from zerosearch_jax.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    Attributes:
      temperature: divides the logits; 0 takes the likeliest token.
      top_k: keep the k likeliest tokens; 0 keeps all.
      top_p: keep the smallest set of likeliest tokens whose mass reaches p; 1 keeps all.
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
    """Draws a token a row.

    Args:
      logits: `[S, V]` float32.
      keys: `[S]` typed PRNG keys, one a row.

    Returns:
      Tokens `[S]` int32 and their log-probs `[S]` float32 under the tempered distribution
      *before* top-k and top-p (at temperature 0: under the untempered one), which is the
      quantity that the learner recomputes.
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
    """`[S, V]` with all but the k likeliest (and those tied with the last) at -inf; k 0: all."""
    if k == 0 or k >= logprobs.shape[-1]:
        return logprobs
    least = jax.lax.top_k(logprobs, k)[0][:, -1:]
    return jnp.where(logprobs >= least, logprobs, -jnp.inf)


def keep_top_p(logprobs: jax.Array, p: float) -> jax.Array:
    """`[S, V]` with -inf outside the smallest likeliest set whose mass reaches p."""
    if p == 1:
        return logprobs
    ordered = jnp.sort(jax.nn.log_softmax(logprobs), axis=-1, descending=True)
    before = jnp.cumsum(jnp.exp(ordered), axis=-1) - jnp.exp(ordered)
    count = jnp.sum(before < p, axis=-1, keepdims=True)
    least = jnp.take_along_axis(jnp.sort(logprobs, axis=-1, descending=True), count - 1, axis=-1)
    return jnp.where(logprobs >= least, logprobs, -jnp.inf)


def _pick(logprobs: jax.Array, tokens: jax.Array) -> jax.Array:
    return jnp.take_along_axis(logprobs, tokens[:, None], axis=-1)[:, 0]
