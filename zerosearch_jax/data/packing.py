"""Packs token sequences of any length into fixed-shape learner batches.

Several sequences share a row. Column t of every array belongs to `targets[t]`, the token that
follows `tokens[t]` in the same sequence, so the learner never shifts masks or log-probs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from zerosearch_jax.errors import UserError


@dataclass(frozen=True)
class TokenSequence:
    """One sequence to learn from.

    Attributes:
      tokens: `[n]` ids.
      mask: `[n]` weight of each token in the loss: 1 where the policy wrote it, 0 elsewhere.
      columns: further values per token that the loss reads, `[n]` floats under each name; unread
        where the mask is 0.
    """

    tokens: Sequence[int]
    mask: Sequence[float]
    columns: Mapping[str, Sequence[float]] = field(default_factory=dict)


@dataclass(frozen=True)
class PackedBatch:
    """Host arrays of M microbatches × R rows × T tokens, the host side of `rl.batch.LearnerBatch`.

    Rows past the last used one are padding.

    Attributes:
      tokens, targets: int32; `targets[t]` follows `tokens[t]`, 0 at a sequence's last token.
      positions: int32, from 0 in each sequence.
      segment_ids: int32, from 1 within a row; 0 is padding.
      mask: float32, the loss weight of `targets`; 0 wherever there is no target.
      columns: float32 each, further values of `targets` under their `LearnerBatch` names.
      num_microbatches: int32 scalar, microbatches that hold any sequence.
      places: (row, offset, length) of each sequence; rows are counted through the microbatches.
    """

    tokens: np.ndarray
    targets: np.ndarray
    positions: np.ndarray
    segment_ids: np.ndarray
    mask: np.ndarray
    columns: dict[str, np.ndarray]
    num_microbatches: np.ndarray
    places: tuple[tuple[int, int, int], ...]

    def arrays(self) -> dict[str, np.ndarray]:
        """All arrays, columns included, under the names of the fields of `LearnerBatch`."""
        names = ("tokens", "targets", "positions", "segment_ids", "mask", "num_microbatches")
        return {name: getattr(self, name) for name in names} | self.columns

    def with_columns(self, **columns: np.ndarray) -> "PackedBatch":
        """Returns the batch with columns `[M, R, T]` added or replaced."""
        return replace(self, columns=self.columns | columns)

    def spread(self, values: np.ndarray) -> np.ndarray:
        """Packs values of the sequences as a column `[M, R, T]`, 0 where there is no target.

        Args:
          values: `[N]`, one per sequence, or `[N, T]`, one per token.
        """
        column = np.zeros(
            (self.tokens.size // self.tokens.shape[-1], self.tokens.shape[-1]), np.float32
        )
        for value, (row, offset, length) in zip(values, self.places, strict=True):
            column[row, offset : offset + length - 1] = value[1:length] if value.ndim else value
        return column.reshape(self.tokens.shape)

    def unpack(self, column: np.ndarray) -> np.ndarray:
        """Returns a column `[M, R, T]` by sequence: `[N, T]`, the inverse of `spread`.

        A sequence's first token, which nothing predicts, and the padding get 0.
        """
        rows = np.reshape(column, (-1, column.shape[-1]))
        values = np.zeros((len(self.places), column.shape[-1]), rows.dtype)
        for value, (row, offset, length) in zip(values, self.places, strict=True):
            value[1:length] = rows[row, offset : offset + length - 1]
        return values


def place(lengths: Sequence[int], row_tokens: int) -> list[tuple[int, int]]:
    """Returns the (row, offset) of each length, by first-fit-decreasing into rows of `row_tokens`.

    Raises:
      UserError: a sequence is longer than a row.
    """
    free: list[int] = []
    places = [(0, 0)] * len(lengths)
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if lengths[i] > row_tokens:
            raise UserError(
                f"a sequence of {lengths[i]} tokens does not fit a row of {row_tokens}; raise "
                f"learner.row_tokens to at least {lengths[i]}"
            )
        row = next((r for r, tokens in enumerate(free) if tokens >= lengths[i]), len(free))
        if row == len(free):
            free.append(row_tokens)
        places[i] = (row, row_tokens - free[row])
        free[row] -= lengths[i]
    return places


def pack(
    sequences: Sequence[TokenSequence], *, row_tokens: int, rows: int, microbatches: int | None
) -> PackedBatch:
    """Packs sequences into fixed-shape microbatches.

    Args:
      row_tokens: tokens per row.
      rows: rows per microbatch.
      microbatches: microbatches in the batch, used or not; None: as many as the sequences need.

    Raises:
      UserError: a sequence is longer than a row, or the sequences need more microbatches.
    """
    places = place([len(s.tokens) for s in sequences], row_tokens)
    used = 1 + max((row for row, _ in places), default=-1)
    microbatches = -(-used // rows) if microbatches is None else microbatches
    if used > rows * microbatches:
        raise UserError(
            f"the sequences need {used} rows of {row_tokens} tokens, but {microbatches} "
            f"microbatches of {rows} rows hold {rows * microbatches}; raise either"
        )
    shape = (microbatches * rows, row_tokens)
    ints = {k: np.zeros(shape, np.int32) for k in ("tokens", "targets", "positions", "segment_ids")}
    names = sequences[0].columns.keys() if sequences else ()
    floats = {k: np.zeros(shape, np.float32) for k in ("mask", *names)}
    segments = np.zeros(shape[0], np.int32)
    for sequence, (row, offset) in zip(sequences, places, strict=True):
        n = len(sequence.tokens)
        whole, predicting = slice(offset, offset + n), slice(offset, offset + n - 1)
        segments[row] += 1
        ints["tokens"][row, whole] = sequence.tokens
        ints["targets"][row, predicting] = sequence.tokens[1:]
        ints["positions"][row, whole] = np.arange(n)
        ints["segment_ids"][row, whole] = segments[row]
        floats["mask"][row, predicting] = sequence.mask[1:]
        if sequence.columns.keys() != names:
            raise ValueError(f"a sequence has columns {list(sequence.columns)}, not {list(names)}")
        for name, column in sequence.columns.items():
            floats[name][row, predicting] = column[1:]
    cut = {k: v.reshape(microbatches, rows, row_tokens) for k, v in (ints | floats).items()}
    return PackedBatch(
        **{name: cut.pop(name) for name in (*ints, "mask")},
        columns=cut,
        num_microbatches=np.int32(-(-used // rows)),
        places=tuple((*at, len(s.tokens)) for at, s in zip(places, sequences, strict=True)),
    )


@dataclass(frozen=True)
class Minibatches:
    """Packed minibatches that together hold each of N sequences once.

    Attributes:
      parts: indices of the sequences in each minibatch, ascending.
      batches: the packed minibatches.
    """

    parts: list[np.ndarray]
    batches: list[PackedBatch]

    def column(self, name: str) -> np.ndarray:
        """Returns the array `name` by sequence: `[N, T]`, 0 at first tokens and padding."""
        rows = [batch.unpack(batch.arrays()[name]) for batch in self.batches]
        return np.concatenate(rows)[np.argsort(np.concatenate(self.parts))]

    def columns(self) -> dict[str, np.ndarray]:
        """Returns every column by sequence, as `column` does."""
        return {name: self.column(name) for name in self.batches[0].columns}

    def with_columns(self, **columns: np.ndarray) -> "Minibatches":
        """Adds or replaces columns given by sequence, `[N]` or `[N, T]`."""
        batches = [
            batch.with_columns(**{name: batch.spread(c[part]) for name, c in columns.items()})
            for part, batch in zip(self.parts, self.batches, strict=True)
        ]
        return replace(self, batches=batches)


def pack_minibatches(
    sequences: Sequence[TokenSequence],
    size: int,
    *,
    key: tuple[int, ...],
    row_tokens: int,
    rows: int,
) -> Minibatches:
    """Packs sequences into minibatches of `size` sequences; the last may have fewer.

    All minibatches have the shape that fits `size` sequences at any length. Several minibatches
    are a shuffle keyed by `key`, which may separate the sequences of a group; a single one keeps
    the order.
    """
    order = np.arange(len(sequences))
    if len(sequences) > size:
        order = np.random.default_rng(key).permutation(len(sequences))
    starts = range(0, max(len(sequences), 1), size)
    parts = [np.sort(order[start : start + size]) for start in starts]
    microbatches = -(-len(parts[0]) // rows)  # the first part is the largest
    batches = [
        pack(
            [sequences[i] for i in part],
            row_tokens=row_tokens,
            rows=rows,
            microbatches=microbatches,
        )
        for part in parts
    ]
    return Minibatches(parts, batches)
