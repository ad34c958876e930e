"""The claims: hand-computed statistics, a slow bootstrap, invariants, and the rows."""

import dataclasses
import random
import statistics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from zerosearch_jax.errors import UserError
from zerosearch_jax.experiments.claims import (
    CLAIMS,
    MARGIN,
    Claim,
    evaluate_claims,
    mean_interval,
    paired_difference,
    verdict,
)

BETTER = Claim("x", "text", ">", "a", "b")
NO_WORSE = dataclasses.replace(BETTER, kind=">=")
EXACT_MATCHES = st.tuples(st.integers(1, 4), st.integers(1, 12)).flatmap(
    lambda shape: st.tuples(*[hnp.arrays(np.int64, shape, elements=st.integers(0, 1))] * 2)
)


def test_mean_interval_by_hand():
    # 4.302653 is the 97.5% quantile of Student's t with 2 degrees of freedom (any table).
    mean, low, high = mean_interval([0.4, 0.5, 0.6])
    assert mean == pytest.approx(0.5)
    assert high - mean == pytest.approx(4.302653 * 0.1 / 3**0.5, rel=1e-6)
    assert mean - low == pytest.approx(high - mean)
    assert mean_interval([0.1, 0.5, 0.9])[1:] == (0.0, 1.0)  # wider than where scores can be
    assert mean_interval([0.3]) == (0.3, None, None)
    with pytest.raises(ValueError, match="S >= 1"):
        mean_interval([])


def test_paired_difference_by_hand():
    a = [[1, 1, 0, 1], [1, 0, 0, 1]]
    b = [[0, 1, 0, 0], [1, 0, 1, 0]]
    assert paired_difference(a, b)[0] == pytest.approx((1 + 0 + 0 + 1 + 0 + 0 - 1 + 1) / 8)


def test_bootstrap_resamples_both_arms_alike():
    """A constant difference has a zero-width interval, whatever the spread within the arms."""
    b = np.random.default_rng(0).random((3, 40))
    assert paired_difference(b + 0.125, b) == pytest.approx((0.125,) * 3)


def test_repeated_seeds_do_not_narrow_the_interval():
    """Identical seeds carry no more information on the questions than one seed does."""
    difference = np.random.default_rng(1).normal(size=(1, 400))
    one = paired_difference(difference, np.zeros((1, 400)), 6000)
    five = paired_difference(np.repeat(difference, 5, 0), np.zeros((5, 400)), 6000)
    expected = 2 * 1.959964 * difference.std() / 400**0.5
    assert one[2] - one[1] == pytest.approx(expected, rel=0.05)
    assert five[2] - five[1] == pytest.approx(expected, rel=0.05)


def test_bootstrap_resamples_seeds():
    """Without spread between questions, the draws of two seeds are 00, 01, 10 and 11."""
    a = np.array([[0.0] * 30, [0.5] * 30])
    assert paired_difference(a, np.zeros_like(a)) == pytest.approx((0.25, 0.0, 0.5))


def test_bootstrap_equals_a_slow_reference():
    rng = np.random.default_rng(2)
    skill = rng.random(80)
    a = (rng.random((3, 80)) < skill + np.array([[0.1], [0.2], [0.0]])).astype(int)
    b = (rng.random((3, 80)) < skill).astype(int)
    draw = random.Random(5)
    means = []
    for _ in range(3000):
        seeds = draw.choices(range(3), k=3)
        questions = draw.choices(range(80), k=80)
        difference = [int(a[s, q]) - int(b[s, q]) for s in seeds for q in questions]
        means.append(sum(difference) / len(difference))
    cuts = statistics.quantiles(means, n=40)
    mean, low, high = paired_difference(a, b, 10_000)
    assert mean == pytest.approx(a.mean() - b.mean())
    assert (low, high) == pytest.approx((cuts[0], cuts[-1]), abs=0.015)
    assert high - low > 0.15  # ten times the tolerance


@settings(deadline=None, max_examples=60)
@given(arms=EXACT_MATCHES)
def test_interval_contains_the_mean_and_swapping_mirrors_it(arms):
    a, b = arms
    mean, low, high = paired_difference(a, b, 500)
    assert low - 1e-12 <= mean <= high + 1e-12
    assert paired_difference(b, a, 500) == pytest.approx((-mean, -high, -low), abs=1e-12)
    opposite = {"holds": "does not hold", "does not hold": "holds", "undecided": "undecided"}
    swapped = verdict(-high, -low, claim=BETTER)
    assert swapped == opposite[verdict(low, high, claim=BETTER)]


@settings(deadline=None, max_examples=20)
@given(arms=EXACT_MATCHES)
def test_identical_arms_are_undecided_and_not_worse(arms):
    _, low, high = paired_difference(arms[0], arms[0], 200)
    assert verdict(low, high, claim=BETTER) == "undecided"
    assert verdict(low, high, claim=NO_WORSE) == "holds"


@settings(deadline=None, max_examples=60)
@given(means=st.lists(st.floats(0, 1), min_size=2, max_size=6))
def test_mean_interval_contains_the_mean(means):
    mean, low, high = mean_interval(means)
    assert low <= mean <= high
    assert mean == pytest.approx(statistics.fmean(means))


@pytest.mark.parametrize("shape", [(2, 5), (3, 4), (0, 5), (5,)])
def test_mismatched_shapes_are_refused(shape):
    with pytest.raises(ValueError, match=r"must both be \[S, Q\]"):
        paired_difference(np.zeros(shape), np.zeros((3, 5) if len(shape) == 2 else shape))


@pytest.mark.parametrize(
    ("low", "high", "better", "no_worse"),
    [
        (0.01, 0.10, "holds", "holds"),
        (0.00, 0.10, "undecided", "holds"),
        (-0.04, -0.01, "does not hold", "holds"),
        (-0.05, 0.10, "undecided", "undecided"),
        (-0.08, -0.02, "does not hold", "undecided"),
        (-0.10, -0.06, "does not hold", "does not hold"),
    ],
)
def test_verdict_by_interval(low, high, better, no_worse):
    assert MARGIN == 0.05
    assert verdict(low, high, claim=BETTER) == better
    assert verdict(low, high, claim=NO_WORSE) == no_worse


def _run(arm: str, seed: int, matches: list[int], **noise: list[int]) -> dict:
    return {"arm": arm, "seed": seed, "em": matches, "noise": noise}


def _rows(runs: list[dict]) -> dict[str, dict]:
    return {row["claim"]: row for row in evaluate_claims(runs)}


def test_every_claim_has_a_row_and_claims_without_runs_are_not_run():
    assert [row["claim"] for row in evaluate_claims([])] == [claim.name for claim in CLAIMS]
    assert {row["verdict"] for row in evaluate_claims([])} == {"not run"}
    assert {claim.name[0] for claim in CLAIMS} == set("abcde")
    row = _rows([_run("zerosearch", 0, [1, 0]), _run("real_engine", 1, [1, 0])])["a"]
    assert row["verdict"] == "not run" and row["seeds"] == [] and row["difference"] is None


def test_claims_compare_the_seeds_that_both_arms_have():
    runs = [
        _run("zerosearch", 2, [1] * 10),
        _run("zerosearch", 0, [1] * 10),
        _run("zerosearch", 1, [0] * 10),
        _run("prompted_simulator", 0, [0] * 10),
        _run("prompted_simulator", 2, [0, 1] * 5),
    ]
    row = _rows(runs)["b"]
    assert row["seeds"] == [0, 2]
    assert row["means"] == [1.0, 0.25]
    assert row["difference"] == pytest.approx(0.75)
    assert row["interval"][0] > 0 and row["verdict"] == "holds"
    assert _rows(runs)["a"]["verdict"] == "not run"


def test_the_base_policy_is_compared_with_every_seed():
    runs = [_run("reinforce", seed, [1, 1, 1, 0]) for seed in (4, 5)]
    row = _rows([*runs, _run("base", 0, [0, 0, 1, 0])])["e2"]
    assert (row["seeds"], row["means"]) == ([4, 5], [0.75, 0.25])
    trained = [_run("zerosearch", seed, [1, 1, 1, 0]) for seed in (4, 5)]
    assert _rows([*trained, _run("real_engine", 0, [0] * 4)])["a"]["verdict"] == "not run"


def test_noise_claims_use_the_scores_under_noise():
    runs = [
        _run("zerosearch", 0, [0] * 8, **{"0.75": [1] * 8}),
        _run("constant_noise", 0, [1] * 8, **{"0.75": [0] * 8}),
    ]
    rows = _rows(runs)
    assert (rows["c1"]["verdict"], rows["c3"]["verdict"]) == ("does not hold", "holds")
    assert rows["c3"]["noise"] == "0.75" and rows["c1"]["noise"] is None
    del runs[1]["noise"]
    assert _rows(runs)["c3"]["verdict"] == "not run"


def test_incomparable_arm_runs_are_refused():
    runs = [_run("zerosearch", 0, [1, 0]), _run("real_engine", 0, [1, 0, 1])]
    with pytest.raises(UserError, match=r"zerosearch and real_engine .*\[2, 3\]"):
        evaluate_claims(runs)
    with pytest.raises(UserError, match="arm zerosearch, seed 0 occurs twice"):
        evaluate_claims([runs[0], runs[0]])
