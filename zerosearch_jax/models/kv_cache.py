"""KV cache of a decoder: its layout, its sharding, and reads and writes of blocks of tokens.

`models.transformer` lists the axis letters.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from zerosearch_jax.models.config import ModelConfig
from zerosearch_jax.parallel import mesh as mesh_lib

# One layer's keys [B, K, H, S] and values [B, K, S, H]. In this layout both matrix products of a
# decode step read contiguous memory, and memory traffic dominates the time of a decode step.
LayerCache = tuple[jax.Array, jax.Array]
CACHE_AXES = (
    ("batch", "kv_heads", "head_dim", "length"),
    ("batch", "kv_heads", "length", "head_dim"),
)
LENGTH_AXES = tuple(axes.index("length") for axes in CACHE_AXES)


def empty_cache(config: ModelConfig, rows: int, length: int, dtype: Any) -> list[LayerCache]:
    """Returns a zero-filled KV cache of `rows` × `length` tokens, one `LayerCache` per layer."""
    k, h = config.num_kv_heads, config.head_dim
    return [
        (jnp.zeros((rows, k, h, length), dtype), jnp.zeros((rows, k, length, h), dtype))
        for _ in range(config.num_layers)
    ]


def cache_shardings(
    cache: Callable[[], list[LayerCache]], mesh: jax.sharding.Mesh
) -> list[LayerCache]:
    """Returns shardings for the tree that `cache()` makes.

    Rows are split over the data axes and heads over `tensor`. `cache` is traced, not run.
    """
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
    """Writes a block of C tokens into some rows of a cache, in place if the cache is donated.

    Args:
      rows: `[P]` distinct cache rows. Blocks of rows past the last one are dropped.
      starts: `[P]` first position of each block. Tokens past the end of a row are dropped.
      new: a block of keys `[P, K, H, C]` and values `[P, K, C, H]` per layer.
    """
    length, size = cache[0][1].shape[2], new[0][1].shape[2]
    firsts = jnp.clip(starts, 0, length - size)
    # A block that would reach past the end is written earlier, behind a copy of the old tokens.
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
    """Reads `size` tokens of some rows of one layer's cache.

    Args:
      rows: `[P]` cache rows. A row past the last one reads another row instead.
      firsts: `[P]` first position to read in each row.

    Returns:
      Keys `[P, K, H, size]` and values `[P, K, size, H]`.
    """

    def take(array, axis):
        sizes = (1, *array.shape[1:axis], size, *array.shape[axis + 1 :])

        def one(row, first):
            starts = [first if i == axis else row if i == 0 else 0 for i in range(4)]
            return lax.dynamic_slice(array, starts, sizes)[0]

        return jax.vmap(one)(rows, firsts)

    return tuple(map(take, layer, LENGTH_AXES))
