"""One decoder for Llama, SmolLM2, Llama-3.x, Qwen2.5 and Qwen3, as Flax NNX modules.

Training runs the layers stacked under `lax.scan` (one compiled body, remat by name); generation
runs the same `Block` unrolled over a KV cache. It knows nothing of tokens' meaning, of sampling
or of losses.

Axis letters: B batch, T tokens, S cache positions, D embed, N query heads, K key-value heads,
H head size, F MLP, L layers, V vocabulary.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from zerosearch_jax.models.config import ModelConfig, RopeScaling
from zerosearch_jax.models.decode_weights import SUMMED_AXES, OutputMajor
from zerosearch_jax.models.fused_attention import cudnn_attention, splash_attention
from zerosearch_jax.parallel import mesh as mesh_lib

# Logical axes of every parameter, by its last name; `sharding` prepends "layers" when stacked.
PARAM_AXES: dict[str, tuple[str, ...]] = {
    "embedding": ("vocab", "embed"),
    "unembed": ("embed", "vocab"),
    "final_norm": ("embed",),
    "attn_norm": ("embed",),
    "mlp_norm": ("embed",),
    "q": ("embed", "heads", "head_dim"),
    "k": ("embed", "kv_heads", "head_dim"),
    "v": ("embed", "kv_heads", "head_dim"),
    "o": ("heads", "head_dim", "embed"),
    "q_bias": ("heads", "head_dim"),
    "k_bias": ("kv_heads", "head_dim"),
    "v_bias": ("kv_heads", "head_dim"),
    "q_norm": ("head_dim",),
    "k_norm": ("head_dim",),
    "gate": ("embed", "mlp"),
    "up": ("embed", "mlp"),
    "down": ("mlp", "embed"),
}

REMAT_POLICIES = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.checkpoint_dots_with_no_batch_dims,
}

# Kernels for whole rows: None is `packed_attention`, which needs no mesh.
ATTENTIONS = {"xla": None, "splash": splash_attention, "cudnn": cudnn_attention}
QUERY_BLOCK = 128  # tokens of queries that `packed_attention` scores at once
KEY_BLOCK = 128  # cached tokens that `prefill_attention` scores at once

# One layer's keys [B, K, H, S] and values [B, K, S, H]: both products of decoding then read
# contiguous memory, which is what decoding's time goes into.
LayerCache = tuple[jax.Array, jax.Array]
CACHE_AXES = (
    ("batch", "kv_heads", "head_dim", "length"),
    ("batch", "kv_heads", "length", "head_dim"),
)
LENGTH_AXES = tuple(axes.index("length") for axes in CACHE_AXES)


def empty_cache(config: ModelConfig, rows: int, length: int, dtype: Any) -> list[LayerCache]:
    """A KV cache of `rows` × `length` tokens that holds nothing."""
    k, h = config.num_kv_heads, config.head_dim
    return [
        (jnp.zeros((rows, k, h, length), dtype), jnp.zeros((rows, k, length, h), dtype))
        for _ in range(config.num_layers)
    ]


def cache_shardings(
    cache: Callable[[], list[LayerCache]], mesh: jax.sharding.Mesh
) -> list[LayerCache]:
    """A tree like `cache()`'s of shardings: rows over the data axes, heads over `tensor`."""
    shapes = jax.eval_shape(cache)
    return [
        tuple(
            mesh_lib.sharding(mesh, axes, x.shape)
            for axes, x in zip(CACHE_AXES, layer, strict=True)
        )
        for layer in shapes
    ]


def append_to_cache(
    cache: list[LayerCache], rows: jax.Array, starts: jax.Array, new: list[LayerCache]
) -> list[LayerCache]:
    """Writes a block of C tokens into some rows of a cache, in place where the cache is donated.

    Args:
      rows: `[P]` rows of the cache, no two alike; a row that does not exist is dropped.
      starts: `[P]` where in its row each block begins; what reaches past the row's end is lost.
      new: blocks of `[P, K, H, C]` keys and `[P, K, C, H]` values, a layer each.
    """
    length, size = cache[0][1].shape[2], new[0][1].shape[2]
    firsts = jnp.clip(starts, 0, length - size)
    # A block that would reach past the end begins earlier, with what stands there already.
    source = jnp.arange(size) - (starts - firsts)[:, None]

    def write(old, kept, block, axis):
        index = (slice(None), *(None,) * (axis - 1), slice(None), *(None,) * (3 - axis))
        moved = jnp.take_along_axis(block, jnp.maximum(source, 0)[index], axis=axis)
        return lax.scatter(
            old,
            jnp.stack([rows, firsts], axis=1),
            jnp.where((source >= 0)[index], moved, kept),
            lax.ScatterDimensionNumbers(
                update_window_dims=(1, 2, 3),
                inserted_window_dims=(0,),
                scatter_dims_to_operand_dims=(0, axis),
            ),
            unique_indices=True,
            mode=lax.GatherScatterMode.FILL_OR_DROP,
        )

    return [
        tuple(map(write, layer, take_tokens(layer, rows, firsts, size), new_layer, LENGTH_AXES))
        for layer, new_layer in zip(cache, new, strict=True)
    ]


def take_tokens(layer: LayerCache, rows: jax.Array, firsts: jax.Array, size: int) -> LayerCache:
    """`size` tokens of some rows of a layer's cache: keys `[P, K, H, size]`, values likewise.

    Args:
      rows: `[P]`; one that does not exist gives another's.
      firsts: `[P]` the first token to take of each.
    """

    def take(array, axis):
        sizes = (1, *array.shape[1:axis], size, *array.shape[axis + 1 :])

        def one(row, first):
            starts = [first if i == axis else row if i == 0 else 0 for i in range(4)]
            return lax.dynamic_slice(array, starts, sizes)[0]

        return jax.vmap(one)(rows, firsts)

    return tuple(map(take, layer, LENGTH_AXES))


def _by_kv_head(q: jax.Array, kv_heads: int) -> jax.Array:
    """Scaled queries `[B, K, (N/K)·T, H]` of `[B, T, N, H]`: all that share a head, one matrix."""
    b, t, n, h = q.shape
    q = (q * h**-0.5).reshape(b, t, kv_heads, n // kv_heads, h)
    return q.transpose(0, 2, 3, 1, 4).reshape(b, kv_heads, -1, h)


def _by_query_head(out: jax.Array, tokens: int) -> jax.Array:
    """The inverse order: `[B, T, N, H]` of `[B, K, (N/K)·T, H]`."""
    b, k, rows, h = out.shape
    out = out.reshape(b, k, rows // tokens, tokens, h).transpose(0, 3, 1, 2, 4)
    return out.reshape(b, tokens, -1, h)


def _scores(q: jax.Array, keys: jax.Array, mask: jax.Array) -> jax.Array:
    """Float32 scores `[B, K, M, S]` of `_by_kv_head`'s queries; `mask` `[B, T, S]` of theirs."""
    scores = jnp.einsum("bkmh,bkhs->bkms", q, keys, preferred_element_type=jnp.float32)
    b, k, m, s = scores.shape
    scores = scores.reshape(b, k, -1, mask.shape[1], s)
    return jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min).reshape(b, k, m, s)


def decode_attention(
    q: jax.Array, parts: Sequence[tuple[jax.Array, jax.Array, jax.Array]]
) -> jax.Array:
    """Grouped-query attention over keys and values that lie in several parts, softmax in float32.

    Args:
      q: `[B, T, N, H]`.
      parts: keys and values of a `LayerCache` and a mask that broadcasts to `[B, T, S]`, True
        where the query may look.

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


def prefill_attention(
    q: jax.Array, own: LayerCache, cache: LayerCache, rows: jax.Array, starts: jax.Array
) -> jax.Array:
    """Grouped-query attention of chunks to themselves, causally, and to what is cached before.

    Cached keys are read in blocks, as many as the longest row has, with the softmax carried on in
    float32 from block to block (Milakov and Gimelshein, arXiv 1805.02867): the time goes with
    what is cached, and scores stay small.

    Args:
      q: `[P, T, N, H]`; own: the chunks' keys `[P, K, H, T]` and values `[P, K, T, H]`.
      cache: all rows of a layer's cache; rows: `[P]` those of the chunks, see `take_tokens`;
        starts: `[P]` tokens cached in each.

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
        first = jnp.minimum(i * size, length - size)  # the last block may begin earlier
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


def packed_attention(q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array) -> jax.Array:
    """Causal attention within segments, for whole rows.

    Queries go in blocks that look only at the keys up to their own end, which halves the work
    and keeps the scores `[B, N, block, T]` small.

    Args:
      q: `[B, T, N, H]`; k, v: `[B, T, K, H]`.
      segment_ids: `[B, T]` int32.
    """
    length = q.shape[1]
    outputs = []
    for start in range(0, length, QUERY_BLOCK):
        end = min(start + QUERY_BLOCK, length)
        causal = jnp.arange(start, end)[:, None] >= jnp.arange(end)
        mask = causal & (segment_ids[:, start:end, None] == segment_ids[:, None, :end])
        outputs.append(
            jax.nn.dot_product_attention(
                q[:, start:end], k[:, :end], v[:, :end], mask=mask[:, None]
            )
        )
    return jnp.concatenate(outputs, axis=1)


class LinearOperator(Protocol):
    """A weight that is not one plain array: `decode_weights.OutputMajor`, `lora.LowRank`."""

    def product(self, rows: jax.Array) -> jax.Array:
        """`[R, in]` times the weight: `[R, *out]`."""


def dense(x: jax.Array, weight: jax.Array | LinearOperator, summed: int = 1) -> jax.Array:
    """`x` `[B, T, *in]` times `weight` `[*in, *out]` with `summed` axes in, as one plain product.

    XLA's CPU backend runs the backward pass of a product over `[B, T, D]` at a third of the
    speed of the same product over `[B·T, D]`.
    """
    rows = x.reshape(x.shape[0] * x.shape[1], -1)
    if isinstance(weight, jax.Array):
        out = (rows @ weight.reshape(rows.shape[1], -1)).reshape(-1, *weight.shape[summed:])
    else:
        out = weight.product(rows)
    return out.reshape(*x.shape[:2], *out.shape[1:])


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """RMS normalisation over the last axis, in float32, result in x's dtype."""
    x32 = x.astype(jnp.float32)
    x32 = x32 * lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return scale * x32.astype(x.dtype)


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> jax.Array:
    """Inverse wavelengths `[H/2]` in radians per position, with Llama-3's scaling if given."""
    inverse = 1.0 / theta ** (jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    if scaling is None:
        return inverse
    turns = scaling.original_max_positions * inverse / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    smooth = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
    return inverse * (smooth + (1 - smooth) / scaling.factor)


def rope(x: jax.Array, angles: jax.Array) -> jax.Array:
    """Rotates `x` `[B, T, heads, H]` by `angles` `[B, T, H/2]` (halves, not interleaved)."""
    cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


class Block(nnx.Module):
    """Pre-norm attention and SiLU-gated MLP."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype: Any = jnp.float32):
        d, n, k, h, f = (
            config.embed_dim,
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
            config.mlp_dim,
        )
        self.eps = config.norm_eps

        def normal(shape, fan_in, depth_scale=1.0):
            noise = jax.random.normal(rngs.params(), shape, jnp.float32)
            return nnx.Param((noise * depth_scale / math.sqrt(fan_in)).astype(dtype))

        residual = 1 / math.sqrt(2 * config.num_layers)
        self.attn_norm = nnx.Param(jnp.ones((d,), dtype))
        self.q = normal((d, n, h), d)
        self.k = normal((d, k, h), d)
        self.v = normal((d, k, h), d)
        self.o = normal((n, h, d), n * h, residual)
        self.q_bias = nnx.Param(jnp.zeros((n, h), dtype)) if config.qkv_bias else None
        self.k_bias = nnx.Param(jnp.zeros((k, h), dtype)) if config.qkv_bias else None
        self.v_bias = nnx.Param(jnp.zeros((k, h), dtype)) if config.qkv_bias else None
        self.q_norm = nnx.Param(jnp.ones((h,), dtype)) if config.qk_norm else None
        self.k_norm = nnx.Param(jnp.ones((h,), dtype)) if config.qk_norm else None
        self.mlp_norm = nnx.Param(jnp.ones((d,), dtype))
        self.gate = normal((d, f), d)
        self.up = normal((d, f), d)
        self.down = normal((f, d), f, residual)

    def project(self, x: jax.Array, angles: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries `[B, T, N, H]`, keys and values `[B, T, K, H]` of `x` `[B, T, D]`."""
        x = rms_norm(x, self.attn_norm[...], self.eps)
        q, k, v = dense(x, self.q[...]), dense(x, self.k[...]), dense(x, self.v[...])
        if self.q_bias is not None:
            q, k, v = q + self.q_bias[...], k + self.k_bias[...], v + self.v_bias[...]
        if self.q_norm is not None:
            q = rms_norm(q, self.q_norm[...], self.eps)
            k = rms_norm(k, self.k_norm[...], self.eps)
        return rope(q, angles), rope(k, angles), v

    def combine(self, x: jax.Array, attended: jax.Array) -> jax.Array:
        """Residual output `[B, T, D]` from `x` and the attended values `[B, T, N, H]`."""
        x = x + dense(attended, self.o[...], summed=2)
        y = rms_norm(x, self.mlp_norm[...], self.eps)
        y = jax.nn.silu(dense(y, self.gate[...])) * dense(y, self.up[...])
        return x + dense(y, self.down[...])

    def __call__(
        self,
        x: jax.Array,
        angles: jax.Array,
        segment_ids: jax.Array,
        attention: Callable[..., jax.Array] = packed_attention,
    ) -> jax.Array:
        q, k, v = self.project(x, angles)
        return self.combine(x, attention(q, k, v, segment_ids))

    def prefill(
        self,
        x: jax.Array,
        angles: jax.Array,
        cache: LayerCache,
        rows: jax.Array,
        starts: jax.Array,
    ) -> tuple[jax.Array, LayerCache]:
        """`x` `[P, T, D]` behind the cache, see `prefill_attention`; its own keys and values."""
        q, k, v = self.project(x, angles)
        own = k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3)
        return self.combine(x, prefill_attention(q, own, cache, rows, starts)), own

    def decode(
        self,
        x: jax.Array,
        angles: jax.Array,
        past: tuple[jax.Array, jax.Array, jax.Array],
        recent: LayerCache,
        at: jax.Array,
        recent_mask: jax.Array,
    ) -> tuple[jax.Array, LayerCache]:
        """`x` `[B, 1, D]` attending to `past` (an attention part) and to the recent tokens.

        Its own key and value are written into `recent` at position `at` `[]`.
        """
        q, k, v = self.project(x, angles)
        keys = lax.dynamic_update_slice(recent[0], k.transpose(0, 2, 3, 1), (0, 0, 0, at))
        values = lax.dynamic_update_slice(recent[1], v.transpose(0, 2, 1, 3), (0, 0, at, 0))
        attended = decode_attention(q, [past, (keys, values, recent_mask)])
        return self.combine(x, attended), (keys, values)


class Transformer(nnx.Module):
    """The decoder. `stacked` layers (leading axis L) for training, a list for generation.

    Args:
      attention: a key of `ATTENTIONS`, the kernel for whole rows; all but "xla" need the mesh.
      mesh: keeps whole rows split over its data axes. Without it XLA may split the embedding axis
        as the parameters are and hold every row on every device. None: on one device.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        rngs: nnx.Rngs,
        dtype: Any = jnp.float32,
        stacked: bool = True,
        remat: str = "none",
        attention: str = "xla",
        mesh: jax.sharding.Mesh | None = None,
    ):
        if attention not in ATTENTIONS or (ATTENTIONS[attention] and mesh is None):
            raise ValueError(f"attention is {attention!r} with mesh {mesh}; see {set(ATTENTIONS)}")
        self.config = config
        self.stacked = stacked
        self.remat = remat
        self.attention = attention
        self.mesh = mesh
        shape = (config.vocab_size, config.embed_dim)
        self.embedding = nnx.Param(
            (jax.random.normal(rngs.params(), shape) / math.sqrt(config.embed_dim)).astype(dtype)
        )
        self.final_norm = nnx.Param(jnp.ones((config.embed_dim,), dtype))
        if config.tie_embeddings:
            self.unembed = None
        else:
            noise = jax.random.normal(rngs.params(), shape[::-1])
            self.unembed = nnx.Param((noise / math.sqrt(config.embed_dim)).astype(dtype))
        if stacked:

            @nnx.split_rngs(splits=config.num_layers)
            @nnx.vmap
            def blocks(rngs):
                return Block(config, rngs=rngs, dtype=dtype)

            self.layers = blocks(rngs)
        else:
            self.layers = nnx.List(
                [Block(config, rngs=rngs, dtype=dtype) for _ in range(config.num_layers)]
            )

    def unembedding(self) -> jax.Array:
        """The matrix `[D, V]` from hidden states to logits."""
        return self.embedding[...].T if self.unembed is None else self.unembed[...]

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Float32 logits `[..., V]` of hidden states `[..., D]` (decode weights: `[R, D]`)."""
        weight = (self.embedding if self.unembed is None else self.unembed)[...]
        if isinstance(weight, OutputMajor):
            return weight.product(hidden, jnp.float32)
        return jnp.dot(hidden, self.unembedding(), preferred_element_type=jnp.float32)

    def __call__(
        self, tokens: jax.Array, positions: jax.Array, segment_ids: jax.Array
    ) -> jax.Array:
        """Hidden states of whole (packed) rows, causal within each segment.

        Args:
          tokens: `[B, T]` int32.
          positions: `[B, T]` int32, position of each token in its own segment.
          segment_ids: `[B, T]` int32; a token sees only earlier tokens of its segment.

        Returns:
          `[B, T, D]`, after the final norm.
        """
        x = self._by_row(self._embed(tokens))
        angles = self._angles(positions)
        graphdef, stacked = nnx.split(self.layers)
        kernel = ATTENTIONS[self.attention]
        attention = partial(kernel, mesh=self.mesh) if kernel else packed_attention

        def block(x, layer):
            x = nnx.merge(graphdef, layer)(self._by_row(x), angles, segment_ids, attention)
            return self._by_row(x)

        if self.remat != "none":
            block = jax.checkpoint(block, policy=REMAT_POLICIES[self.remat], prevent_cse=False)

        def body(x, layer):
            return block(self._by_token(x), layer), None

        x, _ = lax.scan(body, x, stacked)
        return rms_norm(self._by_row(x), self.final_norm[...], self.config.norm_eps)

    def prefill(
        self, tokens: jax.Array, cache: list[LayerCache], rows: jax.Array, starts: jax.Array
    ) -> tuple[jax.Array, list[LayerCache]]:
        """Hidden states `[P, T, D]` of chunks of tokens behind rows of a cache that is only read.

        Args:
          tokens: `[P, T]`; rows: `[P]` cache rows that they belong behind; starts: `[P]` tokens
            cached in each, after which the chunk's positions go on.

        Returns:
          The hidden states, and the chunks' keys and values, for `append_to_cache`.
        """
        x = self._embed(tokens)
        angles = self._angles(starts[:, None] + jnp.arange(tokens.shape[1]))
        chunks = []
        for block, layer in zip(self.layers, cache, strict=True):
            x, chunk = block.prefill(x, angles, layer, rows, starts)
            chunks.append(chunk)
        return rms_norm(x, self.final_norm[...], self.config.norm_eps), chunks

    def decode(
        self,
        tokens: jax.Array,
        past: list[LayerCache],
        past_length: jax.Array,
        recent: list[LayerCache],
        at: jax.Array,
    ) -> tuple[jax.Array, list[LayerCache]]:
        """Hidden states `[B, D]` of a token a row, behind a KV cache that is only read.

        A token sees the first `past_length` `[B]` tokens of `past`, then those of `recent` up to
        itself. Its position is `past_length + at`. The two are apart because writing one token a
        row into a long cache costs more than computing it.

        Args:
          tokens: `[B]`.
          past, recent: a `LayerCache` for each layer; `past` may hold no tokens at all.
          at: `[]` int32, where in `recent` the tokens go, alike for all rows.

        Returns:
          The hidden states, and `recent` with the tokens' keys and values.
        """
        x = self._embed(tokens[:, None])
        angles = self._angles(past_length[:, None] + at)
        past_mask = (jnp.arange(past[0][1].shape[2]) < past_length[:, None])[:, None]
        recent_mask = (jnp.arange(recent[0][1].shape[2]) <= at)[None, None]
        new_recent = []
        for block, (keys, values), layer_recent in zip(self.layers, past, recent, strict=True):
            x, layer_recent = block.decode(
                x, angles, (keys, values, past_mask), layer_recent, at, recent_mask
            )
            new_recent.append(layer_recent)
        return rms_norm(x[:, 0], self.final_norm[...], self.config.norm_eps), new_recent

    def _by_row(self, x: jax.Array) -> jax.Array:
        if self.mesh is None:
            return x
        return lax.with_sharding_constraint(x, mesh_lib.sharding_of_rows(self.mesh))

    def _by_token(self, x: jax.Array) -> jax.Array:
        """Tokens split over `tensor`, too: what is kept of each layer for the backward pass."""
        if self.mesh is None or x.shape[1] % self.mesh.shape["tensor"]:
            return self._by_row(x)
        return lax.with_sharding_constraint(x, mesh_lib.sharding_of_tokens(self.mesh))

    def _embed(self, tokens: jax.Array) -> jax.Array:
        weight = self.embedding[...]
        return weight.rows(tokens) if isinstance(weight, OutputMajor) else weight[tokens]

    def _angles(self, positions: jax.Array) -> jax.Array:
        config = self.config
        frequencies = rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
        return positions[:, :, None].astype(jnp.float32) * frequencies


def abstract_model(
    config: ModelConfig, *, dtype: Any = jnp.float32, stacked: bool = True, **options: Any
) -> tuple[nnx.GraphDef, nnx.State]:
    """Graph definition and parameter shapes of a model, without making any array.

    Args:
      options: `remat`, `attention` and `mesh` of `Transformer`.
    """
    model = nnx.eval_shape(
        lambda: Transformer(config, rngs=nnx.Rngs(0), dtype=dtype, stacked=stacked, **options)
    )
    return nnx.split(model)


def init_params(config: ModelConfig, seed: int, *, dtype: Any = jnp.float32) -> nnx.State:
    """Random parameters of a stacked model."""
    return nnx.state(Transformer(config, rngs=nnx.Rngs(seed), dtype=dtype))


def param_shardings(
    params: nnx.State, mesh: jax.sharding.Mesh, rules: mesh_lib.Rules = mesh_lib.TRAIN_RULES
) -> nnx.State:
    """A tree like `params` (arrays or shapes) of shardings by `PARAM_AXES` and `rules`.

    Raises:
      UserError: a size does not divide by its mesh axis; it names the nearest mesh that works.
    """

    def name_of(path):
        names = [entry.key for entry in path if hasattr(entry, "key")]
        return [name for name in names if name in PARAM_AXES][-1]

    def of_decode_weights(leaf):
        return isinstance(leaf, OutputMajor)

    dimensions = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(params, is_leaf=of_decode_weights):
        if not of_decode_weights(leaf):
            axes = PARAM_AXES[name_of(path)]
            dimensions += zip(axes, leaf.shape[-len(axes) :], strict=True)
    mesh_lib.check_divides(mesh, dimensions, rules)

    def one(path, leaf):
        name = name_of(path)
        axes = PARAM_AXES[name]
        if of_decode_weights(leaf):
            summed = SUMMED_AXES[name]
            outer = tuple(axis for i, axis in enumerate(axes) if i not in summed)
            inner = tuple(axes[i] for i in summed)
            return replace(
                leaf,
                values=mesh_lib.sharding(mesh, outer + inner, leaf.values.shape, rules),
                scale=None
                if leaf.scale is None
                else mesh_lib.sharding(mesh, outer, leaf.scale.shape, rules),
            )
        axes = ("layers",) * (len(leaf.shape) - len(axes)) + axes
        return mesh_lib.sharding(mesh, axes, leaf.shape, rules)

    return jax.tree_util.tree_map_with_path(one, params, is_leaf=of_decode_weights)


def split_layers(params: nnx.State) -> tuple[nnx.State, nnx.State]:
    """Of training parameters what is no layer's, and the layers' stacked ones, each `[L, ...]`."""
    rest, layers = {}, {}
    for path, leaf in nnx.to_flat_state(params):
        if path[0] == "layers":
            layers[path[1:]] = leaf
        else:
            rest[path] = leaf
    return nnx.from_flat_state(rest), nnx.from_flat_state(layers)


def join_layers(rest: nnx.State, layers: Iterable[nnx.State]) -> nnx.State:
    """The generation layout, a list of layers."""
    flat = dict(nnx.to_flat_state(rest))
    for i, layer in enumerate(layers):
        flat |= {("layers", i, *path): leaf for path, leaf in nnx.to_flat_state(layer)}
    return nnx.from_flat_state(flat)
