"""How a generator holds the matrices that it multiplies a few rows with at each step.

They lie with the output axes first, `[*out, *in]`, which is how CPUs multiply them fastest (see
`_product`). On demand they are int8, half of bfloat16's bytes, which is what
decoding's time goes into on accelerators: symmetric, one scale an output channel, weights only.
"""

import math
from dataclasses import dataclass
from types import EllipsisType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

# Axes that a matrix product sums over, by the parameter's name; other parameters stay as they are.
SUMMED_AXES = {
    "embedding": (1,),
    "unembed": (0,),
    "q": (0,),
    "k": (0,),
    "v": (0,),
    "o": (0, 1),
    "gate": (0,),
    "up": (0,),
    "down": (0,),
}
FEW_ROWS = 128  # up to here a CPU multiplies them from the right
ONE_ROWS_PARTS = 8  # that a CPU multiplies a single row in


@dataclass(frozen=True)
class OutputMajor:
    """A weight as `values` `[*out, *in]`, times `scale` `[*out]` where they are int8.

    Attributes:
      out_axes: how many axes `*out` are.
    """

    values: jax.Array
    scale: jax.Array | None
    out_axes: int

    def __getitem__(self, index: EllipsisType) -> "OutputMajor":
        """`weight[...]`: how `nnx.Variable` reads any value whole."""
        if index is not ...:
            raise IndexError("decode weights are read whole, as weight[...]")
        return self

    def product(self, rows: jax.Array, dtype=None) -> jax.Array:
        """`[R, in]` times the weight: `[R, *out]` in `dtype`, or in that of `rows`.

        The int8 values are what is multiplied; no dequantised copy is made here.
        """
        values = self.values.reshape(-1, rows.shape[1]).astype(rows.dtype)
        out = _product(rows, values, dtype or rows.dtype)
        if self.scale is not None:
            out = out * self.scale.reshape(-1).astype(out.dtype)
        return out.reshape(-1, *self.values.shape[: self.out_axes])

    def rows(self, index: jax.Array) -> jax.Array:
        """The weights of some outputs: an embedding's lookup, `[*index, *in]`."""
        if self.scale is None:
            return self.values[index]
        return self.values[index].astype(self.scale.dtype) * self.scale[index][..., None]


jax.tree_util.register_dataclass(
    OutputMajor, data_fields=("values", "scale"), meta_fields=("out_axes",)
)


def _product(rows: jax.Array, values: jax.Array, dtype: Any) -> jax.Array:
    """`[R, in]` times `[out, in]`: `[R, out]`.

    A CPU multiplies few rows from the right, and the result is turned over: 32 rows then take 0.7
    of the time, 8 rows half. XLA would turn the product over instead, hence the barrier. A single
    row it multiplies with parts of the weight, because XLA reads one matrix with one thread.
    """

    def rows_first(rows, values):
        return lax.dot_general(rows, values, (((1,), (1,)), ((), ())), preferred_element_type=dtype)

    def weight_first(rows, values):
        return lax.optimization_barrier(rows_first(values, rows)).T

    def in_parts(row, values):
        parts = values.reshape(math.gcd(len(values), ONE_ROWS_PARTS), -1, values.shape[1])
        each = jnp.broadcast_to(row, (len(parts), *row.shape))
        summed = (((2,), (2,)), ((0,), (0,)))
        return lax.dot_general(parts, each, summed, preferred_element_type=dtype).reshape(1, -1)

    if rows.shape[0] > FEW_ROWS:
        return rows_first(rows, values)
    on_cpu = in_parts if rows.shape[0] == 1 else weight_first
    return lax.platform_dependent(rows, values, cpu=on_cpu, default=rows_first)


def output_major(weight: jax.Array, summed: tuple[int, ...], int8: bool) -> OutputMajor:
    """A weight with its axes `summed` moved behind the others; int8: the nearest in -127…127."""
    inner = tuple(range(weight.ndim - len(summed), weight.ndim))
    values = jnp.moveaxis(weight, summed, inner)
    if not int8:
        return OutputMajor(values, None, weight.ndim - len(summed))
    exact = values.astype(jnp.float32)
    largest = jnp.max(jnp.abs(exact), axis=inner, keepdims=True)
    scale = jnp.where(largest > 0, largest / 127, 1.0)
    rounded = jnp.round(exact / scale).astype(jnp.int8)
    scale = jnp.squeeze(scale, inner).astype(weight.dtype)
    return OutputMajor(rounded, scale, weight.ndim - len(summed))


def decode_weights(params: nnx.State, int8: bool) -> nnx.State:
    """The matrices of parameters that are not stacked as `OutputMajor`; jit-able."""
    flat = {
        path: leaf.replace(output_major(leaf[...], SUMMED_AXES[path[-1]], int8))
        if path[-1] in SUMMED_AXES
        else leaf
        for path, leaf in nnx.to_flat_state(params)
    }
    return nnx.from_flat_state(flat)
