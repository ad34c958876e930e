"""Ragged token sequences to fixed-shape learner batches: several sequences share a row.

Column t of every array speaks of predicting `targets[t]`, the token after `tokens[t]` in the same
sequence; so masks and log-probs need no shifting in the learner.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from zerosearch_jax.errors import UserError


@dataclass(frozen=True)
class TokenSequence:
    """One sequence to learn from.

    Attributes:
      tokens: `[n]` ids.
      mask: `[n]` weight of each token in the loss: 1 where the policy wrote it, 0 elsewhere.
      columns: what else the loss wants to know of each token, `[n]` floats under each name; unread
        where the mask is 0.
    """

    tokens: Sequence[int]
    mask: Sequence[float]
    columns: Mapping[str, Sequence[float]] = field(default_factory=dict)


@dataclass(frozen=True)
class PackedBatch:
    """Host arrays of M microbatches × R rows × T tokens; rows past the last are padding.

    Attributes:
      tokens, targets: int32; `targets[t]` follows `tokens[t]`, 0 at a sequence's last token.
      positions: int32, from 0 in each sequence.
      segment_ids: int32, from 1 within a row; 0 is padding.
      mask: float32, the loss weight of `targets`; 0 wherever there is no target.
      columns: float32 each, the sequences' columns, of `targets`.
      num_microbatches: int32 scalar, microbatches that hold any sequence.
      places: (row, offset, length) of each sequence, rows counted through the microbatches.
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
        """All arrays by name, the columns among them."""
        names = ("tokens", "targets", "positions", "segment_ids", "mask", "num_microbatches")
        return {name: getattr(self, name) for name in names} | self.columns

    def unpack(self, values: np.ndarray) -> list[np.ndarray]:
        """`values` `[M, R, T]` of the targets, as `[n]` of the tokens of each sequence.

        A sequence's first token, which nothing predicts, gets 0. Rows past the R-th, which a
        mesh may have asked for, are not read.
        """
        values = np.asarray(values)[:, : self.tokens.shape[1]]
        rows = values.reshape(-1, values.shape[-1])
        unpacked = []
        for row, offset, length in self.places:
            tokens = np.zeros(length, rows.dtype)
            tokens[1:] = rows[row, offset : offset + length - 1]
            unpacked.append(tokens)
        return unpacked


def place(lengths: Sequence[int], row_tokens: int) -> list[tuple[int, int]]:
    """First-fit-decreasing: the (row, offset) of each length; rows hold `row_tokens`.

    Raises:
      UserError: a sequence is longer than a row.
    """
    free: list[int] = []
    places = [(0, 0)] * len(lengths)
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if lengths[i] > row_tokens:
            raise UserError(
                f"a sequence of {lengths[i]} tokens does not fit a row of {row_tokens}; "
                "raise config's row_tokens"
            )
        row = next((r for r, room in enumerate(free) if room >= lengths[i]), len(free))
        if row == len(free):
            free.append(row_tokens)
        places[i] = (row, row_tokens - free[row])
        free[row] -= lengths[i]
    return places


def pack(
    sequences: Sequence[TokenSequence], *, row_tokens: int, rows: int, microbatches: int | None
) -> PackedBatch:
    """Packs `sequences` into at most `microbatches` microbatches of `rows` rows.

    The arrays always hold `microbatches` of them (a fixed shape); None: as many as are needed.

    Raises:
      UserError: a sequence is longer than a row, or they do not all fit.
    """
    places = place([len(s.tokens) for s in sequences], row_tokens)
    used = 1 + max((row for row, _ in places), default=-1)
    microbatches = -(-used // rows) if microbatches is None else microbatches
    if used > rows * microbatches:
        raise UserError(
            f"{used} packed rows do not fit {microbatches} microbatches of {rows}; "
            "give more of either"
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
            raise ValueError(f"columns {list(sequence.columns)} beside {list(names)} in one batch")
        for name, column in sequence.columns.items():
            floats[name][row, predicting] = column[1:]
    cut = {k: v.reshape(microbatches, rows, row_tokens) for k, v in (ints | floats).items()}
    return PackedBatch(
        **{name: cut.pop(name) for name in (*ints, "mask")},
        columns=cut,
        num_microbatches=np.int32(-(-used // rows)),
        places=tuple((*at, len(s.tokens)) for at, s in zip(places, sequences, strict=True)),
    )
