"""Compares the stop automaton with a substring search in the joined bytes."""

import tracemalloc
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from zerosearch_jax.errors import UserError
from zerosearch_jax.generate.stops import build_stop_table, check_spellable
from zerosearch_jax.text.tokenizer import decode, encode, token_bytes

PIECES = st.text(alphabet="abé", max_size=4)
STOPS = st.lists(st.text(alphabet="abé", min_size=1, max_size=5), max_size=4)


def stopped_after(table, ids):
    """Returns for every prefix of `ids` whether the automaton accepts it."""
    state, seen = 0, []
    for token in ids:
        state = int(table[state, token])
        seen.append(state == len(table) - 1)
    return seen


@given(st.lists(PIECES, min_size=1, max_size=6), STOPS, st.data())
def test_accepts_exactly_if_a_stop_string_was_written(pieces, stops, data):
    vocabulary = [piece.encode() for piece in pieces]
    ids = data.draw(st.lists(st.integers(0, len(vocabulary) - 1), max_size=14))
    written, expected = b"", []
    for token in ids:
        written += vocabulary[token]
        expected.append(any(stop.encode() in written for stop in stops))
    assert stopped_after(build_stop_table(vocabulary, stops), ids) == expected


def test_a_stop_string_inside_another_is_detected():
    table = build_stop_table([b"a", b"b", b"c", b"d"], ["abcd", "bc"])
    assert stopped_after(table, [0, 1, 2]) == [False, False, True]


def test_a_tag_may_span_tokens_and_end_inside_one():
    vocabulary = [b"x</", b"sea", b"rch", b">\n", b"", b"</s", b">"]
    table = build_stop_table(vocabulary, ["</search>", "</answer>"])
    assert stopped_after(table, [0, 1, 2, 3]) == [False, False, False, True]
    assert stopped_after(table, [0, 1, 4, 2, 6]) == [False] * 4 + [True]  # b"" keeps the state
    assert stopped_after(table, [0, 1, 1, 2, 6]) == [False] * 5
    # A tag that follows a partial match is detected: "x</sea</search>".
    table = build_stop_table([b"x</sea", b"</sea", b"rch>", b"y"], ["</search>"])
    assert stopped_after(table, [0, 1, 2, 3, 0]) == [False, False, True, True, True]


def test_without_stop_strings_the_table_never_accepts():
    table = build_stop_table([b"a", b"bb", b""], [])
    assert table.shape == (2, 3)
    assert table.dtype == np.int16
    assert stopped_after(table, [0, 1, 2, 0]) == [False] * 4


@given(
    st.lists(st.text(alphabet="ab", max_size=3), min_size=1, max_size=4),
    st.text(alphabet="abc", min_size=1, max_size=4),
)
def test_a_stop_string_is_refused_exactly_if_no_tokens_spell_it(pieces, stop):
    """Every token of a shortest spelling adds a byte of the string, so `len(stop)` suffice."""
    vocabulary = [piece.encode() for piece in pieces]
    spelled = any(stop in "".join(tokens) for tokens in product(pieces, repeat=len(stop)))
    if spelled:
        check_spellable(vocabulary, [stop])
    else:
        with pytest.raises(UserError, match="cannot spell"):
            check_spellable(vocabulary, [stop])


def test_an_unspellable_stop_string_names_the_bytes_that_no_token_continues_with():
    with pytest.raises(UserError, match=r"the vocab cannot spell 'Doc 6'.*b'Doc'.*b' 6'"):
        check_spellable([b"Doc", b"6", b""], ["6Doc", "Doc 6"], "the vocab")


def test_an_empty_stop_string_raises():
    with pytest.raises(ValueError, match="empty"):
        build_stop_table([b"a"], ["a", ""])


def test_tags_are_detected_with_a_real_tokenizer(tiny_tokenizer):
    pieces = token_bytes(tiny_tokenizer)
    table = build_stop_table(pieces, ["</search>", "</answer>"])
    for text in ("<think> a </think>\n<search> b </search>", "<answer> </search </answer>"):
        ids = encode(tiny_tokenizer, text)
        assert stopped_after(table, ids) == [False] * (len(ids) - 1) + [True]
        byte_by_byte = [pieces.index(bytes([byte])) for byte in text.encode()]
        assert decode(tiny_tokenizer, byte_by_byte) == text
        assert stopped_after(table, byte_by_byte) == [False] * (len(text) - 1) + [True]
    assert not any(stopped_after(table, encode(tiny_tokenizer, "< /search> </ answer>")))


def test_one_long_token_makes_no_table_of_its_length_times_the_vocabulary():
    vocabulary = [bytes([i % 256]) for i in range(20_000)] + [b"x" * 4000 + b"</search>"]
    tracemalloc.start()
    table = build_stop_table(vocabulary, ["</search>"])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert table[0, -1] == len(table) - 1
    assert peak < 10_000_000
