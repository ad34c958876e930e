"""Log-probs and entropy of given tokens, without the `[B, T, V]` logits.

The vocabulary projection handles `chunk` positions at a time and is recomputed for the gradient,
so the largest array is `[B, chunk, V]`. Masked positions are skipped: four of five tokens of an
episode are prompt or documents, whose log-probs no loss reads. This module knows no models or
losses.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax


def chunked_logprobs(
    hidden: jax.Array,
    unembed: jax.Array,
    targets: jax.Array,
    *,
    chunk: int,
    mask: jax.Array | None = None,
    temperature: float = 1.0,
    with_entropy: bool = True,
) -> tuple[jax.Array, jax.Array]:
    """Returns log softmax(hidden @ unembed / temperature) at the targets, and the entropy.

    Matrix products, including those of the gradient, take inputs in the dtype of `hidden` and
    accumulate in float32; everything else is float32. The gradient of `unembed` is summed over the
    chunks in float32 and rounded once to the dtype of `unembed`. Differentiable once, in reverse
    mode.

    Args:
      hidden: [B, T, D] final hidden states; position t predicts targets[:, t].
      unembed: [D, V] output projection, any float dtype.
      targets: [B, T] int32 token ids in [0, V); any valid id where the result is not used.
      mask: [B, T] bool or 0/1, positions to compute; None: all.
      chunk: positions of T at a time, at least 1; T need not be a multiple of it.
      temperature: sampling temperature of the tokens, above 0.
      with_entropy: False returns zeros as entropy and saves its time.

    Returns:
      logprobs [B, T] float32 and entropy [B, T] float32 in nats; 0 where the mask is 0.
    """
    wanted = jnp.ones(targets.shape, bool) if mask is None else mask.astype(bool)
    _check(hidden, unembed, targets, wanted, chunk, temperature)
    batch, length, _ = hidden.shape
    chunk = min(chunk, length)
    padding = -length % chunk

    # Move wanted positions to the start of each row, so that the remaining chunks can be skipped.
    order = jnp.argsort(~wanted, axis=1, stable=True)
    place = jnp.argsort(order, axis=1)
    most = wanted.sum(axis=1).max()

    # Merge batch and chunk into one dimension: XLA's CPU backend is slow on batched products.
    def to_chunks(x):  # [B, T, ...] -> [T/chunk, B·chunk, ...]
        x = jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))
        x = jnp.moveaxis(x.reshape(batch, -1, chunk, *x.shape[2:]), 1, 0)
        return x.reshape(-1, batch * chunk, *x.shape[3:])

    def from_chunks(x):  # [T/chunk, B·chunk] -> [B, T]
        x = jnp.moveaxis(x.reshape(-1, batch, chunk), 0, 1).reshape(batch, -1)
        return jnp.where(wanted, jnp.take_along_axis(x, place, axis=1), 0.0)

    # The embedding is [V, D]. If `unembed` is its transpose, the two transpositions cancel, and no
    # backend keeps a transposed copy of it or of its gradient for the loops below.
    logprobs, entropy = _of_chunks(
        to_chunks(jnp.take_along_axis(hidden, order[..., None], axis=1)),
        unembed.T,
        to_chunks(jnp.take_along_axis(targets, order, axis=1)),
        -(-most // chunk),
        temperature,
        with_entropy,
    )
    return from_chunks(logprobs), from_chunks(entropy)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _of_chunks(hidden, embedding, targets, count, temperature, with_entropy):
    """Returns log-probs and entropies `[C, N]` of hidden states `[C, N, D]`, targets `[C, N]`.

    Only the first `count` `[]` of the C chunks are computed; the others get 0. One chunk's logits
    `[N, V]` exist at a time; `embedding` is `[V, D]`. The gradient keeps only the log-sum-exp and
    the entropy of each position.
    """
    return _forward(hidden, embedding, targets, count, temperature, with_entropy)[0]


def _forward(hidden, embedding, targets, count, temperature, with_entropy):
    weights = embedding.astype(hidden.dtype)

    def step(i, out):
        rows, ids = hidden[i], targets[i]
        logits = _logits(rows, weights, temperature)
        top = logits.max(axis=-1)
        shifted = logits - top[:, None]
        odds = jnp.exp(shifted)
        total = odds.sum(axis=-1)
        lse = top + jnp.log(total)
        logprobs = jnp.take_along_axis(logits, ids[:, None], axis=-1)[:, 0] - lse
        entropy = jnp.zeros_like(logprobs)
        if with_entropy:
            entropy = jnp.log(total) - (odds * shifted).sum(axis=-1) / total
        found = (logprobs, entropy, lse)
        return tuple(x.at[i].set(new) for x, new in zip(out, found, strict=True))

    zeros = (jnp.zeros(targets.shape, jnp.float32),) * 3
    logprobs, entropy, lse = lax.fori_loop(0, count, step, zeros)
    return (logprobs, entropy), (hidden, embedding, targets, count, lse, entropy)


def _backward(temperature, with_entropy, residuals, cotangents):
    """Gradient, with p the softmax, H its entropy, and cotangents g of log-probs, e of entropies.

    dlogits = (g·(onehot(target) - p) - e·p·(log p + H)) / temperature
    """
    hidden, embedding, targets, count, *of_positions = residuals
    weights = embedding.astype(hidden.dtype)

    def step(i, grads):
        hidden_grad, embedding_grad = grads
        rows, ids = hidden[i], targets[i]
        lse, entropy, g, e = (x[i][:, None] for x in (*of_positions, *cotangents))
        log_p = _logits(rows, weights, temperature) - lse
        pull = g + e * (log_p + entropy) if with_entropy else g
        # A comparison, unlike a scatter, fuses into the pass over the logits and stays sharded.
        at_target = jnp.arange(weights.shape[0]) == ids[:, None]
        dlogits = (jnp.where(at_target, g, 0.0) - jnp.exp(log_p) * pull) / temperature
        dlogits = dlogits.astype(hidden.dtype)
        product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
        embedding_grad += product("nv,nd->vd", dlogits, rows)
        rows_grad = product("nv,vd->nd", dlogits, weights).astype(hidden.dtype)
        return hidden_grad.at[i].set(rows_grad), embedding_grad

    zeros = jnp.zeros_like(hidden), jnp.zeros(embedding.shape, jnp.float32)
    hidden_grad, embedding_grad = lax.fori_loop(0, count, step, zeros)
    return hidden_grad, embedding_grad.astype(embedding.dtype), None, None


_of_chunks.defvjp(_forward, _backward)


def _logits(rows: jax.Array, weights: jax.Array, temperature: float) -> jax.Array:
    """Returns float32 logits `[N, V]` of rows `[N, D]` and weights `[V, D]`."""
    logits = jnp.einsum("nd,vd->nv", rows, weights, preferred_element_type=jnp.float32)
    return logits / temperature


def _check(
    hidden: jax.Array,
    unembed: jax.Array,
    targets: jax.Array,
    mask: jax.Array,
    chunk: int,
    temperature: float,
) -> None:
    if hidden.ndim != 3 or unembed.ndim != 2 or hidden.shape[2] != unembed.shape[0]:
        raise ValueError(
            f"hidden {hidden.shape} must be [B, T, D] and unembed {unembed.shape} [D, V]"
        )
    for name, array in (("targets", targets), ("mask", mask)):
        if array.shape != hidden.shape[:2]:
            raise ValueError(f"{name} {array.shape} must be [B, T] = {hidden.shape[:2]}")
    if chunk < 1:
        raise ValueError(f"chunk is {chunk}; it must be at least 1")
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; it must be above 0")
