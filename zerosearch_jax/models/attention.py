"""Grouped-query attention of packed rows, of prefilled chunks and of single decoded tokens.

`models.transformer` lists the axis letters.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from zerosearch_jax.models.fused_attention import cudnn_attention, splash_attention
from zerosearch_jax.models.kv_cache import LayerCache, take_tokens

# Kernels for packed rows. None selects `packed_attention`, the only one that needs no mesh.
ATTENTIONS = {"xla": None, "splash": splash_attention, "cudnn": cudnn_attention}
QUERY_BLOCK = 128  # query tokens that `packed_attention` scores at once
KEY_BLOCK = 128  # cached tokens that `prefill_attention` scores at once


def packed_attention(q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array) -> jax.Array:
    """Causal attention within the segments of packed rows.

    Each block of queries is scored only against the keys up to its own end. This halves the work
    and keeps the scores `[B, N, block, T]` small.

    Args:
      q: `[B, T, N, H]`; k, v: `[B, T, K, H]`.
      segment_ids: `[B, T]` int32.

    Returns:
      `[B, T, N, H]`.
    """
    length, dtype = q.shape[1], q.dtype
    # Slices of float32 arrays have float32 gradients, which are then summed over the blocks.
    k, v = k.astype(jnp.float32), v.astype(jnp.float32)
    outputs = []
    for start in range(0, length, QUERY_BLOCK):
        end = min(start + QUERY_BLOCK, length)
        causal = jnp.arange(start, end)[:, None] >= jnp.arange(end)
        mask = causal & (segment_ids[:, start:end, None] == segment_ids[:, None, :end])
        outputs.append(
            jax.nn.dot_product_attention(
                q[:, start:end],
                k[:, :end].astype(dtype),
                v[:, :end].astype(dtype),
                mask=mask[:, None],
            )
        )
    return jnp.concatenate(outputs, axis=1)


def prefill_attention(
    q: jax.Array, own: LayerCache, cache: LayerCache, rows: jax.Array, starts: jax.Array
) -> jax.Array:
    """Attention of chunks of tokens, causal among themselves, to the tokens cached before them.

    Cached keys are read in blocks, up to the longest row's length. The softmax is carried from
    block to block in float32 (Milakov and Gimelshein, arXiv 1805.02867). So the time follows the
    number of cached tokens, and scores stay small.

    Args:
      q: `[P, T, N, H]`.
      own: keys `[P, K, H, T]` and values `[P, K, T, H]` of the chunks.
      cache: all rows of one layer's cache.
      rows: `[P]` cache row of each chunk, see `take_tokens`.
      starts: `[P]` number of tokens cached in each of these rows.

    Returns:
      `[P, T, N, H]` in q's dtype.
    """
    tokens, length = q.shape[1], cache[1].shape[2]
    size = min(KEY_BLOCK, length)
    queries = _by_kv_head(q, own[0].shape[1])

    def attend(carry, keys, values, mask):
        top, total, out = carry
        scores = _scores(queries, keys, mask)
        new_top = jnp.maximum(top, scores.max(axis=-1))
        weights = jnp.exp(scores - new_top[..., None])
        shrink = jnp.exp(top - new_top)
        added = jnp.einsum(
            "bkms,bksh->bkmh", weights.astype(q.dtype), values, preferred_element_type=jnp.float32
        )
        total = total * shrink + weights.sum(axis=-1)
        return new_top, total, out * shrink[..., None] + added

    def block(i, carry):
        first = jnp.minimum(i * size, length - size)  # the last block may overlap the one before
        places = first + jnp.arange(size)
        mask = (places >= i * size) & (places < starts[:, None])
        keys, values = take_tokens(cache, rows, jnp.full_like(rows, first), size)
        return attend(carry, keys, values, mask[:, None])

    nothing = jnp.zeros(queries.shape[:3], jnp.float32)
    carry = nothing - jnp.inf, nothing, jnp.zeros(queries.shape, jnp.float32)
    causal = jnp.arange(tokens)[:, None] >= jnp.arange(tokens)
    carry = attend(carry, *own, causal[None])
    _, total, out = lax.fori_loop(0, -(-starts.max() // size), block, carry)
    return _by_query_head((out / total[..., None]).astype(q.dtype), tokens)


def decode_attention(
    q: jax.Array, parts: Sequence[tuple[jax.Array, jax.Array, jax.Array]]
) -> jax.Array:
    """Attention over keys and values that are split into several parts, with a float32 softmax.

    Args:
      q: `[B, T, N, H]`.
      parts: `(keys, values, mask)` triples. Keys and values have the layout of a `LayerCache`.
        The mask broadcasts to `[B, T, S]` and is True where a query may attend.

    Returns:
      `[B, T, N, H]` in q's dtype.
    """
    rows = _by_kv_head(q, parts[0][0].shape[1])
    scores = [_scores(rows, keys, mask) for keys, _, mask in parts]
    weights = jax.nn.softmax(jnp.concatenate(scores, axis=-1), axis=-1).astype(q.dtype)
    out, start = 0, 0
    for keys, values, _ in parts:
        stop = start + keys.shape[-1]
        out += jnp.einsum("bkms,bksh->bkmh", weights[..., start:stop], values)
        start = stop
    return _by_query_head(out, q.shape[1])


def _by_kv_head(q: jax.Array, kv_heads: int) -> jax.Array:
    """Scales queries `[B, T, N, H]` and groups them by key-value head: `[B, K, (N/K)·T, H]`."""
    b, t, n, h = q.shape
    q = (q * h**-0.5).reshape(b, t, kv_heads, n // kv_heads, h)
    return q.transpose(0, 2, 3, 1, 4).reshape(b, kv_heads, -1, h)


def _by_query_head(out: jax.Array, tokens: int) -> jax.Array:
    """Restores `[B, T, N, H]` from the grouped order `[B, K, (N/K)·T, H]`."""
    b, k, rows, h = out.shape
    out = out.reshape(b, k, rows // tokens, tokens, h).transpose(0, 3, 1, 2, 4)
    return out.reshape(b, tokens, -1, h)


def _scores(q: jax.Array, keys: jax.Array, mask: jax.Array) -> jax.Array:
    """Returns float32 scores `[B, K, M, S]` of queries grouped by `_by_kv_head`.

    Args:
      q: `[B, K, M, H]` where M is (N/K)·T.
      keys: `[B, K, H, S]`.
      mask: `[B, T, S]`, True where a query may attend.
    """
    scores = jnp.einsum("bkmh,bkhs->bkms", q, keys, preferred_element_type=jnp.float32)
    b, k, m, s = scores.shape
    scores = scores.reshape(b, k, -1, mask.shape[1], s)
    return jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min).reshape(b, k, m, s)
