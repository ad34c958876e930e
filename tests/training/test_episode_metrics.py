"""Intervals and rewards of played episodes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict

from zerosearch_jax.rollout.trajectory import Episode, Trajectory, Turn
from zerosearch_jax.search.engine import SearchRequest, SearchResult
from zerosearch_jax.text.actions import parse_action
from zerosearch_jax.training.episode_metrics import answer_scores, bootstrap_interval, reward_of


def test_a_bootstrap_interval_is_that_of_the_mean():
    values = np.repeat([0.0, 1.0], 200)
    # The mean of 400 fair coins has a standard deviation of 1/40.
    low, high = bootstrap_interval(values)
    assert (low, high) == pytest.approx((0.5 - 1.96 / 40, 0.5 + 1.96 / 40), abs=0.006)
    assert bootstrap_interval(values) == (low, high)  # a fixed seed
    assert bootstrap_interval(values, seed=1) != (low, high)
    assert bootstrap_interval([]) == (0.0, 1.0)


@settings(deadline=None, max_examples=25)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=30))
def test_a_bootstrap_interval_lies_within_the_values(values):
    low, high = bootstrap_interval(values, resamples=50)
    assert min(values) - 1e-9 <= low <= high <= max(values) + 1e-9


def _trajectory(*texts: str, searches: int) -> Trajectory:
    trajectory = Trajectory(Episode(0, "q", ("Lima Peru",)))
    trajectory.turns += [Turn(text, parse_action(text)) for text in texts]
    request = SearchRequest(0, 0, "q", "q", ("Lima Peru",))
    trajectory.searches += [(request, SearchResult(request.key, ()))] * searches
    return trajectory


def test_a_reward_is_a_function_of_the_episode_the_step_and_the_config():
    searched = _trajectory(
        "<think>a</think><search>q</search>",
        "<think>b</think><answer>Lima</answer>",
        searches=1,
    )
    silent = _trajectory("<think>a</think>hm", searches=0)
    reward = ConfigDict(dict(rule="r1_searcher", name="f1", format_weight=0.0, stage_one_steps=2))
    assert [reward_of(searched, step, reward) for step in range(4)] == [
        1.0, 1.0, pytest.approx(2 / 3), pytest.approx(2 / 3)
    ]  # fmt: skip
    assert [reward_of(silent, step, reward) for step in range(4)] == [0.0, 0.0, -2.0, -2.0]
    reward.update(dict(rule="answer", name="em", format_weight=0.5))
    assert [reward_of(t, 0, reward) for t in (searched, silent)] == [0.5, 0.0]
    # What is reported does not depend on the rule.
    assert answer_scores([searched, silent], "f1") == [pytest.approx(2 / 3), 0.0]
    assert answer_scores([searched, silent], "em") == [0.0, 0.0]
