"""The decoder-only transformer of Llama, SmolLM2, Llama-3.x, Qwen2.5 and Qwen3, in Flax NNX.

Training scans over stacked layers (`lax.scan`), so one layer is compiled and rematerialised.
Generation runs the same `Block` layer by layer over a KV cache.

Axis letters: B batch, T tokens, S cache positions, D embed, N query heads, K key-value heads,
H head size, F MLP, L layers, V vocabulary.
"""

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from zerosearch_jax.models.attention import (
    ATTENTIONS,
    decode_attention,
    packed_attention,
    prefill_attention,
)
from zerosearch_jax.models.config import ModelConfig
from zerosearch_jax.models.decode_weights import SUMMED_AXES, OutputMajor
from zerosearch_jax.models.kv_cache import LayerCache
from zerosearch_jax.models.layers import (
    add_bias,
    dense,
    embed,
    rms_norm,
    rope,
    rope_frequencies,
)
from zerosearch_jax.parallel import mesh as mesh_lib

# Logical axes of each parameter, by the last part of its path. `param_shardings` prepends "layers"
# for stacked layers.
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


class Block(nnx.Module):
    """One layer: pre-norm attention and SiLU-gated MLP, each with a residual connection."""

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
        """Returns queries `[B, T, N, H]`, keys and values `[B, T, K, H]` of `x` `[B, T, D]`."""
        x = rms_norm(x, self.attn_norm[...], self.eps)
        q, k, v = dense(x, self.q[...]), dense(x, self.k[...]), dense(x, self.v[...])
        if self.q_bias is not None:
            q, k = add_bias(q, self.q_bias[...]), add_bias(k, self.k_bias[...])
            v = add_bias(v, self.v_bias[...])
        if self.q_norm is not None:
            q = rms_norm(q, self.q_norm[...], self.eps)
            k = rms_norm(k, self.k_norm[...], self.eps)
        return rope(q, angles), rope(k, angles), v

    def combine(self, x: jax.Array, attended: jax.Array) -> jax.Array:
        """Returns the output `[B, T, D]` from `x` and the attended values `[B, T, N, H]`."""
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
        """Runs the layer on chunks `x` `[P, T, D]` that follow cached tokens.

        See `prefill_attention` for `cache`, `rows` and `starts`. The cache is only read.

        Returns:
          The output `[P, T, D]`, and the chunks' keys and values.
        """
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
        """Runs the layer on one token per row, which attends to `past` and to `recent`.

        Args:
          x: `[B, 1, D]`.
          past: keys, values and mask, as in the `parts` of `decode_attention`.
          recent: keys and values of the tokens decoded since `past`.
          at: `[]` int32, position in `recent` where the new key and value are written.
          recent_mask: broadcasts to `[B, 1, S]`, True where a token may attend to `recent`.

        Returns:
          The output `[B, 1, D]`, and the updated `recent`.
        """
        q, k, v = self.project(x, angles)
        keys = lax.dynamic_update_slice(recent[0], k.transpose(0, 2, 3, 1), (0, 0, 0, at))
        values = lax.dynamic_update_slice(recent[1], v.transpose(0, 2, 1, 3), (0, 0, at, 0))
        attended = decode_attention(q, [past, (keys, values, recent_mask)])
        return self.combine(x, attended), (keys, values)


class Transformer(nnx.Module):
    """Decoder with stacked layers (training) or a list of layers (generation).

    Args:
      stacked: keep all layers in one `Block` whose parameters have a leading axis L.
      remat: a key of `REMAT_POLICIES`; selects the activations kept for the backward pass.
      attention: a key of `ATTENTIONS`, the kernel for packed rows. All but "xla" need a mesh.
      mesh: mesh whose data axes split the rows of activations. Without it XLA may split the
        embedding axis like the parameters' and hold every row on every device. None is meant
        for one device.
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
            raise ValueError(
                f"attention={attention!r} with mesh={mesh} is not supported: use one of "
                f"{', '.join(ATTENTIONS)}; all but 'xla' need a mesh"
            )
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
        """Returns the matrix `[D, V]` that maps hidden states to logits."""
        return self.embedding[...].T if self.unembed is None else self.unembed[...]

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Returns float32 logits `[..., V]` of hidden states `[..., D]`.

        With decode weights (`OutputMajor`) the hidden states must be `[R, D]`.
        """
        weight = (self.embedding if self.unembed is None else self.unembed)[...]
        if isinstance(weight, OutputMajor):
            return weight.product(hidden, jnp.float32)
        return jnp.dot(hidden, self.unembedding(), preferred_element_type=jnp.float32)

    def __call__(
        self, tokens: jax.Array, positions: jax.Array, segment_ids: jax.Array
    ) -> jax.Array:
        """Returns hidden states of packed rows, causal within each segment.

        Args:
          tokens: `[B, T]` int32.
          positions: `[B, T]` int32, position of each token in its segment.
          segment_ids: `[B, T]` int32. A token attends to itself and to earlier tokens of its
            segment.

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
        """Runs chunks of tokens that continue rows of a cache; the cache is only read.

        Args:
          tokens: `[P, T]` int32.
          rows: `[P]` cache row that each chunk continues.
          starts: `[P]` number of tokens cached in each row, which is the position of the chunk's
            first token.

        Returns:
          Hidden states `[P, T, D]`, and the chunks' keys and values for `append_to_cache`.
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
        """Runs one token per row behind `past`, which is only read, and `recent`.

        A token attends to the first `past_length` tokens of `past`, then to `recent` up to
        itself. Its position is `past_length + at`. `recent` is a separate array because writing
        one token per row into a long cache costs more than computing the token.

        Args:
          tokens: `[B]` int32.
          past: a `LayerCache` per layer; may have length 0.
          past_length: `[B]` int32, number of valid tokens in each row of `past`.
          recent: a `LayerCache` per layer for the tokens decoded since `past`.
          at: `[]` int32, position in `recent` where the tokens of all rows are written.

        Returns:
          Hidden states `[B, D]`, and `recent` with the tokens' keys and values.
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
        """Also splits tokens over `tensor`, for the activations saved for the backward pass."""
        if self.mesh is None or x.shape[1] % self.mesh.shape["tensor"]:
            return self._by_row(x)
        return lax.with_sharding_constraint(x, mesh_lib.sharding_of_tokens(self.mesh))

    def _embed(self, tokens: jax.Array) -> jax.Array:
        weight = self.embedding[...]
        return weight.rows(tokens) if isinstance(weight, OutputMajor) else embed(weight, tokens)

    def _angles(self, positions: jax.Array) -> jax.Array:
        config = self.config
        frequencies = rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
        return positions[:, :, None].astype(jnp.float32) * frequencies


def abstract_model(
    config: ModelConfig, *, dtype: Any = jnp.float32, stacked: bool = True, **options: Any
) -> tuple[nnx.GraphDef, nnx.State]:
    """Returns a model's graph definition and the shapes of its parameters; makes no array.

    Args:
      options: `remat`, `attention` and `mesh` of `Transformer`.
    """
    model = nnx.eval_shape(
        lambda: Transformer(config, rngs=nnx.Rngs(0), dtype=dtype, stacked=stacked, **options)
    )
    return nnx.split(model)


def init_params(config: ModelConfig, seed: int, *, dtype: Any = jnp.float32) -> nnx.State:
    """Returns random parameters of a stacked model."""
    return nnx.state(Transformer(config, rngs=nnx.Rngs(seed), dtype=dtype))


def param_shardings(
    params: nnx.State, mesh: jax.sharding.Mesh, rules: mesh_lib.Rules = mesh_lib.TRAIN_RULES
) -> nnx.State:
    """Returns the sharding of each parameter by `PARAM_AXES` and `rules`, as a tree like `params`.

    Args:
      params: arrays or shapes, of training parameters or of decode weights.

    Raises:
      UserError: a dimension is not divisible by its mesh axis. The message names the nearest mesh
        that works.
    """

    def axes_of(path, leaf):
        name = [entry.key for entry in path if getattr(entry, "key", None) in PARAM_AXES][-1]
        axes = PARAM_AXES[name]
        field = getattr(path[-1], "name", None)  # of an `OutputMajor`
        if field in ("values", "scale"):
            outer = tuple(axis for i, axis in enumerate(axes) if i not in SUMMED_AXES[name])
            inner = tuple(axes[i] for i in SUMMED_AXES[name])
            axes = outer if field == "scale" else outer + inner
        return ("layers",) * (leaf.ndim - len(axes)) + axes

    dimensions = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        dimensions += zip(axes_of(path, leaf), leaf.shape, strict=True)
    mesh_lib.check_divides(mesh, dimensions, rules)
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: mesh_lib.sharding(mesh, axes_of(path, leaf), leaf.shape, rules), params
    )


def split_layers(params: nnx.State) -> tuple[nnx.State, nnx.State]:
    """Splits training parameters into non-layer and stacked layer parameters `[L, ...]`."""
    rest, layers = nnx.split_state(params, lambda path, _: path[0] != "layers", ...)
    return rest, layers["layers"]


def join_layers(rest: nnx.State, layers: Iterable[nnx.State]) -> nnx.State:
    """Joins non-layer parameters and single layers into the parameters of an unstacked model."""
    flat = dict(nnx.to_flat_state(rest))
    for i, layer in enumerate(layers):
        flat |= {("layers", i, *path): leaf for path, leaf in nnx.to_flat_state(layer)}
    return nnx.from_flat_state(flat)
