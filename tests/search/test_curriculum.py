"""Tests of the curriculum: the probability of noise and the draws."""

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zerosearch_jax.errors import UserError
from zerosearch_jax.search.curriculum import draw_noisy, noise_probability

probabilities = st.floats(0, 1)


def test_noise_probability_matches_values_computed_by_hand():
    # b=4, i/m=1/2: (4^0.5 - 1) / (4 - 1) = 1/3 of the way from 0 to 0.6.
    assert noise_probability(50, 100, start=0.0, end=0.6) == pytest.approx(0.2)
    # b=9, i/m=1/2: (3 - 1) / (9 - 1) = 1/4 of the way from 0.25 to 0.75.
    assert noise_probability(1, 2, start=0.25, end=0.75, base=9) == pytest.approx(0.375)
    # Reversed, from 0.6 to 0.
    assert noise_probability(50, 100, start=0.6, end=0.0) == pytest.approx(0.4)
    # Base 1 is a straight line, base 1/4 is early noise: (1/2 - 1) / (1/4 - 1) = 2/3.
    assert noise_probability(25, 100, start=0.0, end=0.8, base=1) == pytest.approx(0.2)
    assert noise_probability(1, 2, start=0.0, end=0.6, base=0.25) == pytest.approx(0.4)


@given(probabilities, probabilities, st.sampled_from([0.1, 1.0, 1 + 1e-12, 4.0, 50.0]))
def test_ends_are_exact_and_the_path_is_monotone(start, end, base):
    path = [noise_probability(i, 20, start=start, end=end, base=base) for i in range(21)]
    assert path[0] == start and path[-1] == pytest.approx(end, abs=1e-15)
    rising = [(b - a) * (1 if end >= start else -1) for a, b in zip(path, path[1:], strict=False)]
    assert min(rising) >= -1e-15
    assert all(0 <= p <= 1 for p in path)


def test_base_close_to_one_is_close_to_linear():
    assert noise_probability(3, 10, start=0, end=1, base=1 + 1e-13) == pytest.approx(0.3, abs=1e-9)


@pytest.mark.parametrize(
    "change, names",
    [
        ({"step": -1}, "step -1"),
        ({"step": 11}, "step 11"),
        ({"total_steps": 0, "step": 0}, "total_steps"),
        ({"start": 1.5}, "start is 1.5"),
        ({"end": -0.1}, "end is -0.1"),
        ({"end": float("nan")}, "end is nan"),
        ({"base": 0.0}, "base is 0.0"),
        ({"base": float("inf")}, "base is inf"),
    ],
)
def test_values_out_of_range_are_refused(change, names):
    values = {"step": 1, "total_steps": 10, "start": 0.0, "end": 0.5, "base": 4.0} | change
    step, total_steps = values.pop("step"), values.pop("total_steps")
    with pytest.raises(UserError, match=names):
        noise_probability(step, total_steps, **values)
    with pytest.raises(UserError, match="probability is 2"):
        draw_noisy(0, 0, 0, 0, 2)


def test_share_of_noisy_draws_approaches_the_probability():
    # 4000 draws: the standard error of the share is below 0.008.
    for p in (0.1, 0.5, 0.75):
        share = sum(draw_noisy(1, i // 100, i % 100, 0, p) for i in range(4000)) / 4000
        assert share == pytest.approx(p, abs=0.03)


def test_probabilities_zero_and_one_are_certain():
    assert not any(draw_noisy(0, 0, i, 0, 0.0) for i in range(200))
    assert all(draw_noisy(0, 0, i, 0, 1.0) for i in range(200))


def test_seed_step_episode_and_turn_all_change_the_draws():
    def draws(**fixed):
        base = {"seed": 3, "step": 3, "episode": 3, "turn": 3}
        varied = next(name for name in base if name not in fixed)
        return [draw_noisy(**(base | fixed | {varied: i}), probability=0.5) for i in range(64)]

    patterns = [
        tuple(draws(**{k: 3 for k in ("seed", "step", "episode", "turn") if k != varied}))
        for varied in ("seed", "step", "episode", "turn")
    ]
    assert len(set(patterns)) == 4
    assert all(0 < sum(pattern) < 64 for pattern in patterns)
    # The key is not a concatenation of digits: (1, 23) and (12, 3) differ.
    assert [draw_noisy(0, 1, 20 + i, 0, 0.5) for i in range(64)] != [
        draw_noisy(0, 12, i, 0, 0.5) for i in range(64)
    ]


@given(st.integers(0, 10**6), st.integers(0, 500), probabilities, probabilities)
def test_noisy_draw_stays_noisy_when_the_probability_rises(episode, step, p, q):
    low, high = min(p, q), max(p, q)
    assert draw_noisy(0, step, episode, 1, low) <= draw_noisy(0, step, episode, 1, high)


def test_draw_is_the_same_in_another_process():
    program = (
        "from zerosearch_jax.search.curriculum import draw_noisy\n"
        "print([int(draw_noisy(7, 2, i, 1, 0.5)) for i in range(32)])"
    )
    out = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert out.stdout.strip() == str([int(draw_noisy(7, 2, i, 1, 0.5)) for i in range(32)])
