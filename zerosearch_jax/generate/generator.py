"""A generator: parameters and a KV cache of S slots × L tokens on a mesh of its own.

The policy and the simulation LLM are two instances. A slot holds one sequence: `start` gives it
a prompt, `decode` samples until a stop, `extend` appends inserted tokens behind what is cached
(nothing is ever computed twice). It knows tokens, not text: no prompts, tags or episodes.

The last token of every slot is *pending*: chosen but not yet in the cache. Decoding feeds it
first, so prefill computes no logits.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from zerosearch_jax.errors import UserError
from zerosearch_jax.generate.sampling import Sampling, sample
from zerosearch_jax.models.config import ModelConfig
from zerosearch_jax.models.transformer import (
    LayerCache,
    abstract_model,
    cache_shardings,
    empty_cache,
    param_shardings,
    unstack_layers,
)
from zerosearch_jax.parallel import mesh as mesh_lib

STOPPED, ENDED, LIMIT = 1, 2, 3  # why a row left the decode loop; 0: still running


@dataclass(frozen=True)
class Generation:
    """What one row sampled in one `decode`.

    Attributes:
      tokens: sampled ids; the one that completed a stop string (or the end token) is the last.
      logprobs: log-prob of each at the moment it was sampled.
      finish: "stop" (a stop string), "end" (end of text) or "length" (limit or cache full).
    """

    tokens: list[int]
    logprobs: list[float]
    finish: str


@dataclass(frozen=True)
class _Decoded:
    """Loop-carried state of `decode`; S slots, K tokens at most."""

    step: jax.Array  # []
    cache: list[LayerCache]  # one a layer, `window` tokens long
    length: jax.Array  # [S] tokens in the cache
    pending: jax.Array  # [S]
    state: jax.Array  # [S] of the stop automaton
    finish: jax.Array  # [S] 0 while running
    tokens: jax.Array  # [S, K]
    logprobs: jax.Array  # [S, K]
    count: jax.Array  # [S] tokens sampled


jax.tree_util.register_dataclass(_Decoded)


class Generator:
    """Prefill and decode over S slots.

    Args:
      config: the model's sizes.
      stop_table: `[A, V]` from `build_stop_table`.
      end_ids: token ids that end a text.
      slots: S, sequences held at once; a multiple of the mesh's data and fsdp axes.
      max_tokens: L, the longest sequence of a slot.
      prefill_rows: rows of one prefill call; `prefill_buckets`: its chunk lengths in tokens.
      window_tokens: decode attends to the cache rounded up to a multiple of this.
      dtype: of weights and cache.
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
        window_tokens: int = 128,
        dtype=jnp.float32,
    ):
        if max_tokens > config.max_positions:
            raise UserError(
                f"max_tokens={max_tokens} is beyond the model's {config.max_positions} positions; "
                "lower config.rollout's token limits"
            )
        self.config = config
        self.slots = slots
        self.max_tokens = max_tokens
        self.mesh = mesh
        self.prefill_rows = min(prefill_rows, slots)
        self.prefill_buckets = tuple(sorted(prefill_buckets))
        self.window_tokens = window_tokens
        self.prefilled_tokens = 0
        self.decoded_tokens = 0
        self._graphdef, self._abstract = abstract_model(config, dtype=dtype, stacked=False)
        self._params = None
        self._dtype = dtype
        self._table = jax.device_put(stop_table, mesh_lib.replicated(mesh))
        self._end_ids = np.asarray(list(end_ids), np.int32)
        fresh = partial(empty_cache, config, slots, max_tokens, dtype)
        self._cache = jax.jit(fresh, out_shardings=cache_shardings(fresh, mesh))()
        # Jitted here and not in `load`, which would compile it anew at every call.
        self._convert = jax.jit(
            lambda params: unstack_layers(
                jax.tree.map(lambda x: x.astype(dtype), params), config.num_layers
            ),
            out_shardings=param_shardings(self._abstract, mesh),
        )
        self._length = np.zeros(slots, np.int32)
        self._pending = np.zeros(slots, np.int32)

    def load(self, params: nnx.State) -> None:
        """Takes over a copy of stacked training parameters, resharded and cast."""
        source = jax.device_put(params, param_shardings(params, self.mesh))
        self._params = self._convert(source)

    def warm_up(self, decodes: Sequence[tuple[Sampling, int]]) -> None:
        """Compiles every program that later calls can need; the slots are left as they are.

        Args:
          decodes: the (sampling, max_new_tokens) pairs that `decode` will be called with.
        """
        step = self.window_tokens
        for reach in range(step, self.max_tokens + step, step):
            window = self._window(reach)
            for size in self.prefill_buckets:
                if size <= window:
                    self._run_prefill(*self._empty_chunk(size), window)
            for sampling, max_new_tokens in decodes:
                self._run_decode(
                    np.zeros(self.slots, np.int32),
                    np.zeros((self.slots, 2), np.uint32),
                    jax.random.key(0),
                    sampling,
                    window,
                    max_new_tokens,
                )

    def start(self, slots: Sequence[int], prompts: Sequence[Sequence[int]]) -> None:
        """Empties the slots and gives each its prompt (at least one token)."""
        self._length[list(slots)] = 0
        self._append(slots, [list(prompt[:-1]) for prompt in prompts])
        self._pending[list(slots)] = [prompt[-1] for prompt in prompts]

    def extend(self, slots: Sequence[int], tokens: Sequence[Sequence[int]]) -> None:
        """Appends inserted tokens (at least one a row) behind what the slots hold."""
        rows = [
            [int(self._pending[slot]), *new[:-1]] for slot, new in zip(slots, tokens, strict=True)
        ]
        self._append(slots, rows)
        self._pending[list(slots)] = [new[-1] for new in tokens]

    def room(self, slot: int) -> int:
        """How many more tokens the slot can take, inserted or sampled."""
        return int(self.max_tokens - self._length[slot] - 1)

    def decode(
        self,
        slots: Sequence[int],
        *,
        key: jax.Array,
        streams: Sequence[tuple[int, int]],
        max_new_tokens: int,
        sampling: Sampling,
    ) -> list[Generation]:
        """Samples in each slot until a stop string, the end of text or the limit.

        Args:
          slots: n slots to run; the others are left alone.
          key: a typed PRNG key, `[]`.
          streams: two numbers a slot, say (episode, turn). The draw at sequence position p uses
            `key` folded with them and with p, so it depends on neither the other rows nor on
            how often `decode` was called.

        Returns:
          One `Generation` a slot, in the order of `slots`.
        """
        slots = np.asarray(list(slots))
        limit = np.zeros(self.slots, np.int32)
        limit[slots] = np.minimum(max_new_tokens, self.max_tokens - 1 - self._length[slots])
        window = self._window(int(np.max(self._length[slots] + limit[slots])) + 1)
        folds = np.zeros((self.slots, 2), np.uint32)
        folds[slots] = streams
        out = self._run_decode(limit, folds, key, sampling, window, max_new_tokens)
        length, pending, finish, tokens, logprobs, count = jax.device_get(
            (out.length, out.pending, out.finish, out.tokens, out.logprobs, out.count)
        )
        self._length[slots], self._pending[slots] = length[slots], pending[slots]
        self.decoded_tokens += int(count[slots].sum())
        names = {STOPPED: "stop", ENDED: "end", LIMIT: "length"}
        return [
            Generation(
                tokens[slot, : count[slot]].tolist(),
                logprobs[slot, : count[slot]].tolist(),
                names[int(finish[slot])],
            )
            for slot in slots
        ]

    def _append(self, slots: Sequence[int], rows: list[list[int]]) -> None:
        """Writes rows of tokens behind the slots' cached ones, in bucketed chunks."""
        for slot, row in zip(slots, rows, strict=True):
            if len(row) > self.max_tokens - 1 - self._length[slot]:
                raise UserError(
                    f"{self._length[slot] + len(row) + 1} tokens do not fit a slot of "
                    f"{self.max_tokens}; raise config.rollout's token limits or shorten the input"
                )
        # Rows of like length go together, so that little of a bucket is padding.
        order = sorted((i for i in range(len(rows)) if rows[i]), key=lambda i: len(rows[i]))
        for start in range(0, len(order), self.prefill_rows):
            group = order[start : start + self.prefill_rows]
            todo = [rows[i] for i in group]
            while any(todo):
                longest = max(len(row) for row in todo)
                fits = [size for size in self.prefill_buckets if size >= longest]
                self._prefill_chunk(
                    [slots[i] for i in group], todo, fits[0] if fits else self.prefill_buckets[-1]
                )
                todo = [row[self.prefill_buckets[-1] :] for row in todo]

    def _prefill_chunk(self, slots: list[int], rows: list[list[int]], size: int) -> None:
        """Prefills up to `size` tokens of each row; slots past the given ones are padding."""
        index, tokens, positions = self._empty_chunk(size)
        for i, (slot, row) in enumerate(zip(slots, rows, strict=True)):
            row = row[:size]
            index[i] = slot
            tokens[i, : len(row)] = row
            positions[i, : len(row)] = self._length[slot] + np.arange(len(row))
            self._length[slot] += len(row)
            self.prefilled_tokens += len(row)
        window = self._window(max(int(self._length[slot]) for slot in slots))
        self._run_prefill(index, tokens, positions, window)

    def _window(self, reach: int) -> int:
        """The part of the cache to compute on when `reach` tokens of it are in use."""
        return min(-(-reach // self.window_tokens) * self.window_tokens, self.max_tokens)

    def _empty_chunk(self, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Slots `[P]`, tokens and positions `[P, size]` of a chunk that writes nothing."""
        shape = (self.prefill_rows, size)
        # A slot past the last and positions beyond the cache: such writes are dropped.
        index = np.full(self.prefill_rows, self.slots, np.int32)
        return index, np.zeros(shape, np.int32), np.full(shape, self.max_tokens, np.int32)

    def _run_prefill(self, index, tokens, positions, window: int) -> None:
        self._cache = _prefill(
            self._params,
            self._cache,
            index,
            tokens,
            positions,
            graphdef=self._graphdef,
            window=window,
        )

    def _run_decode(
        self, limit, folds, key, sampling: Sampling, window: int, max_new_tokens: int
    ) -> _Decoded:
        out = _decode(
            self._params,
            self._cache,
            self._length,
            self._pending,
            limit,
            key,
            folds,
            self._table,
            self._end_ids,
            graphdef=self._graphdef,
            sampling=sampling,
            window=window,
            max_new_tokens=max_new_tokens,
        )
        self._cache = out.cache
        return out


@partial(jax.jit, static_argnames=("graphdef", "window"), donate_argnames="cache")
def _prefill(params, cache, index, tokens, positions, *, graphdef, window):
    """Writes `tokens` `[P, C]` at `positions` of the cache rows `index` `[P]`."""
    model = nnx.merge(graphdef, params)
    # A padded position must stay beyond the window that is computed on.
    positions = jnp.where(positions < window, positions, window)
    rows = [
        (k.at[index, :, :, :window].get(mode="clip"), v.at[index, :, :window].get(mode="clip"))
        for k, v in cache
    ]
    _, rows = model.cached(tokens, positions, rows)
    return [
        (
            k.at[index, :, :, :window].set(k_rows, mode="drop"),
            v.at[index, :, :window].set(v_rows, mode="drop"),
        )
        for (k, v), (k_rows, v_rows) in zip(cache, rows, strict=True)
    ]


@partial(
    jax.jit,
    static_argnames=("graphdef", "sampling", "window", "max_new_tokens"),
    donate_argnames="cache",
)
def _decode(
    params, cache, length, pending, limit, key, folds, table, end_ids,
    *, graphdef, sampling, window, max_new_tokens,
):  # fmt: skip
    """Runs every row with `limit` > 0 until it stops; see `Generator.decode`."""
    model = nnx.merge(graphdef, params)
    num_rows = length.shape[0]
    accept = table.shape[0] - 1
    fold = jax.random.fold_in
    row_keys = jax.vmap(lambda stream: fold(fold(key, stream[0]), stream[1]))(folds)
    whole = cache
    start = _Decoded(
        step=jnp.int32(0),
        cache=[(k[..., :window], v[:, :, :window]) for k, v in whole],
        length=length,
        pending=pending,
        state=jnp.zeros(num_rows, jnp.int32),
        finish=jnp.where(limit > 0, 0, LIMIT),
        tokens=jnp.zeros((num_rows, max_new_tokens), jnp.int32),
        logprobs=jnp.zeros((num_rows, max_new_tokens), jnp.float32),
        count=jnp.zeros(num_rows, jnp.int32),
    )

    def body(s: _Decoded) -> _Decoded:
        running = s.finish == 0
        positions = jnp.where(running, s.length, window)  # a finished row writes nothing
        hidden, cache = model.cached(s.pending[:, None], positions[:, None], s.cache)
        token_keys = jax.vmap(fold)(row_keys, s.length)
        token, logprob = sample(model.logits(hidden[:, 0]), token_keys, sampling)
        state = table[s.state, token].astype(jnp.int32)
        count = s.count + running
        finish = jnp.where(count >= limit, LIMIT, 0)
        finish = jnp.where(jnp.isin(token, end_ids), ENDED, finish)
        finish = jnp.where(state == accept, STOPPED, finish)
        return _Decoded(
            step=s.step + 1,
            cache=cache,
            length=s.length + running,
            pending=jnp.where(running, token, s.pending),
            state=jnp.where(running, state, s.state),
            finish=jnp.where(running, finish, s.finish),
            tokens=s.tokens.at[:, s.step].set(jnp.where(running, token, 0)),
            logprobs=s.logprobs.at[:, s.step].set(jnp.where(running, logprob, 0.0)),
            count=count,
        )

    end = lax.while_loop(lambda s: jnp.any(s.finish == 0) & (s.step < max_new_tokens), body, start)
    merged = [
        (k.at[..., :window].set(k_part), v.at[:, :, :window].set(v_part))
        for (k, v), (k_part, v_part) in zip(whole, end.cache, strict=True)
    ]
    return _Decoded(**(end.__dict__ | {"cache": merged}))
