"""The critic's value head: a linear map from hidden states to values."""

import jax
import jax.numpy as jnp

from zerosearch_jax.models.config import ModelConfig

ValueHead = dict[str, jax.Array]


def init_value_head(config: ModelConfig) -> ValueHead:
    """Returns a zero weight `[D]` and bias `[]` in float32, so that initial values are 0."""
    return {"weight": jnp.zeros((config.embed_dim,)), "bias": jnp.zeros(())}


def values_of(hidden: jax.Array, head: ValueHead) -> jax.Array:
    """Returns float32 values `[B, T]` of hidden states `[B, T, D]`."""
    return jnp.einsum("btd,d->bt", hidden.astype(jnp.float32), head["weight"]) + head["bias"]
