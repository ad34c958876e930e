"""A step's rows: each at most once per epoch, and the same in every run."""

import pytest

from zerosearch_jax.errors import UserError
from zerosearch_jax.training.row_sampler import RowSampler


def test_every_epoch_draws_each_row_once_in_another_order():
    draws = [RowSampler(list("abcdefghijkl"), 4, 0, "size").draw(step) for step in range(6)]
    first, second = sum(draws[:3], []), sum(draws[3:], [])
    assert sorted(first) == sorted(second) == list("abcdefghijkl")
    assert first != second


def test_rows_too_few_for_a_step_are_left_out_of_the_epoch():
    sampler = RowSampler(range(7), 3, 0, "size")
    drawn = sampler.draw(0) + sampler.draw(1)
    assert len(set(drawn)) == 6
    assert set(drawn) != set(sampler.draw(2) + sampler.draw(3))  # another row is left out


def test_draws_depend_on_seed_and_step_alone():
    """Other draws than these would break resuming of existing runs."""
    assert RowSampler(range(10), 4, 0, "size").draw(0) == [4, 6, 2, 7]
    assert RowSampler(range(10), 4, 0, "size").draw(3) == [7, 6, 0, 4]
    assert RowSampler(range(10), 4, 1, "size").draw(0) == [8, 4, 7, 0]


def test_too_few_rows_are_refused():
    with pytest.raises(UserError, match="config.a.size=8 is more than the 7 rows"):
        RowSampler(range(7), 8, 0, "config.a.size")
    assert len(RowSampler(range(7), 7, 0, "config.a.size").draw(5)) == 7
