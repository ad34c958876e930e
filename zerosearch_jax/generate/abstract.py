"""A generator's programs lowered from shapes alone, for devices that need not exist."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from zerosearch_jax.generate import kernels
from zerosearch_jax.generate.generator import check_max_tokens
from zerosearch_jax.generate.kernels import DecodeInputs, DecodeState, PrefillChunk
from zerosearch_jax.generate.sampling import Sampling
from zerosearch_jax.generate.weight_loader import sharded, weight_parts
from zerosearch_jax.models.config import ModelConfig
from zerosearch_jax.models.kv_cache import cache_shardings, empty_cache
from zerosearch_jax.models.transformer import abstract_model, join_layers, split_layers
from zerosearch_jax.parallel import mesh as mesh_lib


@dataclass(frozen=True)
class AbstractGenerator:
    """A generator's largest programs and the shapes of its arrays.

    Attributes:
      params: shapes and shardings of the weights.
      cache: shapes and shardings of the KV cache.
      load: lowers the conversion of one layer, given training parameters on the same mesh
        (`Generator.load`).
      prefill: lowers the prefill of the longest chunk.
      decode: lowers the decode program of all slots behind a full cache.
    """

    params: nnx.State
    cache: Any
    load: Callable[[nnx.State], jax.stages.Lowered]
    prefill: Callable[[], jax.stages.Lowered]
    decode: Callable[[], jax.stages.Lowered]


def abstract_generator(
    config: ModelConfig,
    *,
    stop_table: np.ndarray,
    sampling: Sampling,
    slots: int,
    max_tokens: int,
    mesh: jax.sharding.Mesh,
    prefill_rows: int,
    prefill_tokens: int,
    chunk_tokens: int,
    dtype: Any,
    int8_weights: bool,
) -> AbstractGenerator:
    """Returns the programs that a `Generator` of these sizes would compile; makes no array.

    Args:
      sampling: of the decode program.
      prefill_tokens: the longest of the generator's `prefill_buckets`.

    `Generator` documents the other arguments.

    Raises:
      UserError: `max_tokens` exceeds the model's positions.
    """
    check_max_tokens(max_tokens, config)
    graphdef, _ = abstract_model(config, dtype=dtype, stacked=False)
    rest, layer = weight_parts(config, mesh, dtype=dtype, int8_weights=int8_weights)
    params = join_layers(rest.weights, [layer.weights] * config.num_layers)
    new_cache = partial(empty_cache, config, slots, max_tokens, dtype)
    cache = jax.tree.map(sharded, jax.eval_shape(new_cache), cache_shardings(new_cache, mesh))
    whole, by_row = mesh_lib.replicated(mesh), mesh_lib.sharding_of_rows(mesh)
    replicas = mesh.shape["data"] * mesh.shape["fsdp"]
    options = dict(graphdef=graphdef, mesh=mesh)

    def rows(*shape, dtype=jnp.int32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=by_row)

    def shared(leaf):
        return sharded(leaf, whole)

    def prefill():
        count = replicas * min(prefill_rows, slots // replicas)
        tokens = rows(count, min(prefill_tokens, max_tokens))
        return kernels.prefill.lower(
            params, cache, PrefillChunk(rows(count), rows(count), tokens), **options
        )

    def decode():
        state = DecodeState(*[rows(slots)] * 5, stream=rows(slots, 2, dtype=jnp.uint32))
        inputs = DecodeInputs(
            key=shared(jax.eval_shape(lambda: jax.random.key(0))),
            min_finished=shared(jax.ShapeDtypeStruct((), jnp.int32)),
            stop_table=shared(stop_table),
            end_ids=shared(jax.ShapeDtypeStruct((1,), jnp.int32)),
        )
        return kernels.decode.lower(
            params,
            cache,
            state,
            inputs,
            sampling=sampling,
            window=max_tokens,
            chunk_tokens=min(chunk_tokens, max_tokens),
            all_rows=True,
            **options,
        )

    def load(train_params):
        index = shared(jax.ShapeDtypeStruct((), jnp.int32))
        return layer.convert.lower(split_layers(train_params)[1], index)

    return AbstractGenerator(params, cache, load, prefill, decode)
