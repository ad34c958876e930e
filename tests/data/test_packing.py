"""Packing keeps every sequence and its columns whole, in any row and minibatch."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zerosearch_jax.data.packing import TokenSequence, pack, pack_minibatches, place
from zerosearch_jax.errors import UserError


def make_sequence(number, length):
    """Returns a sequence whose tokens encode its number and their positions."""
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
def test_a_packed_batch_holds_every_sequence_once(lengths, row_tokens, rows):
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
        padding = [0] * (row_tokens - len(sequence.tokens))
        assert targets.tolist() == [0, *sequence.tokens[1:], *padding]


@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.integers(1, 3))
def test_spread_and_unpack_are_inverses(lengths, rows):
    sequences = [make_sequence(number, length) for number, length in enumerate(lengths)]
    batch = pack(sequences, row_tokens=11, rows=rows, microbatches=None)
    targets = batch.targets > 0
    scores = 1.0 + np.arange(batch.tokens.size, dtype=np.float32).reshape(batch.tokens.shape)
    by_sequence = batch.unpack(scores)
    for row, length in zip(by_sequence, lengths, strict=True):
        assert row[0] == 0.0 and np.all(row[1:length] > 0) and not np.any(row[length:])
    np.testing.assert_array_equal(batch.spread(by_sequence), np.where(targets, scores, 0.0))
    # One value per sequence reaches all of its targets.
    numbers = batch.spread(np.arange(len(lengths), dtype=np.float32))
    expected = np.where(targets, batch.targets // 1000 - 1, 0)
    np.testing.assert_array_equal(numbers, expected)
    added = batch.with_columns(scores=scores)
    assert added.columns.keys() == {*batch.columns, "scores"} and "scores" not in batch.columns


@given(st.lists(st.integers(1, 10), max_size=20))
def test_first_fit_neither_overlaps_nor_wastes_rows(lengths):
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


def test_the_shape_is_fixed_and_used_microbatches_are_counted():
    sequences = [make_sequence(number, 8) for number in range(3)]
    batch = pack(sequences, row_tokens=8, rows=2, microbatches=5)
    assert batch.tokens.shape == (5, 2, 8)
    assert batch.num_microbatches == 2
    empty = pack([], row_tokens=8, rows=2, microbatches=1)
    assert empty.num_microbatches == 0 and empty.mask.sum() == 0


def test_a_sequences_first_token_is_no_target():
    sequence = TokenSequence([7, 8], [1.0, 0.0], {"old_logprobs": [-9.0, -1.0]})
    batch = pack([sequence], row_tokens=4, rows=1, microbatches=1)
    assert batch.mask.sum() == 0
    assert batch.targets[0, 0].tolist() == [8, 0, 0, 0]
    assert batch.columns["old_logprobs"][0, 0].tolist() == [-1.0, 0, 0, 0]


def test_sft_sequences_need_no_columns():
    batch = pack([TokenSequence([7, 8, 9], [0.0, 0.5, 1.0])], row_tokens=4, rows=1, microbatches=1)
    assert batch.mask[0, 0].tolist() == [0.5, 1.0, 0, 0]
    assert batch.columns == {}


def test_sequences_with_different_columns_are_refused():
    mixed = [TokenSequence([7, 8], [0, 1], {"advantages": [0, 1]}), TokenSequence([7], [0])]
    with pytest.raises(ValueError, match="advantages"):
        pack(mixed, row_tokens=4, rows=1, microbatches=1)


def test_sequences_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="9 tokens does not fit a row of 8.*learner.row_tokens"):
        pack([make_sequence(0, 9)], row_tokens=8, rows=1, microbatches=1)
    sequences = [make_sequence(number, 5) for number in range(3)]
    with pytest.raises(UserError, match="3 rows of 8 tokens.*1 microbatches of 2 rows"):
        pack(sequences, row_tokens=8, rows=2, microbatches=1)


def minibatches(count, size, key):
    """Packs numbered sequences into minibatches; returns the numbers in each."""
    sequences = [make_sequence(number, 2) for number in range(count)]
    packed = pack_minibatches(sequences, size, key=key, row_tokens=4, rows=2)
    for part, batch in zip(packed.parts, packed.batches, strict=True):
        assert batch.tokens.shape == packed.batches[0].tokens.shape
        np.testing.assert_array_equal(batch.unpack(batch.targets)[:, 1], 1000 * (part + 1) + 1)
    return [part.tolist() for part in packed.parts]


@settings(deadline=None)
@given(st.integers(0, 20), st.integers(1, 22), st.tuples(*[st.integers(0, 2**31)] * 3))
def test_minibatches_are_a_partition_in_which_only_the_last_is_smaller(count, size, key):
    numbers = minibatches(count, size, key)
    assert sorted(number for part in numbers for number in part) == list(range(count))
    assert all(len(part) == size for part in numbers[:-1])
    assert len(numbers[-1]) == (count - 1) % size + 1 if count else numbers == [[]]
    assert all(part == sorted(part) for part in numbers)


def test_a_single_minibatch_keeps_the_order():
    for key in ((0, 0, 0), (7, 3, 1)):
        assert minibatches(9, 9, key) == [list(range(9))]


def test_minibatches_depend_on_the_key_alone():
    keys = [(seed, step, epoch) for seed in (0, 1) for step in (0, 1) for epoch in (0, 1)]
    forwards = {key: minibatches(12, 4, key) for key in keys}
    state = np.random.get_state()[1].tolist()
    backwards = {key: minibatches(12, 4, key) for key in reversed(keys)}
    assert forwards == backwards
    assert np.random.get_state()[1].tolist() == state
    assert len({str(parts) for parts in forwards.values()}) == len(keys)


def test_columns_of_minibatches_are_in_the_order_of_the_sequences():
    sequences = [make_sequence(number, length) for number, length in enumerate((5, 2, 7, 3, 4))]
    packed = pack_minibatches(sequences, 3, key=(3,), row_tokens=8, rows=2)
    tables = packed.columns()
    assert tables.keys() == {"old_logprobs", "advantages"}
    for row, sequence in zip(tables["old_logprobs"], sequences, strict=True):
        assert row[: len(sequence.tokens)].tolist() == [0, *sequence.columns["old_logprobs"][1:]]
    doubled = packed.with_columns(twice=2 * tables["advantages"], number=np.arange(5.0))
    np.testing.assert_array_equal(doubled.column("twice"), 2 * tables["advantages"])
    numbers = [[0] + [n] * (len(s.tokens) - 1) for n, s in enumerate(sequences)]
    for row, expected in zip(doubled.column("number"), numbers, strict=True):
        assert row[: len(expected)].tolist() == expected
