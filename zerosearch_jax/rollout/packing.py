"""Ragged token sequences to fixed-shape learner batches: several sequences share a row.

Column t of every array speaks of predicting `targets[t]`, the token after `tokens[t]` in the same
sequence; so masks and log-probs need no shifting in the learner.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from zerosearch_jax.errors import UserError


@dataclass(frozen=True)
class TokenSequence:
    """One sequence to learn from.

    Attributes:
      tokens: `[n]` ids.
      mask: `[n]` weight of each token in the loss: 1 where the policy wrote it, 0 elsewhere.
      logprobs: `[n]` log-prob at sampling of the policy's tokens, anything elsewhere; empty in SFT.
      advantage: of the whole sequence.
      correct: whether its answer was right; feeds a metric only.
    """

    tokens: Sequence[int]
    mask: Sequence[float]
    logprobs: Sequence[float] = field(default=())
    advantage: float = 0.0
    correct: bool = False


@dataclass(frozen=True)
class PackedBatch:
    """Host arrays of M microbatches × R rows × T tokens; rows past the last are padding.

    Attributes:
      tokens, targets: int32; `targets[t]` follows `tokens[t]`, 0 at a sequence's last token.
      positions: int32, from 0 in each sequence.
      segment_ids: int32, from 1 within a row; 0 is padding.
      mask: float32, the loss weight of `targets`; 0 wherever there is no target.
      old_logprobs: float32, of `targets` at sampling.
      advantages: float32, of the sequence.
      correct: float32, 1 in sequences whose answer was right.
      num_microbatches: int32 scalar, microbatches that hold any sequence.
    """

    tokens: np.ndarray
    targets: np.ndarray
    positions: np.ndarray
    segment_ids: np.ndarray
    mask: np.ndarray
    old_logprobs: np.ndarray
    advantages: np.ndarray
    correct: np.ndarray
    num_microbatches: np.ndarray

    def arrays(self) -> dict[str, np.ndarray]:
        return dict(self.__dict__)


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
            "raise config's rows or microbatches"
        )
    shape = (microbatches * rows, row_tokens)
    ints = {k: np.zeros(shape, np.int32) for k in ("tokens", "targets", "positions", "segment_ids")}
    floats = {
        k: np.zeros(shape, np.float32) for k in ("mask", "old_logprobs", "advantages", "correct")
    }
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
        if len(sequence.logprobs):
            floats["old_logprobs"][row, predicting] = sequence.logprobs[1:]
        floats["advantages"][row, whole] = sequence.advantage
        floats["correct"][row, whole] = sequence.correct
    cut = {k: v.reshape(microbatches, rows, row_tokens) for k, v in (ints | floats).items()}
    return PackedBatch(**cut, num_microbatches=np.int32(-(-used // rows)))
