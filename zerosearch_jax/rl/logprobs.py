"""Log-probabilities and entropy of given tokens, without the `[B, T, V]` logits.

The vocabulary projection is done for `chunk` positions at a time and done again for the
gradient, so the largest array is `[B, chunk, V]`. This module must not know models or losses.
"""

import functools

import jax
import jax.numpy as jnp


def chunked_logprobs(
    hidden: jax.Array,
    unembed: jax.Array,
    targets: jax.Array,
    *,
    chunk: int,
    temperature: float = 1.0,
    with_entropy: bool = True,
) -> tuple[jax.Array, jax.Array]:
    """log softmax(hidden @ unembed / temperature) at the targets, and the entropy.

    The product is taken in the dtype of `hidden` and accumulated in float32; the rest is float32.

    Args:
      hidden: [B, T, D] final hidden states; position t predicts targets[:, t].
      unembed: [D, V] output projection, any float dtype.
      targets: [B, T] int32 token ids in [0, V); any valid id where the result is not used.
      chunk: positions of T at a time, at least 1; T need not be a multiple of it.
      temperature: the one that the tokens were sampled with, above 0.
      with_entropy: False leaves the entropy out (zeros) and saves its time.

    Returns:
      logprobs [B, T] float32 and entropy [B, T] float32 in nats.
    """
    _check(hidden, unembed, targets, chunk, temperature)
    batch, length, _ = hidden.shape
    chunk = min(chunk, length)
    padding = -length % chunk

    def to_chunks(x):  # [B, T, ...] -> [T/chunk, B, chunk, ...]
        x = jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(batch, -1, chunk, *x.shape[2:]), 1, 0)

    def from_chunks(x):  # [T/chunk, B, chunk] -> [B, T]
        return jnp.moveaxis(x, 0, 1).reshape(batch, -1)[:, :length]

    # The scan itself prevents the common-subexpression elimination that would undo the remat.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def one_chunk(hidden_chunk, weights, target_chunk):
        # Cast here and not outside: the weights' gradient is then summed over the chunks in the
        # weights' own dtype, not in that of `hidden`.
        # As one [B·chunk, D] product: XLA's CPU backend is slow on the gradient of a batched one.
        logits = jnp.dot(
            hidden_chunk.reshape(-1, hidden_chunk.shape[-1]),
            weights.astype(hidden_chunk.dtype),
            preferred_element_type=jnp.float32,
        ).reshape(*hidden_chunk.shape[:2], -1)
        log_p = jax.nn.log_softmax(logits / temperature, axis=-1)
        logprobs = jnp.take_along_axis(log_p, target_chunk[..., None], axis=-1)[..., 0]
        if not with_entropy:
            return logprobs, jnp.zeros_like(logprobs)
        return logprobs, -(jnp.exp(log_p) * log_p).sum(axis=-1)

    def step(carry, xs):
        hidden_chunk, target_chunk = xs
        return carry, one_chunk(hidden_chunk, unembed, target_chunk)

    _, (logprobs, entropy) = jax.lax.scan(step, None, (to_chunks(hidden), to_chunks(targets)))
    return from_chunks(logprobs), from_chunks(entropy)


def _check(
    hidden: jax.Array, unembed: jax.Array, targets: jax.Array, chunk: int, temperature: float
) -> None:
    if hidden.ndim != 3 or unembed.ndim != 2 or hidden.shape[2] != unembed.shape[0]:
        raise ValueError(f"hidden {hidden.shape}, unembed {unembed.shape}: want [B,T,D], [D,V]")
    if targets.shape != hidden.shape[:2]:
        raise ValueError(f"targets {targets.shape} must be [B, T] = {hidden.shape[:2]}")
    if chunk < 1:
        raise ValueError(f"chunk is {chunk}; it must be at least 1")
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; it must be above 0")
