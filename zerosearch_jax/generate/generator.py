"""A generator: parameters and a KV cache of S slots × L tokens on a mesh of its own.

The policy and the simulation LLM are two instances. A slot holds one sequence. `start` gives it a
prompt (slots with the same prompt share one prefill), `begin` and `advance` sample until a stop,
`extend` appends inserted tokens behind what is cached: nothing is computed twice. Slots are
independent: one may be decoded while others wait. It knows tokens, not text: no prompts, tags or
episodes.

The last token of every slot is *pending*: chosen but not yet in the cache. Decoding feeds it
first, so prefill computes no logits.

The slots are split evenly over the mesh's data and fsdp axes (*replicas*); a replica's rows never
leave it, so its programs hold no collectives but those of the tensor axis.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec

from zerosearch_jax.errors import UserError
from zerosearch_jax.generate.sampling import Sampling, sample
from zerosearch_jax.models.config import ModelConfig
from zerosearch_jax.models.decode_weights import decode_weights
from zerosearch_jax.models.kv_cache import (
    append_to_cache,
    cache_shardings,
    empty_cache,
    take_tokens,
)
from zerosearch_jax.models.transformer import (
    abstract_model,
    join_layers,
    param_shardings,
    split_layers,
)
from zerosearch_jax.parallel import mesh as mesh_lib
from zerosearch_jax.parallel.device_clock import DeviceClock

STOPPED, ENDED, LIMIT = 1, 2, 3  # why a row left the decode loop; 0: still running
FINISH_NAMES = {STOPPED: "stop", ENDED: "end", LIMIT: "length"}
MIN_FINISHED_FRACTION = (
    0.25  # share of the sampling slots whose stop ends a burst, so that others can take them
)


@dataclass(frozen=True)
class Generation:
    """What one slot sampled between `begin` and its stop.

    Attributes:
      tokens: sampled ids; the one that completed a stop string (or the end token) is the last.
      logprobs: log-prob of each at the moment it was sampled.
      finish: "stop" (a stop string), "end" (end of text) or "length" (limit or cache full).
    """

    tokens: list[int]
    logprobs: list[float]
    finish: str


@dataclass
class _Turn:
    """A slot that is sampling: the stream it draws from, tokens it may still take, its state."""

    stream: tuple[int, int]
    limit: int
    state: int = 0  # of the stop automaton
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


class Generator:
    """Prefill and decode over S slots.

    Args:
      config: the model's sizes.
      stop_table: `[A, V]` from `build_stop_table`.
      end_ids: token ids that end a text.
      slots: S, sequences held at once; a multiple of the mesh's data and fsdp axes.
      max_tokens: L, the longest sequence of a slot.
      prefill_rows: rows of one prefill or copy, a replica; `prefill_buckets`: its chunk lengths
        in tokens.
      decode_rows: numbers of rows, a replica, that decode programs are made for. The smallest
        that holds the running ones is used; where more run than the largest holds, they take
        turns. (): all of a replica's slots.
      chunk_tokens: tokens a row may gain in one `advance`.
      window_tokens: decode programs attend to the cache rounded up to a multiple of this.
      dtype: of weights and cache; int8_weights: hold the matrices in int8 instead, see
        `models.decode_weights`.
      clock: told when the device has work; None: one of its own.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        stop_table: np.ndarray,
        end_ids: Sequence[int],
        slots: int,
        max_tokens: int,
        mesh: jax.sharding.Mesh,
        prefill_rows: int = 32,
        prefill_buckets: Sequence[int] = (32, 64, 128, 256),
        decode_rows: Sequence[int] = (),
        chunk_tokens: int = 32,
        window_tokens: int = 128,
        dtype=jnp.float32,
        int8_weights: bool = False,
        clock: DeviceClock | None = None,
    ):
        if max_tokens > config.max_positions:
            raise UserError(
                f"max_tokens={max_tokens} is beyond the model's {config.max_positions} positions; "
                "lower the generator's max_tokens"
            )
        self.config = config
        self.slots = slots
        self.replicas = mesh.shape["data"] * mesh.shape["fsdp"]
        self.max_tokens = max_tokens
        self.mesh = mesh
        self.prefilled_tokens = 0
        self.decoded_tokens = 0
        self.clock = clock or DeviceClock()
        self._params = None
        self._graphdef, _ = abstract_model(config, dtype=dtype, stacked=False)
        fresh = partial(empty_cache, config, slots, max_tokens, dtype)
        self._cache = jax.jit(fresh, out_shardings=cache_shardings(fresh, mesh))()
        self._slots_each = slots // self.replicas
        self._prefill_rows = min(prefill_rows, self._slots_each)
        self._buckets = sorted({min(size, max_tokens) for size in prefill_buckets})
        sizes = decode_rows or (self._slots_each,)
        if min(sizes) < 1:
            raise UserError(f"the generator's decode_rows={tuple(sizes)} must all be at least 1")
        self._decode_rows = sorted({min(n, self._slots_each) for n in sizes})
        self._burst = min(chunk_tokens, max_tokens)
        self._window_tokens = window_tokens
        # Jitted once a mesh and not in `load`, which would compile them anew at every call.
        self._parts_on = lru_cache(partial(_parts, config, dtype=dtype, int8_weights=int8_weights))
        self._rest, self._layer = self._parts_on(mesh)
        self._whole = mesh_lib.replicated(mesh)
        self._by_row = mesh_lib.sharding_of_rows(mesh)
        self._table = jax.device_put(stop_table, self._whole)
        self._end_ids = jax.device_put(np.asarray(list(end_ids), np.int32), self._whole)
        self._length = np.zeros(slots, np.int32)
        self._pending = np.zeros(slots, np.int32)
        self._prompts: dict[int, tuple[int, ...]] = {}  # what each slot's cache begins with
        self._turns: dict[int, _Turn] = {}
        self._stopped: dict[int, Generation] = {}  # full before they began

    def load(self, params: nnx.State) -> None:
        """Takes over a copy of stacked training parameters, cast and resharded layer by layer.

        A layer is gathered by a program on the devices that hold the parameters (every one of
        their processes must run it), in the layout of the generator; of its results those on the
        generator's devices stay, and nothing is moved again (see `parallel.mesh.local_meshes`).
        So beside old parameters and new weights a device holds one layer at a time.

        Args:
          params: on a mesh whose devices include this one's, in the same groups along `tensor`.
        """
        self._params = None  # the old ones' room is the new ones'
        rest, layers = split_layers(params)
        mesh = jax.tree.leaves(params)[0].sharding.mesh
        with self.clock.working():
            of_rest, of_layer = self._parts_on(mesh)
            taken = [
                jax.tree.map(_own_shards, of_layer.convert(layers, i), self._layer.weights)
                for i in np.arange(self.config.num_layers, dtype=np.int32)
            ]
            rest = jax.tree.map(_own_shards, of_rest.convert(rest), self._rest.weights)
            self._params = join_layers(rest, taken)
            jax.block_until_ready(self._params)
        self._prompts.clear()

    @property
    def weight_bytes(self) -> int:
        """Bytes of the loaded weights, over all devices of the mesh."""
        return sum(
            s.data.nbytes for x in jax.tree.leaves(self._params) for s in x.addressable_shards
        )

    def replica_of(self, slot: int) -> int:
        """The replica that a slot belongs to; only its slots can share a prompt's prefill."""
        return slot // self._slots_each

    def warm_up(self, samplings: Sequence[Sampling]) -> None:
        """Compiles every program that later calls can need; the slots are left as they are."""
        no_turns: list[list[int]] = [[] for _ in range(self.replicas)]
        for size in self._buckets:
            self._prefill(no_turns, [], size)
        for window in self._windows():
            self._copy(no_turns, [], window)
            for rows in self._decode_rows:
                for sampling in samplings:
                    self._decode(no_turns, rows, window, jax.random.key(0), sampling, 1)
        self.drain()

    def start(self, slots: Sequence[int], prompts: Sequence[Sequence[int]]) -> None:
        """Empties the slots and gives each its prompt (at least one token).

        A prompt that another slot of the replica begins with is copied, not computed.
        """
        wanted = {s: tuple(p[:-1]) for s, p in zip(slots, prompts, strict=True)}
        for prompt in wanted.values():
            self._check_fits(0, len(prompt))
        # A slot that keeps its prompt or is not started now can be copied from.
        holders = {
            (self.replica_of(slot), prompt): slot
            for slot, prompt in self._prompts.items()
            if wanted.get(slot, prompt) == prompt
        }
        held, fresh, late = [], [], []
        for slot, prompt in wanted.items():
            key = self.replica_of(slot), prompt
            if self._prompts.get(slot) == prompt:
                continue
            if key in holders:
                (late if holders[key] in fresh else held).append((holders[key], slot))
            else:
                holders[key] = slot
                fresh.append(slot)
        self._length[list(wanted)] = 0
        self._prompts |= wanted
        self._copy_prompts(held)
        self._append(fresh, [list(wanted[slot]) for slot in fresh])
        self._copy_prompts(late)
        for slot, prompt in zip(slots, prompts, strict=True):
            self._length[slot] = len(prompt) - 1
            self._pending[slot] = prompt[-1]

    def extend(self, slots: Sequence[int], tokens: Sequence[Sequence[int]]) -> None:
        """Appends inserted tokens (at least one a row) behind what the slots hold."""
        rows = [
            [int(self._pending[slot]), *new[:-1]] for slot, new in zip(slots, tokens, strict=True)
        ]
        self._append(slots, rows)
        self._pending[list(slots)] = [new[-1] for new in tokens]

    def free_tokens(self, slot: int) -> int:
        """How many more tokens the slot can take, inserted or sampled."""
        return int(self.max_tokens - self._length[slot] - 1)

    def start_decoding(
        self, slots: Sequence[int], *, streams: Sequence[tuple[int, int]], max_new_tokens: int
    ) -> None:
        """Lets the slots sample from now on, each until it stops or has `max_new_tokens`.

        Args:
          streams: two numbers a slot, say (episode, turn). The draw at sequence position p uses
            the key folded with them and with p, so it depends on neither the other slots nor on
            how `advance` cut the work.
        """
        for slot, stream in zip(slots, streams, strict=True):
            limit = min(max_new_tokens, self.free_tokens(slot))
            if limit:
                self._turns[slot] = _Turn(stream, limit)
            else:
                self._stopped[slot] = Generation([], [], "length")

    def decode_chunk(
        self, *, key: jax.Array, sampling: Sampling, share: float = MIN_FINISHED_FRACTION
    ) -> dict[int, Generation]:
        """One burst on the device: sampling slots gain at most `chunk_tokens` tokens each.

        Where not all can go at once, those with the least in their cache are first, because a
        program attends to as much as its longest row has.

        Args:
          key: a typed PRNG key, `[]`.
          share: come back when this share of those that were decoded has stopped, 0-1; then the
            host can give them new work while the others wait least.

        Returns:
          What the slots that have stopped sampled, by slot. The others sample on at the next call.
        """
        if self._stopped:
            stopped, self._stopped = self._stopped, {}
            return stopped
        slots = sorted(self._turns, key=lambda slot: self._window(self._length[slot]))
        running = self._by_replica([(slot, slot) for slot in slots])
        turns = [queue[: self._decode_rows[-1]] for queue in running]
        most = max(map(len, turns))
        if not most:
            return {}
        rows = next(n for n in self._decode_rows if n >= most)
        reach = max(int(self._length[slot]) for queue in turns for slot in queue)
        enough = self._enough(
            most, share if turns == running else min(share, MIN_FINISHED_FRACTION)
        )
        places, *out = self._decode(turns, rows, self._window(reach), key, sampling, enough)
        pending, state, finish, count, tokens, logprobs = jax.device_get(out)
        self.drain()
        stopped = {}
        for slot, row in places.items():
            turn, n = self._turns[slot], int(count[row])
            turn.tokens += tokens[row, :n].tolist()
            turn.logprobs += logprobs[row, :n].tolist()
            turn.limit -= n
            turn.state = int(state[row])
            self._length[slot] += n
            self._pending[slot] = pending[row]
            self.decoded_tokens += n
            if finish[row]:
                name = FINISH_NAMES[int(finish[row])]
                stopped[slot] = Generation(turn.tokens, turn.logprobs, name)
                del self._turns[slot]
        return stopped

    def decode_until(
        self, *, key: jax.Array, sampling: Sampling, share: float
    ) -> dict[int, Generation]:
        """`advance` until so few slots sample that `share` of the decoded rows are free.

        Where more sample than are decoded at once, others take the rows of those that stop.

        Returns:
          What the slots that have stopped sampled, by slot.
        """
        sampling_slots = len(self._turns) + len(self._stopped)
        rows = min(sampling_slots, self._decode_rows[-1] * self.replicas)
        left = math.floor((1.0 - share) * rows)
        stopped: dict[int, Generation] = {}
        while len(stopped) < sampling_slots - left:
            stopped |= self.decode_chunk(key=key, sampling=sampling, share=share)
        return stopped

    def _enough(self, rows: int, share: float) -> int:
        """How many of `rows` must stop to end a burst: `share`, or that a smaller program does."""
        smaller = [n for n in self._decode_rows if n < rows]
        return min(math.ceil(share * rows), rows - max(smaller, default=0))

    def decode(
        self,
        slots: Sequence[int],
        *,
        key: jax.Array,
        streams: Sequence[tuple[int, int]],
        max_new_tokens: int,
        sampling: Sampling,
    ) -> list[Generation]:
        """`begin`, then `decode_until` all slots have stopped; in the order of `slots`."""
        self.start_decoding(slots, streams=streams, max_new_tokens=max_new_tokens)
        stopped = self.decode_until(key=key, sampling=sampling, share=1.0)
        return [stopped[slot] for slot in slots]

    def _check_fits(self, cached_tokens: int, new_tokens: int) -> None:
        if cached_tokens + new_tokens > self.max_tokens - 1:
            raise UserError(
                f"{cached_tokens + new_tokens + 1} tokens do not fit a slot of "
                f"{self.max_tokens}; raise the generator's max_tokens or shorten the input"
            )

    def _append(self, slots: Sequence[int], rows: list[list[int]]) -> None:
        """Writes rows of tokens behind the slots' cached ones, in bucketed chunks."""
        for slot, row in zip(slots, rows, strict=True):
            self._check_fits(int(self._length[slot]), len(row))
        # Rows of like length go together, so that little of a bucket is padding.
        order = sorted((i for i in range(len(rows)) if rows[i]), key=lambda i: len(rows[i]))
        for groups in self._batches([(slots[i], i) for i in order]):
            todo = {i: rows[i] for group in groups for i in group}
            while any(todo.values()):
                longest = max(len(row) for row in todo.values())
                fits = [size for size in self._buckets if size >= longest]
                size = fits[0] if fits else self._buckets[-1]
                chunks = [[todo[i][:size] for i in group] for group in groups]
                self._prefill([[slots[i] for i in group] for group in groups], chunks, size)
                for group, parts in zip(groups, chunks, strict=True):
                    for i, part in zip(group, parts, strict=True):
                        self._length[slots[i]] += len(part)
                        self.prefilled_tokens += len(part)
                        todo[i] = todo[i][size:]

    def _by_replica(self, items: Sequence[tuple[int, Any]]) -> list[list[Any]]:
        """What comes with each slot, a list for each replica."""
        queues: list[list[Any]] = [[] for _ in range(self.replicas)]
        for slot, item in items:
            queues[self.replica_of(slot)].append(item)
        return queues

    def _batches(self, items: Sequence[tuple[int, Any]]) -> Iterator[list[list[Any]]]:
        """`_by_replica`, at most `prefill_rows` of each replica at a time."""
        queues = self._by_replica(items)
        for start in range(0, max(map(len, queues)), self._prefill_rows):
            yield [queue[start : start + self._prefill_rows] for queue in queues]

    def _copy_prompts(self, pairs: list[tuple[int, int]]) -> None:
        """Copies the prompts of slots to other slots of the same replica, (from, to)."""
        for groups in self._batches([(source, (source, target)) for source, target in pairs]):
            reach = max(len(self._prompts[source]) for group in groups for source, _ in group)
            if reach:
                self._copy(
                    [[target for _, target in group] for group in groups],
                    [[source for source, _ in group] for group in groups],
                    self._window(reach),
                )

    def _windows(self) -> list[int]:
        step = self._window_tokens
        return [min(reach, self.max_tokens) for reach in range(step, self.max_tokens + step, step)]

    def _window(self, reach: int) -> int:
        """The part of the cache to attend to when its first `reach` tokens are in use."""
        return next(window for window in self._windows() if window >= reach)

    def _rows(self, slots: Sequence[Sequence[int]], rows: int) -> np.ndarray:
        """Indices `[replicas · rows]` of slots in their replicas; rows to spare fit no slot."""
        index = np.tile(np.arange(self._slots_each, self._slots_each + rows), (self.replicas, 1))
        for replica, group in enumerate(slots):
            index[replica, : len(group)] = [slot % self._slots_each for slot in group]
        return index.ravel().astype(np.int32)

    def _put(self, *arrays: np.ndarray) -> list[jax.Array]:
        self.clock.started()
        return jax.device_put(arrays, self._by_row)

    def drain(self) -> None:
        """Waits until the device has done all it was given."""
        jax.block_until_ready(self._cache)
        self.clock.drained()

    def _prefill(self, slots, chunks, size: int) -> None:
        """Prefills each replica's `chunks` of at most `size` tokens behind its `slots`' cache."""
        shape = (self.replicas, self._prefill_rows)
        tokens = np.zeros((*shape, size), np.int32)
        starts = np.zeros(shape, np.int32)
        for replica, rows in enumerate(chunks):
            for i, row in enumerate(rows):
                tokens[replica, i, : len(row)] = row
                starts[replica, i] = self._length[slots[replica][i]]
        index, starts, tokens = self._put(
            self._rows(slots, self._prefill_rows), starts.ravel(), tokens.reshape(-1, size)
        )
        self._cache = _prefill(
            self._params, self._cache, index, starts, tokens,
            graphdef=self._graphdef, mesh=self.mesh,
        )  # fmt: skip

    def _copy(self, targets, sources, window: int) -> None:
        rows = self._prefill_rows
        index = self._put(self._rows(targets, rows), self._rows(sources, rows))
        self._cache = _copy(self._cache, *index, window=window, mesh=self.mesh)

    def _decode(self, turns, rows: int, window: int, key, sampling: Sampling, enough: int):
        """Runs `turns`' slots; returns each one's row, and the rows' arrays (see `_decode`)."""
        everything = rows == self._slots_each
        places = {}
        shape = self.replicas * rows
        length, pending, limit, state = (np.zeros(shape, np.int32) for _ in range(4))
        streams = np.zeros((shape, 2), np.uint32)
        for replica, group in enumerate(turns):
            for i, slot in enumerate(group):
                # With a row for every slot nothing needs to be moved.
                row = replica * rows + (slot % rows if everything else i)
                places[slot], turn = row, self._turns[slot]
                length[row], pending[row] = self._length[slot], self._pending[slot]
                limit[row], state[row], streams[row] = turn.limit, turn.state, turn.stream
        index = self._rows(turns, rows)
        if everything:
            index = np.tile(np.arange(rows, dtype=np.int32), self.replicas)
        rest = jax.device_put((key, np.int32(enough)), self._whole)
        by_row = self._put(index, length, pending, limit, state, streams)
        self._cache, *out = _decode(
            self._params, self._cache, *by_row, *rest, self._table, self._end_ids,
            graphdef=self._graphdef, sampling=sampling, window=window, burst=self._burst,
            everything=everything, mesh=self.mesh,
        )  # fmt: skip
        return places, *out


def slots_by_replica(generator: Generator) -> list[list[int]]:
    """All slots of each replica."""
    slots: list[list[int]] = [[] for _ in range(generator.replicas)]
    for slot in range(generator.slots):
        slots[generator.replica_of(slot)].append(slot)
    return slots


def _own_shards(array: jax.Array, own: jax.ShapeDtypeStruct) -> jax.Array:
    """The same array on some of its devices, which hold just what `own.sharding` gives them."""
    shards = [s.data for s in array.addressable_shards if s.device in own.sharding.device_set]
    return jax.make_array_from_single_device_arrays(array.shape, own.sharding, shards)


def _sharded(leaf: Any, sharding: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


@dataclass(frozen=True)
class _Part:
    """A part of a generator's weights: its shapes with their shardings on one mesh.

    Attributes:
      convert: jitted, makes it of training parameters on that mesh.
    """

    weights: nnx.State
    convert: Any


def _parts(
    config: ModelConfig, mesh: jax.sharding.Mesh, *, dtype, int8_weights: bool
) -> tuple[_Part, _Part]:
    """What is no layer's, and one layer: the index of that of stacked parameters is given."""

    def convert(params, layer=None):
        if layer is not None:
            take = partial(lax.dynamic_index_in_dim, index=layer, keepdims=False)
            params = jax.tree.map(take, params)
        params = jax.tree.map(lambda x: x.astype(dtype), params)
        # As they lay: what is gathered behind this is in `dtype`.
        params = lax.with_sharding_constraint(params, param_shardings(params, mesh))
        return decode_weights(params, int8_weights)

    def part(*stacked):
        shapes = jax.eval_shape(convert, *stacked)
        shardings = param_shardings(shapes, mesh, mesh_lib.GENERATE_RULES)
        weights = jax.tree.map(_sharded, shapes, shardings)
        return _Part(weights, jax.jit(convert, out_shardings=shardings))

    rest, layers = split_layers(abstract_model(config)[1])
    return part(rest), part(layers, 0)


@dataclass(frozen=True)
class AbstractGenerator:
    """A generator's largest programs as shapes alone, on devices that need not be there.

    Attributes:
      params, cache: shapes and shardings of what it holds.
      load: makes a layer's of training parameters on the same mesh (`Generator.load`).
      prefill: of the most tokens at once; decode: of all slots, behind a full window.
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
    dtype,
    int8_weights: bool,
) -> AbstractGenerator:
    """What `Generator` would compile for these sizes, without an array; see its arguments.

    Args:
      prefill_tokens: the longest of its `prefill_buckets`.
    """
    graphdef, _ = abstract_model(config, dtype=dtype, stacked=False)
    rest, layer = _parts(config, mesh, dtype=dtype, int8_weights=int8_weights)
    params = join_layers(rest.weights, [layer.weights] * config.num_layers)
    fresh = partial(empty_cache, config, slots, max_tokens, dtype)
    whole, by_row = mesh_lib.replicated(mesh), mesh_lib.sharding_of_rows(mesh)
    replicas = mesh.shape["data"] * mesh.shape["fsdp"]

    def rows(*shape, dtype=jnp.int32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=by_row)

    def scalars(*leaves):
        return [_sharded(leaf, whole) for leaf in leaves]

    cache = jax.tree.map(_sharded, jax.eval_shape(fresh), cache_shardings(fresh, mesh))
    options = dict(graphdef=graphdef, mesh=mesh)
    count = replicas * min(prefill_rows, slots // replicas)

    def prefill():
        tokens = rows(count, min(prefill_tokens, max_tokens))
        return _prefill.lower(params, cache, rows(count), rows(count), tokens, **options)

    def decode():
        of_slots = [*[rows(slots)] * 5, rows(slots, 2, dtype=jnp.uint32)]
        key = jax.eval_shape(lambda: jax.random.key(0))
        ends = jax.ShapeDtypeStruct((1,), jnp.int32)
        rest = scalars(key, jax.ShapeDtypeStruct((), jnp.int32), stop_table, ends)
        return _decode.lower(
            params, cache, *of_slots, *rest,
            sampling=sampling, window=max_tokens, burst=min(chunk_tokens, max_tokens),
            everything=True, **options,
        )  # fmt: skip

    def load(trained):
        return layer.convert.lower(
            split_layers(trained)[1], *scalars(jax.ShapeDtypeStruct((), jnp.int32))
        )

    return AbstractGenerator(params, cache, load, prefill, decode)


ROWS = PartitionSpec(mesh_lib.ROWS)
WHOLE = PartitionSpec()


def _per_replica(function, mesh: jax.sharding.Mesh, in_specs, out_specs):
    """`function` on each replica's own rows; XLA sees to the tensor axis alone."""
    return jax.shard_map(
        function,
        mesh=mesh,
        in_specs=in_specs,
        out_specs=out_specs,
        axis_names=set(mesh_lib.ROWS),
        check_vma=False,
    )


def _take_rows(cache, index, window: int):
    """The first `window` tokens of the cache rows `index`."""
    return [take_tokens(layer, index, jnp.zeros_like(index), window) for layer in cache]


@partial(jax.jit, static_argnames=("graphdef", "mesh"), donate_argnames="cache")
def _prefill(params, cache, index, starts, tokens, *, graphdef, mesh):
    """Writes `tokens` `[P, C]` behind the first `starts` `[P]` of the cache rows `index` `[P]`."""

    def run(params, cache, index, starts, tokens):
        model = nnx.merge(graphdef, params)
        _, chunks = model.prefill(tokens, cache, index, starts)
        return append_to_cache(cache, index, starts, chunks)

    specs = (WHOLE, ROWS, ROWS, ROWS, ROWS)
    return _per_replica(run, mesh, specs, ROWS)(params, cache, index, starts, tokens)


@partial(jax.jit, static_argnames=("window", "mesh"), donate_argnames="cache")
def _copy(cache, targets, sources, *, window, mesh):
    """Copies the first `window` tokens of the rows `sources` `[P]` to the rows `targets` `[P]`."""

    def run(cache, targets, sources):
        block = _take_rows(cache, sources, window)
        return append_to_cache(cache, targets, jnp.zeros_like(targets), block)

    return _per_replica(run, mesh, (ROWS, ROWS, ROWS), ROWS)(cache, targets, sources)


@partial(
    jax.jit,
    static_argnames=("graphdef", "sampling", "window", "burst", "everything", "mesh"),
    donate_argnames="cache",
)
def _decode(
    params, cache, index, length, pending, limit, state, streams, key, enough, table, end_ids,
    *, graphdef, sampling, window, burst, everything, mesh,
):  # fmt: skip
    """Samples in the rows with `limit` > 0 until `enough` of them have stopped.

    Args:
      index: `[R]` cache row of each; `everything`: they are all rows, in order.
      length, pending, limit, state: `[R]` tokens cached, the token to feed, tokens that may be
        sampled, state of the stop automaton.

    Returns:
      The cache; then `[R]` pending, state, finish (0: not stopped) and number of tokens sampled;
      tokens and log-probs `[R, burst]`.
    """

    def run(
        params, cache, index, length, pending, limit, state, streams, key, enough, table, end_ids
    ):
        model = nnx.merge(graphdef, params)
        num_rows = length.shape[0]
        accept = table.shape[0] - 1
        fold = jax.random.fold_in
        keys = jax.vmap(lambda stream: fold(fold(key, stream[0]), stream[1]))(streams)
        if everything:
            past = [(k[..., :window], v[:, :, :window]) for k, v in cache]
        else:
            past = _take_rows(cache, index, window)
        idle = limit == 0

        def going(carry):
            step, finish = carry[0], carry[4]
            stopped = jnp.sum((finish != 0) & ~idle)
            return (step < burst) & jnp.any(finish == 0) & (stopped < enough)

        def body(carry):
            step, recent, pending, state, finish, count, tokens, logprobs = carry
            running = finish == 0
            hidden, recent = model.decode(pending, past, length, recent, step)
            token_keys = jax.vmap(fold)(keys, length + step)
            token, logprob = sample(model.logits(hidden), token_keys, sampling)
            state = jnp.where(running, table[state, token].astype(jnp.int32), state)
            count = count + running
            ends = jnp.where(count >= limit, LIMIT, 0)
            ends = jnp.where(jnp.isin(token, end_ids), ENDED, ends)
            ends = jnp.where(state == accept, STOPPED, ends)
            return (
                step + 1,
                recent,
                jnp.where(running, token, pending),
                state,
                jnp.where(running, ends, finish),
                count,
                tokens.at[:, step].set(token),
                logprobs.at[:, step].set(logprob),
            )

        zeros = jnp.zeros(num_rows, jnp.int32)
        dtype = cache[0][0].dtype
        out = lax.while_loop(
            going,
            body,
            (
                jnp.int32(0),
                empty_cache(model.config, num_rows, burst, dtype),
                pending,
                state,
                jnp.where(idle, LIMIT, 0),
                zeros,
                jnp.zeros((num_rows, burst), jnp.int32),
                jnp.zeros((num_rows, burst), jnp.float32),
            ),
        )
        _, recent, pending, state, finish, count, tokens, logprobs = out
        rows = jnp.where(idle, num_rows + cache[0][0].shape[0] + jnp.arange(num_rows), index)
        cache = append_to_cache(cache, rows, length, recent)
        return cache, pending, state, jnp.where(idle, 0, finish), count, tokens, logprobs

    specs = (WHOLE, *(ROWS,) * 7, *(WHOLE,) * 4)
    return _per_replica(run, mesh, specs, (ROWS,) * 7)(
        params, cache, index, length, pending, limit, state, streams, key, enough, table, end_ids
    )
