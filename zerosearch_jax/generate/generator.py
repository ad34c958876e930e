"""Slot-based generator: parameters and a KV cache of S slots × L tokens on one mesh.

The policy and the simulation LLM are two instances. A slot holds one sequence. `start` gives it a
prompt, `start_decoding` and `decode_chunk` sample until a stop, and `extend` appends inserted
tokens behind the cached ones. Slots with the same prompt share one prefill, and no token is
computed twice. Slots are independent: some may decode while others wait. The generator works on
tokens; text, prompts and episodes belong to its callers.

The last token of every slot is *pending*: chosen, but not in the cache yet. Decoding feeds it
first, so a prefill computes no logits.

The slots are split evenly over the mesh's data and fsdp axes (*replicas*). Rows never leave their
replica, so only the tensor axis needs collectives (see `generate.kernels`).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from zerosearch_jax.errors import UserError
from zerosearch_jax.generate import kernels
from zerosearch_jax.generate.kernels import DecodeInputs, DecodeResult, DecodeState, PrefillChunk
from zerosearch_jax.generate.sampling import Sampling
from zerosearch_jax.generate.slots import DecodingSlot, SlotLayout, cut_to_buckets, plan_prompts
from zerosearch_jax.generate.weight_loader import WeightLoader
from zerosearch_jax.models.config import ModelConfig
from zerosearch_jax.models.kv_cache import cache_shardings, empty_cache
from zerosearch_jax.models.transformer import abstract_model
from zerosearch_jax.parallel import mesh as mesh_lib
from zerosearch_jax.parallel.device_clock import DeviceClock

# Fraction of the decoded rows whose stop ends a chunk, so that other sequences can take them.
MIN_FINISHED_FRACTION = 0.25


@dataclass(frozen=True)
class Generation:
    """Tokens that one slot sampled between `start_decoding` and its stop.

    Attributes:
      tokens: sampled ids. A token that completes a stop string, or an end token, is the last.
      logprobs: log-prob of each token when it was sampled.
      finish: "stop" (a stop string), "end" (an end token) or "length" (limit or full slot).
    """

    tokens: list[int]
    logprobs: list[float]
    finish: str


class Generator:
    """Prefill and decoding over S slots.

    Args:
      config: the model's sizes.
      stop_table: `[A, V]` from `build_stop_table`.
      end_ids: token ids that end a text.
      slots: S, number of sequences held at once; a multiple of the number of replicas.
      max_tokens: L, longest sequence of a slot.
      prefill_rows: rows of one prefill or copy program, per replica.
      prefill_buckets: chunk lengths in tokens that prefill programs are compiled for.
      decode_rows: numbers of rows, per replica, that decode programs are compiled for. The
        smallest that holds the decoding slots is used. If more slots decode than the largest
        holds, they alternate. (): one program for all slots of a replica.
      chunk_tokens: most tokens that a row gains in one `decode_chunk`.
      window_tokens: decode programs attend to the cache rounded up to a multiple of this.
      dtype: of weights and cache.
      int8_weights: keep the matrices in int8, see `models.decode_weights`.
      clock: measures the time in which the device has work; None for a new one.

    Raises:
      UserError: `max_tokens` exceeds the model's positions, or `decode_rows` holds a 0.
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
        dtype: Any = jnp.float32,
        int8_weights: bool = False,
        clock: DeviceClock | None = None,
    ):
        check_max_tokens(max_tokens, config)
        self.slots = slots
        self.replicas = mesh.shape["data"] * mesh.shape["fsdp"]
        self.max_tokens = max_tokens
        self.mesh = mesh
        self.prefilled_tokens = 0
        self.decoded_tokens = 0
        self.clock = clock or DeviceClock()
        self._params = None
        graphdef, _ = abstract_model(config, dtype=dtype, stacked=False)
        self._static = dict(graphdef=graphdef, mesh=mesh)  # arguments of the jitted programs
        new_cache = partial(empty_cache, config, slots, max_tokens, dtype)
        self._cache = jax.jit(new_cache, out_shardings=cache_shardings(new_cache, mesh))()
        self._layout = SlotLayout(self.replicas, slots // self.replicas)
        most = self._layout.slots_per_replica
        self._prefill_rows = min(prefill_rows, most)
        self._buckets = sorted({min(size, max_tokens) for size in prefill_buckets})
        sizes = decode_rows or (most,)
        if min(sizes) < 1:
            raise UserError(f"the generator's decode_rows={tuple(sizes)} must all be at least 1")
        self._decode_rows = sorted({min(n, most) for n in sizes})
        self._chunk_tokens = min(chunk_tokens, max_tokens)
        ends = range(window_tokens, max_tokens + window_tokens, window_tokens)
        self._windows = [min(end, max_tokens) for end in ends]
        self._load_weights = WeightLoader(config, mesh, dtype=dtype, int8_weights=int8_weights)
        self._whole = mesh_lib.replicated(mesh)
        self._by_row = mesh_lib.sharding_of_rows(mesh)
        self._stop_table = jax.device_put(stop_table, self._whole)
        self._end_ids = jax.device_put(np.asarray(list(end_ids), np.int32), self._whole)
        self._length = np.zeros(slots, np.int32)  # tokens in each slot's cache
        self._pending = np.zeros(slots, np.int32)
        self._prompts: dict[int, tuple[int, ...]] = {}  # cached part of each slot's prompt
        self._decoding: dict[int, DecodingSlot] = {}
        self._full: dict[int, Generation] = {}  # slots without room for a single token

    def load(self, params: nnx.State) -> None:
        """Copies stacked training parameters, cast and resharded layer by layer.

        Every process whose devices hold the parameters must call this, see `WeightLoader`.

        Args:
          params: on a mesh whose devices include the generator's, in the same tensor groups.
        """
        self._params = None  # frees the memory of the old weights
        with self.clock.working():
            self._params = self._load_weights(params)
            jax.block_until_ready(self._params)
        self._prompts.clear()

    @property
    def weight_bytes(self) -> int:
        """Bytes of the loaded weights, summed over all devices of the mesh."""
        return sum(
            s.data.nbytes for x in jax.tree.leaves(self._params) for s in x.addressable_shards
        )

    def replica_of(self, slot: int) -> int:
        """Returns the replica of a slot. Only slots of one replica share a prompt's prefill."""
        return self._layout.replica_of(slot)

    def warm_up(self, samplings: Sequence[Sampling]) -> None:
        """Compiles every program that later calls can need; leaves the slots unchanged."""
        for size in self._buckets:
            self._prefill({}, {}, size)
        for window in self._windows:
            self._copy({}, {}, window)
            for rows in self._decode_rows:
                for sampling in samplings:
                    self._decode([], rows, window, jax.random.key(0), sampling, 1)
        self.drain()

    def start(self, slots: Sequence[int], prompts: Sequence[Sequence[int]]) -> None:
        """Empties the slots and gives each its prompt of at least one token.

        A prompt that another slot of the replica begins with is copied, not computed.

        Raises:
          UserError: a prompt does not fit a slot.
        """
        wanted = {s: tuple(p[:-1]) for s, p in zip(slots, prompts, strict=True)}
        for prompt in wanted.values():
            self._check_fits(0, len(prompt))
        prefills, source_of = plan_prompts(wanted, self._prompts, self.replica_of)
        self._length[list(wanted)] = 0
        self._prompts |= wanted
        self._append({slot: wanted[slot] for slot in prefills})
        self._copy_prompts(source_of)
        for slot, prompt in zip(slots, prompts, strict=True):
            self._length[slot] = len(prompt) - 1
            self._pending[slot] = prompt[-1]

    def extend(self, slots: Sequence[int], tokens: Sequence[Sequence[int]]) -> None:
        """Appends inserted tokens, at least one per slot, behind the slots' tokens.

        Raises:
          UserError: the tokens do not fit a slot.
        """
        pairs = zip(slots, tokens, strict=True)
        self._append({slot: [int(self._pending[slot]), *new[:-1]] for slot, new in pairs})
        self._pending[list(slots)] = [new[-1] for new in tokens]

    def free_tokens(self, slot: int) -> int:
        """Returns how many more tokens the slot can take, inserted or sampled."""
        return int(self.max_tokens - self._length[slot] - 1)

    def start_decoding(
        self, slots: Sequence[int], *, streams: Sequence[tuple[int, int]], max_new_tokens: int
    ) -> None:
        """Starts sampling in the slots; each samples until it stops or has `max_new_tokens`.

        Args:
          streams: two numbers per slot, such as (episode, turn). The draw at sequence position p
            uses the key folded with them and with p. So it depends neither on other slots nor on
            how calls of `decode_chunk` cut the work.
        """
        for slot, stream in zip(slots, streams, strict=True):
            limit = min(max_new_tokens, self.free_tokens(slot))
            if limit:
                self._decoding[slot] = DecodingSlot(stream, limit)
            else:
                self._full[slot] = Generation([], [], "length")

    def decode_chunk(
        self,
        *,
        key: jax.Array,
        sampling: Sampling,
        min_finished_fraction: float = MIN_FINISHED_FRACTION,
    ) -> dict[int, Generation]:
        """Dispatches one decode program; decoding slots gain at most `chunk_tokens` tokens each.

        If not all slots fit the program, the slots with the fewest cached tokens are decoded,
        because a program attends to as many tokens as its longest row has.

        Args:
          key: a typed PRNG key, `[]`.
          min_finished_fraction: the chunk ends early once this fraction of its rows has stopped,
            in [0, 1]. The host can then give their slots new work.

        Returns:
          The generations of the slots that stopped, by slot. The other slots go on at the next
          call.
        """
        if self._full:
            full, self._full = self._full, {}
            return full
        slots = sorted(self._decoding, key=lambda slot: self._window(self._length[slot]))
        waiting = self._layout.by_replica(slots)
        groups = [queue[: self._decode_rows[-1]] for queue in waiting]
        most = max(map(len, groups))
        if not most:
            return {}
        if groups != waiting:
            min_finished_fraction = min(min_finished_fraction, MIN_FINISHED_FRACTION)
        # Fewer stops end the chunk if a smaller program can then hold the other rows.
        smaller = max((n for n in self._decode_rows if n < most), default=0)
        min_finished = min(math.ceil(min_finished_fraction * most), most - smaller)
        rows = next(n for n in self._decode_rows if n >= most)
        window = max(self._window(self._length[slot]) for group in groups for slot in group)
        slot_at, result = self._decode(groups, rows, window, key, sampling, min_finished)
        result = jax.device_get(result)
        self.drain()
        return self._take_result(slot_at, result)

    def _take_result(self, slot_at: dict[int, int], result: DecodeResult) -> dict[int, Generation]:
        """Adds the sampled tokens to the decoded slots; returns the generations that ended."""
        stopped = {}
        for row, slot in slot_at.items():
            decoding, n = self._decoding[slot], int(result.count[row])
            decoding.tokens += result.tokens[row, :n].tolist()
            decoding.logprobs += result.logprobs[row, :n].tolist()
            decoding.limit -= n
            decoding.stop_state = int(result.stop_state[row])
            self._length[slot] += n
            self._pending[slot] = result.pending[row]
            self.decoded_tokens += n
            if result.finish[row]:
                name = kernels.FINISH_NAMES[int(result.finish[row])]
                stopped[slot] = Generation(decoding.tokens, decoding.logprobs, name)
                del self._decoding[slot]
        return stopped

    def decode_until(
        self, *, key: jax.Array, sampling: Sampling, min_finished_fraction: float
    ) -> dict[int, Generation]:
        """Calls `decode_chunk` until `min_finished_fraction` of the decode rows are free.

        If more slots decode than a program has rows, waiting slots take the rows of slots that
        stop.

        Returns:
          The generations of the slots that stopped, by slot.
        """
        decoding = len(self._decoding) + len(self._full)
        rows = min(decoding, self._decode_rows[-1] * self.replicas)
        may_remain = math.floor((1.0 - min_finished_fraction) * rows)
        stopped: dict[int, Generation] = {}
        while len(stopped) < decoding - may_remain:
            stopped |= self.decode_chunk(
                key=key, sampling=sampling, min_finished_fraction=min_finished_fraction
            )
        return stopped

    def decode(
        self,
        slots: Sequence[int],
        *,
        key: jax.Array,
        streams: Sequence[tuple[int, int]],
        max_new_tokens: int,
        sampling: Sampling,
    ) -> list[Generation]:
        """Samples in the slots until all have stopped; returns generations in the slots' order."""
        self.start_decoding(slots, streams=streams, max_new_tokens=max_new_tokens)
        stopped = self.decode_until(key=key, sampling=sampling, min_finished_fraction=1.0)
        return [stopped[slot] for slot in slots]

    def drain(self) -> None:
        """Waits until the device has finished all dispatched work."""
        jax.block_until_ready(self._cache)
        self.clock.drained()

    def _window(self, tokens: int) -> int:
        """Returns the smallest window that covers the first `tokens` tokens of the cache."""
        return next(window for window in self._windows if window >= tokens)

    def _check_fits(self, cached_tokens: int, new_tokens: int) -> None:
        if cached_tokens + new_tokens > self.max_tokens - 1:
            raise UserError(
                f"{cached_tokens + new_tokens + 1} tokens do not fit a slot of "
                f"{self.max_tokens}; raise the generator's max_tokens or shorten the input"
            )

    def _append(self, rows: dict[int, Sequence[int]]) -> None:
        """Writes each slot's row of tokens behind its cached ones, in bucketed chunks."""
        for slot, row in rows.items():
            self._check_fits(int(self._length[slot]), len(row))
        # Rows of similar length share a program, so that little of a bucket is padding.
        order = sorted((slot for slot in rows if rows[slot]), key=lambda slot: len(rows[slot]))
        for slot_at in self._layout.batches(order, self._prefill_rows):
            batch = {slot: rows[slot] for slot in slot_at.values()}
            for size, chunks in cut_to_buckets(batch, self._buckets):
                self._prefill(slot_at, chunks, size)

    def _copy_prompts(self, source_of: dict[int, int]) -> None:
        """Copies cached prompts between slots of one replica; `source_of` is target -> source."""
        for targets in self._layout.batches(source_of, self._prefill_rows):
            sources = {row: source_of[slot] for row, slot in targets.items()}
            longest = max(len(self._prompts[slot]) for slot in sources.values())
            if longest:
                self._copy(targets, sources, self._window(longest))

    def _put_rows(self, tree: Any) -> Any:
        """Moves arrays to the device, split by row over the replicas."""
        self.clock.started()
        return jax.device_put(tree, self._by_row)

    def _prefill(
        self, slot_at: dict[int, int], chunks: dict[int, Sequence[int]], size: int
    ) -> None:
        """Prefills each row's slot with its chunk of at most `size` tokens."""
        rows = self._prefill_rows
        tokens = np.zeros((self.replicas * rows, size), np.int32)
        starts = np.zeros(len(tokens), np.int32)
        for row, slot in slot_at.items():
            chunk = chunks[slot]
            tokens[row, : len(chunk)] = chunk
            starts[row] = self._length[slot]
            self._length[slot] += len(chunk)
            self.prefilled_tokens += len(chunk)
        chunk = PrefillChunk(self._layout.cache_rows(slot_at, rows), starts, tokens)
        self._cache = kernels.prefill(
            self._params, self._cache, self._put_rows(chunk), **self._static
        )

    def _copy(self, targets: dict[int, int], sources: dict[int, int], window: int) -> None:
        """Copies the first `window` tokens of each row's source slot to its target slot."""
        index = [self._layout.cache_rows(side, self._prefill_rows) for side in (targets, sources)]
        self._cache = kernels.copy_rows(
            self._cache, *self._put_rows(index), window=window, mesh=self.mesh
        )

    def _decode(self, groups, rows: int, window: int, key, sampling: Sampling, min_finished: int):
        """Dispatches the decode program of `rows` rows per replica for each replica's slots.

        Returns:
          The slot of each row, and a `DecodeResult` on the device.
        """
        all_rows = rows == self._layout.slots_per_replica
        if all_rows:
            # A program with a row for every slot reads the cache in place, without a gather.
            slot_at = {slot: slot for group in groups for slot in group}
        else:
            slot_at = self._layout.slot_at(groups, rows)
        size = self.replicas * rows
        vectors = [np.zeros(size, np.int32) for _ in range(4)]
        stream = np.zeros((size, 2), np.uint32)
        state = DecodeState(self._layout.cache_rows(slot_at, rows), *vectors, stream=stream)
        for row, slot in slot_at.items():
            decoding = self._decoding[slot]
            state.length[row], state.pending[row] = self._length[slot], self._pending[slot]
            state.limit[row], state.stop_state[row] = decoding.limit, decoding.stop_state
            state.stream[row] = decoding.stream
        shared = jax.device_put((key, np.int32(min_finished)), self._whole)
        self._cache, result = kernels.decode(
            self._params,
            self._cache,
            self._put_rows(state),
            DecodeInputs(*shared, self._stop_table, self._end_ids),
            sampling=sampling,
            window=window,
            chunk_tokens=self._chunk_tokens,
            all_rows=all_rows,
            **self._static,
        )
        return slot_at, result


def check_max_tokens(max_tokens: int, config: ModelConfig) -> None:
    """Raises UserError if a slot of `max_tokens` is longer than the model's positions."""
    if max_tokens > config.max_positions:
        raise UserError(
            f"max_tokens={max_tokens} is beyond the model's {config.max_positions} positions; "
            "lower the generator's max_tokens"
        )


def slots_by_replica(generator: Generator) -> list[list[int]]:
    """Returns the slots of each replica of a generator."""
    layout = SlotLayout(generator.replicas, generator.slots // generator.replicas)
    return layout.by_replica(range(generator.slots))
