"""Every packed sequence is found back whole, wherever it was put."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from zerosearch_jax.data.packing import TokenSequence, pack, place
from zerosearch_jax.errors import UserError


def make_sequence(number, length):
    """Tokens that tell their sequence and place, so that a mix-up shows."""
    tokens = [1000 * (number + 1) + i for i in range(length)]
    return TokenSequence(
        tokens=tokens,
        mask=[float((number + i) % 3 == 0) for i in range(length)],
        columns={
            "old_logprobs": [-0.5 * token for token in tokens],
            "advantages": [number - 1.5] * length,
        },
    )


def flat_rows(batch):
    return {k: v.reshape(-1, v.shape[-1]) for k, v in batch.arrays().items() if v.ndim}


@given(st.lists(st.integers(2, 12), max_size=12), st.integers(12, 30), st.integers(1, 4))
def test_every_sequence_is_found_back(lengths, row_tokens, rows):
    sequences = [make_sequence(number, length) for number, length in enumerate(lengths)]
    batch = pack(sequences, row_tokens=row_tokens, rows=rows, microbatches=None)
    assert batch.tokens.shape[1:] == (rows, row_tokens)
    found = []
    arrays = flat_rows(batch)
    for row in range(len(arrays["tokens"])):
        here = {name: array[row] for name, array in arrays.items()}
        for segment in range(1, here["segment_ids"].max(initial=0) + 1):
            (columns,) = np.nonzero(here["segment_ids"] == segment)
            assert np.all(np.diff(columns) == 1)
            number = here["tokens"][columns[0]] // 1000 - 1
            sequence = sequences[number]
            found.append(number)
            n = len(sequence.tokens)
            assert here["tokens"][columns].tolist() == sequence.tokens
            assert here["positions"][columns].tolist() == list(range(n))
            assert here["targets"][columns].tolist() == [*sequence.tokens[1:], 0]
            assert here["mask"][columns].tolist() == [*sequence.mask[1:], 0]
            for name, column in sequence.columns.items():
                assert here[name][columns].tolist() == [*column[1:], 0]
        padding = here["segment_ids"] == 0
        assert all(not array[padding].any() for array in here.values())
    assert sorted(found) == list(range(len(sequences)))
    used = arrays["segment_ids"].any(axis=1).sum()
    assert batch.num_microbatches == -(-used // rows) == len(batch.tokens)
    for sequence, targets in zip(sequences, batch.unpack(batch.targets), strict=True):
        assert targets.tolist() == [0, *sequence.tokens[1:]]


@given(st.lists(st.integers(1, 10), max_size=20))
def test_places_neither_overlap_nor_waste_rows(lengths):
    taken = {}
    for length, (row, offset) in zip(lengths, place(lengths, 10), strict=True):
        for column in range(offset, offset + length):
            assert 0 <= column < 10
            taken[row, column] = length
    assert len(taken) == sum(lengths)  # no place was taken twice
    rows = {row for row, _ in taken}
    assert rows == set(range(len(rows)))
    fill = [sum(r == row for r, _ in taken) for row in rows]
    assert all(a + b > 10 for i, a in enumerate(fill) for b in fill[i + 1 :])


def test_the_shape_is_fixed_and_says_what_is_used():
    sequences = [make_sequence(number, 8) for number in range(3)]
    batch = pack(sequences, row_tokens=8, rows=2, microbatches=5)
    assert batch.tokens.shape == (5, 2, 8)
    assert batch.num_microbatches == 2
    empty = pack([], row_tokens=8, rows=2, microbatches=1)
    assert empty.num_microbatches == 0 and empty.mask.sum() == 0


def test_the_prompts_first_token_is_nobodys_target():
    sequence = TokenSequence([7, 8], [1.0, 0.0], {"old_logprobs": [-9.0, -1.0]})
    batch = pack([sequence], row_tokens=4, rows=1, microbatches=1)
    assert batch.mask.sum() == 0
    assert batch.targets[0, 0].tolist() == [8, 0, 0, 0]
    assert batch.columns["old_logprobs"][0, 0].tolist() == [-1.0, 0, 0, 0]


def test_sft_sequences_need_no_columns():
    batch = pack([TokenSequence([7, 8, 9], [0.0, 0.5, 1.0])], row_tokens=4, rows=1, microbatches=1)
    assert batch.mask[0, 0].tolist() == [0.5, 1.0, 0, 0]
    assert batch.columns == {}


def test_sequences_of_one_batch_have_the_same_columns():
    mixed = [TokenSequence([7, 8], [0, 1], {"advantages": [0, 1]}), TokenSequence([7], [0])]
    with pytest.raises(ValueError, match="advantages"):
        pack(mixed, row_tokens=4, rows=1, microbatches=1)


def test_what_does_not_fit_is_refused():
    with pytest.raises(UserError, match="a sequence of 9 tokens does not fit a row of 8"):
        pack([make_sequence(0, 9)], row_tokens=8, rows=1, microbatches=1)
    sequences = [make_sequence(number, 5) for number in range(3)]
    with pytest.raises(UserError, match="3 packed rows do not fit 1 microbatches of 2"):
        pack(sequences, row_tokens=8, rows=2, microbatches=1)
