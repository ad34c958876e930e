"""Loading of stacked training parameters as a generator's decode weights, layer by layer."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax import lax

from zerosearch_jax.models.config import ModelConfig
from zerosearch_jax.models.decode_weights import decode_weights
from zerosearch_jax.models.transformer import (
    abstract_model,
    join_layers,
    param_shardings,
    split_layers,
)
from zerosearch_jax.parallel import mesh as mesh_lib


@dataclass(frozen=True)
class WeightPart:
    """A part of a generator's weights on one mesh.

    Attributes:
      weights: shapes with shardings.
      convert: jitted function from training parameters on that mesh to the weights.
    """

    weights: nnx.State
    convert: Callable[..., nnx.State]


def weight_parts(
    config: ModelConfig, mesh: jax.sharding.Mesh, *, dtype: Any, int8_weights: bool
) -> tuple[WeightPart, WeightPart]:
    """Returns the non-layer weights and the weights of one layer.

    `convert` of a layer takes the stacked layers and the layer's index.
    """

    def convert(params, layer=None):
        if layer is not None:
            take = partial(lax.dynamic_index_in_dim, index=layer, keepdims=False)
            params = jax.tree.map(take, params)
        params = jax.tree.map(lambda x: x.astype(dtype), params)
        # Keep the training sharding here, so that the all-gather that follows moves `dtype` and
        # not float32.
        params = lax.with_sharding_constraint(params, param_shardings(params, mesh))
        return decode_weights(params, int8_weights)

    def part(*stacked):
        shapes = jax.eval_shape(convert, *stacked)
        shardings = param_shardings(shapes, mesh, mesh_lib.GENERATE_RULES)
        weights = jax.tree.map(sharded, shapes, shardings)
        return WeightPart(weights, jax.jit(convert, out_shardings=shardings))

    rest, layers = split_layers(abstract_model(config)[1])
    return part(rest), part(layers, 0)


class WeightLoader:
    """Converts training parameters to decode weights on the generator's mesh.

    A program on the devices that hold the parameters gathers one layer, in the generator's
    layout; all of their processes must run it. The generator keeps the results on its own
    devices, so nothing is moved again (see `parallel.mesh.local_meshes`). Besides the training
    parameters and the new weights, a device holds one layer at a time.

    Args:
      mesh: of the generator.
      dtype, int8_weights: of the decode weights.
    """

    def __init__(
        self, config: ModelConfig, mesh: jax.sharding.Mesh, *, dtype: Any, int8_weights: bool
    ):
        self._num_layers = config.num_layers
        # Cached per mesh, because new parts would compile their programs again.
        self._parts_on = lru_cache(
            partial(weight_parts, config, dtype=dtype, int8_weights=int8_weights)
        )
        self._rest, self._layer = self._parts_on(mesh)

    def __call__(self, params: nnx.State) -> nnx.State:
        """Returns the weights of stacked parameters.

        Args:
          params: on a mesh whose devices include the generator's, in the same tensor groups.
        """
        rest, layers = split_layers(params)
        rest_part, layer_part = self._parts_on(jax.tree.leaves(params)[0].sharding.mesh)
        own_layers = [
            jax.tree.map(_own_shards, layer_part.convert(layers, i), self._layer.weights)
            for i in np.arange(self._num_layers, dtype=np.int32)
        ]
        rest = jax.tree.map(_own_shards, rest_part.convert(rest), self._rest.weights)
        return join_layers(rest, own_layers)


def _own_shards(array: jax.Array, own: jax.ShapeDtypeStruct) -> jax.Array:
    """Returns the array restricted to the devices of `own.sharding`, without a copy.

    Each of these devices must already hold the shard that `own.sharding` assigns to it.
    """
    shards = [s.data for s in array.addressable_shards if s.device in own.sharding.device_set]
    return jax.make_array_from_single_device_arrays(array.shape, own.sharding, shards)


def sharded(leaf: Any, sharding: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
    """Returns the shape and dtype of `leaf` with a sharding."""
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
