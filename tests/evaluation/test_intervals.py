"""Tests of the confidence intervals."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zerosearch_jax.evaluation.intervals import bootstrap_interval, wilson_interval


def test_wilson_interval_by_hand():
    # Wilson's formula at n = 10, p = 0.5, z = 1.96: (0.5 + 0.19208 ± 0.36459) / 1.38416.
    assert wilson_interval(5, 10) == pytest.approx((0.23659, 0.76341), abs=1e-4)
    # With 0 or n successes, the far end is z² / (n + z²) away.
    assert wilson_interval(0, 10) == pytest.approx((0.0, 0.27753), abs=1e-4)
    assert wilson_interval(10, 10) == pytest.approx((0.72247, 1.0), abs=1e-4)
    assert wilson_interval(0, 0) == (0.0, 1.0)


def test_bootstrap_interval_covers_the_mean():
    values = np.repeat([0.0, 1.0], 200)
    # The mean of 400 fair coins has a standard deviation of 1/40.
    low, high = bootstrap_interval(values)
    assert (low, high) == pytest.approx((0.5 - 1.96 / 40, 0.5 + 1.96 / 40), abs=0.006)


def test_bootstrap_interval_depends_only_on_values_and_seed():
    values = np.repeat([0.0, 1.0], 200)
    assert bootstrap_interval(values) == bootstrap_interval(values)
    assert bootstrap_interval(values, seed=1) != bootstrap_interval(values)


def test_bootstrap_interval_of_none_or_one_value():
    assert bootstrap_interval([]) == (0.0, 1.0)
    assert bootstrap_interval([0.25]) == (0.25, 0.25)


@settings(deadline=None, max_examples=25)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=30))
def test_bootstrap_interval_is_within_the_values(values):
    low, high = bootstrap_interval(values, resamples=50)
    assert min(values) - 1e-9 <= low <= high <= max(values) + 1e-9
