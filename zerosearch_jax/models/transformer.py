"""One decoder for Llama, SmolLM2, Llama-3.x, Qwen2.5 and Qwen3, as Flax NNX modules.

Training runs the layers stacked under `lax.scan` (one compiled body, remat by name); generation
runs the same `Block` unrolled over a KV cache. It knows nothing of tokens' meaning, of sampling
or of losses.

Axis letters: B batch, T tokens, S cache positions, D embed, N query heads, K key-value heads,
H head size, F MLP, L layers, V vocabulary.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from zerosearch_jax.models.config import ModelConfig, RopeScaling
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

QUERY_BLOCK = 128  # tokens of queries that `packed_attention` scores at once

# One layer's keys [B, K, H, S] and values [B, K, S, H]: both products of decoding then read
# contiguous memory, which is what decoding's time goes into.
LayerCache = tuple[jax.Array, jax.Array]
CACHE_AXES = (
    ("batch", "kv_heads", "head_dim", "length"),
    ("batch", "kv_heads", "length", "head_dim"),
)


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


def cached_attention(
    q: jax.Array, keys: jax.Array, values: jax.Array, mask: jax.Array
) -> jax.Array:
    """Grouped-query attention over a KV cache, softmax in float32.

    Args:
      q: `[B, T, N, H]`.
      keys, values: a `LayerCache`.
      mask: `[B, T, S]` bool, True where the query may look.

    Returns:
      `[B, T, N, H]` in q's dtype.
    """
    b, t, n, h = q.shape
    k = keys.shape[1]
    # Queries that share a key-value head become rows of one matrix.
    q = (q * h**-0.5).reshape(b, t, k, n // k, h).transpose(0, 2, 3, 1, 4).reshape(b, k, -1, h)
    scores = jnp.einsum("bkmh,bkhs->bkms", q, keys, preferred_element_type=jnp.float32)
    scores = scores.reshape(b, k, n // k, t, -1)
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(values.dtype).reshape(b, k, -1, mask.shape[-1])
    out = jnp.einsum("bkms,bksh->bkmh", weights, values)
    return out.reshape(b, k, n // k, t, h).transpose(0, 3, 1, 2, 4).reshape(b, t, n, h)


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


def dense(x: jax.Array, weight: jax.Array) -> jax.Array:
    """`x` `[B, T, D]` times `weight` `[D, ...]`, as one plain matrix product.

    XLA's CPU backend runs the backward pass of a product over `[B, T, D]` at a third of the
    speed of the same product over `[B·T, D]`.
    """
    flat = x.reshape(-1, x.shape[-1]) @ weight.reshape(weight.shape[0], -1)
    return flat.reshape(*x.shape[:-1], *weight.shape[1:])


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
        x = x + dense(attended.reshape(*x.shape[:2], -1), self.o[...].reshape(-1, x.shape[-1]))
        y = rms_norm(x, self.mlp_norm[...], self.eps)
        y = jax.nn.silu(dense(y, self.gate[...])) * dense(y, self.up[...])
        return x + dense(y, self.down[...])

    def __call__(self, x: jax.Array, angles: jax.Array, segment_ids: jax.Array) -> jax.Array:
        q, k, v = self.project(x, angles)
        return self.combine(x, packed_attention(q, k, v, segment_ids))

    def cached(
        self, x: jax.Array, angles: jax.Array, positions: jax.Array, cache: LayerCache
    ) -> tuple[jax.Array, LayerCache]:
        """Writes `x`'s keys and values at `positions` `[B, T]` and attends to all up to them.

        A position beyond the cache is dropped, never written elsewhere.
        """
        q, k, v = self.project(x, angles)
        rows = jnp.arange(x.shape[0])[:, None]
        keys = cache[0].at[rows, :, :, positions].set(k, mode="drop")
        values = cache[1].at[rows, :, positions].set(v, mode="drop")
        mask = jnp.arange(values.shape[2]) <= positions[:, :, None]
        return self.combine(x, cached_attention(q, keys, values, mask)), (keys, values)


class Transformer(nnx.Module):
    """The decoder. `stacked` layers (leading axis L) for training, a list for generation."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        rngs: nnx.Rngs,
        dtype: Any = jnp.float32,
        stacked: bool = True,
        remat: str = "none",
    ):
        self.config = config
        self.stacked = stacked
        self.remat = remat
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
        """Float32 logits `[..., V]` of hidden states `[..., D]`."""
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
        x = self.embedding[...][tokens]
        angles = self._angles(positions)
        graphdef, stacked = nnx.split(self.layers)

        def body(x, layer):
            return nnx.merge(graphdef, layer)(x, angles, segment_ids), None

        if self.remat != "none":
            body = jax.checkpoint(body, policy=REMAT_POLICIES[self.remat], prevent_cse=False)
        x, _ = lax.scan(body, x, stacked)
        return rms_norm(x, self.final_norm[...], self.config.norm_eps)

    def cached(
        self, tokens: jax.Array, positions: jax.Array, cache: list[LayerCache]
    ) -> tuple[jax.Array, list[LayerCache]]:
        """Hidden states `[B, T, D]` of `tokens` `[B, T]` appended to a KV cache.

        Args:
          positions: `[B, T]` int32, where in the row's cache each token goes.
          cache: a `LayerCache` for each layer.
        """
        x = self.embedding[...][tokens]
        angles = self._angles(positions)
        new_cache = []
        for block, layer_cache in zip(self.layers, cache, strict=True):
            x, layer_cache = block.cached(x, angles, positions, layer_cache)
            new_cache.append(layer_cache)
        return rms_norm(x, self.final_norm[...], self.config.norm_eps), new_cache

    def _angles(self, positions: jax.Array) -> jax.Array:
        config = self.config
        frequencies = rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
        return positions[:, :, None].astype(jnp.float32) * frequencies


def abstract_model(
    config: ModelConfig, *, dtype: Any = jnp.float32, stacked: bool = True, remat: str = "none"
) -> tuple[nnx.GraphDef, nnx.State]:
    """Graph definition and parameter shapes of a model, without making any array."""
    model = nnx.eval_shape(
        lambda: Transformer(config, rngs=nnx.Rngs(0), dtype=dtype, stacked=stacked, remat=remat)
    )
    return nnx.split(model)


def init_params(config: ModelConfig, seed: int, *, dtype: Any = jnp.float32) -> nnx.State:
    """Random parameters of a stacked model."""
    return nnx.state(Transformer(config, rngs=nnx.Rngs(seed), dtype=dtype))


def param_shardings(params: nnx.State, mesh: jax.sharding.Mesh) -> nnx.State:
    """A tree like `params` (arrays or shapes) of shardings by `PARAM_AXES`."""

    def one(path, leaf):
        names = [entry.key for entry in path if hasattr(entry, "key")]
        axes = PARAM_AXES[[name for name in names if name in PARAM_AXES][-1]]
        axes = ("layers",) * (len(leaf.shape) - len(axes)) + axes
        return mesh_lib.sharding(mesh, axes, leaf.shape)

    return jax.tree_util.tree_map_with_path(one, params)


def unstack_layers(params: nnx.State, num_layers: int) -> nnx.State:
    """The generation layout (a list of layers) of stacked training parameters; jit-able."""
    flat = {}
    for path, leaf in nnx.to_flat_state(params):
        if path[0] == "layers":
            for i in range(num_layers):
                flat[("layers", i, *path[1:])] = leaf.replace(leaf[...][i])
        else:
            flat[path] = leaf
    return nnx.from_flat_state(flat)
