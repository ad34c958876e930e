"""Parameter-free parts of a decoder: matrix product, embedding, RMS norm, rotary positions.

`models.transformer` lists the axis letters.
"""

import math
from types import EllipsisType
from typing import Protocol, Self

import jax
import jax.numpy as jnp
from jax import lax

from zerosearch_jax.models.config import RopeScaling


class LinearOperator(Protocol):
    """A weight that is not one plain array: `decode_weights.OutputMajor`, `lora.LowRank`."""

    def __getitem__(self, index: EllipsisType) -> Self:
        """Returns the weight itself for `weight[...]`, the way `nnx.Variable` reads a value."""
        if index is not ...:
            raise IndexError("these weights can only be read whole: use weight[...]")
        return self

    def product(self, rows: jax.Array) -> jax.Array:
        """Multiplies `rows` `[R, in]` by the weight; returns `[R, *out]`."""


def dense(x: jax.Array, weight: jax.Array | LinearOperator, summed: int = 1) -> jax.Array:
    """Multiplies `x` `[B, T, *in]` by `weight` `[*in, *out]`, as one product of two matrices.

    XLA's CPU backend runs the backward pass of a product over `[B, T, D]` at a third of the
    speed of the same product over `[B·T, D]`.

    Args:
      summed: number of axes in `*in`.
    """
    rows = x.reshape(x.shape[0] * x.shape[1], -1)
    if isinstance(weight, jax.Array):
        out = (rows @ weight.reshape(rows.shape[1], -1)).reshape(-1, *weight.shape[summed:])
    else:
        out = weight.product(rows)
    return out.reshape(*x.shape[:2], *out.shape[1:])


@jax.custom_vjp
def embed(weight: jax.Array, tokens: jax.Array) -> jax.Array:
    """Returns the rows `[B, T, D]` of `weight` `[V, D]` at `tokens` `[B, T]`, in weight's dtype.

    The gradient of `weight` is summed over the tokens in float32 and rounded once. A bfloat16 sum
    of equal terms would stop growing at 256 terms.
    """
    return weight[tokens]


def _embed_backward(residuals, rows_grad):
    weight, tokens = residuals  # only the weight's shape and dtype are read
    wide = jnp.promote_types(weight.dtype, jnp.float32)
    summed = jnp.zeros(weight.shape, wide).at[tokens].add(rows_grad.astype(wide))
    return summed.astype(weight.dtype), None


embed.defvjp(lambda weight, tokens: (weight[tokens], (weight, tokens)), _embed_backward)


def add_bias(x: jax.Array, bias: jax.Array) -> jax.Array:
    """Returns `x + bias` in x's dtype; the gradient of the bias is summed in float32."""
    return (x.astype(jnp.float32) + bias.astype(jnp.float32)).astype(x.dtype)


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """Normalises the last axis by its root mean square, in float32; returns x's dtype.

    The gradient of the scale is summed over the positions in float32.
    """
    x32 = x.astype(jnp.float32)
    x32 = x32 * lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    normalised = x32.astype(x.dtype).astype(jnp.float32)  # rounded as in Hugging Face's models
    return (scale.astype(jnp.float32) * normalised).astype(x.dtype)


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> jax.Array:
    """Returns rotation frequencies `[H/2]` in radians per position.

    Args:
      scaling: Llama 3's frequency scaling, or None.
    """
    inverse = 1.0 / theta ** (jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    if scaling is None:
        return inverse
    rotations = scaling.original_max_positions * inverse / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    smooth = jnp.clip((rotations - low) / (high - low), 0.0, 1.0)
    return inverse * (smooth + (1 - smooth) / scaling.factor)


def rope(x: jax.Array, angles: jax.Array) -> jax.Array:
    """Rotates `x` `[B, T, heads, H]` by `angles` `[B, T, H/2]`.

    The first half of H is paired with the second half, as in Hugging Face's models; the pairs
    are not interleaved.
    """
    cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)
