"""The critic's head: a state's value from a hidden state. It knows nothing of returns."""

import jax
import jax.numpy as jnp

from zerosearch_jax.models.config import ModelConfig

ValueHead = dict[str, jax.Array]


def init_value_head(config: ModelConfig) -> ValueHead:
    """Weight `[D]` and bias `[]`, float32 zeros: before training every state is worth 0."""
    return {"weight": jnp.zeros((config.embed_dim,)), "bias": jnp.zeros(())}


def values_of(hidden: jax.Array, head: ValueHead) -> jax.Array:
    """Values `[B, T]` float32 of hidden states `[B, T, D]`."""
    return jnp.einsum("btd,d->bt", hidden.astype(jnp.float32), head["weight"]) + head["bias"]
