"""The generator's jitted programs (prefill, copy, decode) and the structs that they take.

Every program runs once per replica. Rows never leave their replica, so only the tensor axis needs
collectives. All programs donate the cache and return its new value.

Sizes: P rows of a prefill or copy, C tokens of a chunk, R rows of a decode program (P and R count
all replicas), A states of the stop automaton, V vocabulary. The cache is a list of `LayerCache`.
"""

from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec

from zerosearch_jax.generate.sampling import Sampling, sample
from zerosearch_jax.models.kv_cache import append_to_cache, empty_cache, take_tokens
from zerosearch_jax.parallel import mesh as mesh_lib

# Values of `DecodeResult.finish`: why a row stopped. 0 is a running or idle row.
STOPPED, ENDED, LIMIT = 1, 2, 3
FINISH_NAMES = {STOPPED: "stop", ENDED: "end", LIMIT: "length"}
ROWS = PartitionSpec(mesh_lib.ROWS)
WHOLE = PartitionSpec()


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PrefillChunk:
    """Tokens to append to some cache rows; split over the replicas."""

    cache_row: jax.Array  # [P] int32: row in the replica's cache; unused rows are past its end
    start: jax.Array  # [P] int32: number of tokens that the cache row holds
    tokens: jax.Array  # [P, C] int32: tokens to append, padded at the end


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecodeState:
    """State of the rows before a decode chunk; split over the replicas."""

    cache_row: jax.Array  # [R] int32: row in the replica's cache; unused rows are past its end
    length: jax.Array  # [R] int32: number of tokens that the cache row holds
    pending: jax.Array  # [R] int32: token to feed first; it is not in the cache yet
    limit: jax.Array  # [R] int32: tokens that may still be sampled; 0 marks an idle row
    stop_state: jax.Array  # [R] int32: state of the stop automaton
    stream: jax.Array  # [R, 2] uint32: numbers folded into the key


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecodeInputs:
    """Inputs that all rows share; replicated."""

    key: jax.Array  # []: typed PRNG key
    min_finished: jax.Array  # [] int32: the chunk ends when this many rows of a replica stopped
    stop_table: jax.Array  # [A, V] int16: transitions of the stop automaton, see `stops`
    end_ids: jax.Array  # [E] int32: tokens that end a text


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecodeResult:
    """State of the rows after a decode chunk, and the sampled tokens; split over the replicas."""

    pending: jax.Array  # [R] int32: last sampled token; it is not in the cache yet
    stop_state: jax.Array  # [R] int32: state of the stop automaton
    finish: jax.Array  # [R] int32: STOPPED, ENDED or LIMIT; 0: still running, or idle
    count: jax.Array  # [R] int32: number of sampled tokens
    tokens: jax.Array  # [R, C] int32: sampled tokens; valid up to `count`
    logprobs: jax.Array  # [R, C] float32: their log-probs


def _per_replica(function, mesh: jax.sharding.Mesh, in_specs, out_specs):
    """Runs `function` on the rows of each replica; only the tensor axis is left to XLA."""
    return jax.shard_map(
        function,
        mesh=mesh,
        in_specs=in_specs,
        out_specs=out_specs,
        axis_names=set(mesh_lib.ROWS),
        check_vma=False,
    )


def _read_rows(cache, rows: jax.Array, window: int):
    """Returns the first `window` tokens of some rows of every layer's cache."""
    return [take_tokens(layer, rows, jnp.zeros_like(rows), window) for layer in cache]


@partial(jax.jit, static_argnames=("graphdef", "mesh"), donate_argnames="cache")
def prefill(params, cache, chunk: PrefillChunk, *, graphdef, mesh):
    """Appends a chunk of tokens to the cache."""

    def run(params, cache, chunk):
        model = nnx.merge(graphdef, params)
        _, blocks = model.prefill(chunk.tokens, cache, chunk.cache_row, chunk.start)
        return append_to_cache(cache, chunk.cache_row, chunk.start, blocks)

    return _per_replica(run, mesh, (WHOLE, ROWS, ROWS), ROWS)(params, cache, chunk)


@partial(jax.jit, static_argnames=("window", "mesh"), donate_argnames="cache")
def copy_rows(cache, targets, sources, *, window, mesh):
    """Copies the first `window` tokens of the cache rows `sources` `[P]` to `targets` `[P]`."""

    def run(cache, targets, sources):
        block = _read_rows(cache, sources, window)
        return append_to_cache(cache, targets, jnp.zeros_like(targets), block)

    return _per_replica(run, mesh, (ROWS, ROWS, ROWS), ROWS)(cache, targets, sources)


@partial(
    jax.jit,
    static_argnames=("graphdef", "sampling", "window", "chunk_tokens", "all_rows", "mesh"),
    donate_argnames="cache",
)
def decode(
    params,
    cache,
    state: DecodeState,
    inputs: DecodeInputs,
    *,
    graphdef: nnx.GraphDef,
    sampling: Sampling,
    window: int,
    chunk_tokens: int,
    all_rows: bool,
    mesh: jax.sharding.Mesh,
):
    """Samples up to `chunk_tokens` tokens per row, until `min_finished` rows have stopped.

    Args:
      window: number of cached tokens that rows attend to; at least the longest row's length.
      chunk_tokens: C of `DecodeResult`.
      all_rows: the rows are all cache rows in order, so none is gathered.

    Returns:
      The cache with the fed tokens appended, and a `DecodeResult`.
    """
    run = partial(
        _decode_replica,
        graphdef=graphdef,
        sampling=sampling,
        window=window,
        chunk_tokens=chunk_tokens,
        all_rows=all_rows,
    )
    specs = (WHOLE, ROWS, ROWS, WHOLE)
    return _per_replica(run, mesh, specs, (ROWS, ROWS))(params, cache, state, inputs)


def _decode_replica(
    params, cache, state, inputs, *, graphdef, sampling, window, chunk_tokens, all_rows
):
    """Runs `decode` on the rows of one replica."""
    model = nnx.merge(graphdef, params)
    num_rows = state.length.shape[0]
    fold = jax.random.fold_in
    keys = jax.vmap(lambda stream: fold(fold(inputs.key, stream[0]), stream[1]))(state.stream)
    if all_rows:
        past = [(k[..., :window], v[:, :, :window]) for k, v in cache]
    else:
        past = _read_rows(cache, state.cache_row, window)
    idle = state.limit == 0

    def goes_on(carry):
        step, _, result = carry
        finished = jnp.sum((result.finish != 0) & ~idle)
        running = jnp.any(result.finish == 0)
        return (step < chunk_tokens) & running & (finished < inputs.min_finished)

    def body(carry):
        step, recent, result = carry
        running = result.finish == 0
        hidden, recent = model.decode(result.pending, past, state.length, recent, step)
        token_keys = jax.vmap(fold)(keys, state.length + step)
        token, logprob = sample(model.logits(hidden), token_keys, sampling)
        next_state = inputs.stop_table[result.stop_state, token].astype(jnp.int32)
        stop_state = jnp.where(running, next_state, result.stop_state)
        count = result.count + running
        # A later line wins: a stop string counts even if its token is also the last one allowed.
        finish = jnp.where(count >= state.limit, LIMIT, 0)
        finish = jnp.where(jnp.isin(token, inputs.end_ids), ENDED, finish)
        finish = jnp.where(stop_state == inputs.stop_table.shape[0] - 1, STOPPED, finish)
        result = DecodeResult(
            pending=jnp.where(running, token, result.pending),
            stop_state=stop_state,
            finish=jnp.where(running, finish, result.finish),
            count=count,
            tokens=result.tokens.at[:, step].set(token),
            logprobs=result.logprobs.at[:, step].set(logprob),
        )
        return step + 1, recent, result

    result = DecodeResult(
        pending=state.pending,
        stop_state=state.stop_state,
        finish=jnp.where(idle, LIMIT, 0),
        count=jnp.zeros(num_rows, jnp.int32),
        tokens=jnp.zeros((num_rows, chunk_tokens), jnp.int32),
        logprobs=jnp.zeros((num_rows, chunk_tokens), jnp.float32),
    )
    recent = empty_cache(model.config, num_rows, chunk_tokens, cache[0][0].dtype)
    _, recent, result = lax.while_loop(goes_on, body, (jnp.int32(0), recent, result))
    # Idle rows are written past the end of the cache, that is nowhere.
    past_end = num_rows + cache[0][0].shape[0] + jnp.arange(num_rows)
    rows = jnp.where(idle, past_end, state.cache_row)
    cache = append_to_cache(cache, rows, state.length, recent)
    return cache, replace(result, finish=jnp.where(idle, 0, result.finish))
