"""Tests of episode rewards, scores and metrics."""

import pytest
from ml_collections import ConfigDict

from zerosearch_jax.rollout.trajectory import Episode, Trajectory, Turn
from zerosearch_jax.search.engine import (
    SearchRequest,
    SearchResult,
    describe_failures,
    failure_counts,
)
from zerosearch_jax.telemetry.metrics import EPISODE_METRICS
from zerosearch_jax.text.actions import parse_action
from zerosearch_jax.training.episode_metrics import answer_scores, episode_metrics, reward_of


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


def test_episode_metrics_by_hand():
    episode = Episode(0, "q", ("N'Djamena",))
    right, wrong = Trajectory(episode), Trajectory(episode)
    right.append_inserted([1, 2])
    for text in ("<search> a </search>", "<answer> n'djamena. </answer>"):
        right.append_sampled([3, 4], [-1.0, -1.0])
        right.turns.append(Turn(text, parse_action(text)))
    request = SearchRequest(0, 0, "a", "q", episode.golden_answers, noisy=False)
    right.searches.append((request, SearchResult(request.key, (), "Timeout", "timeout")))
    right.finish = "answer"
    wrong.append_sampled([5], [-1.0])
    wrong.turns.append(Turn("hm", parse_action("hm")))
    wrong.finish = "length"
    metrics = episode_metrics([right, wrong])
    assert metrics.keys() == {*EPISODE_METRICS, "failed_searches/timeout"}
    assert metrics == {
        "failed_searches/timeout": 1.0,
        "em": 0.5,
        "f1": 0.5,
        "cover_em": 0.5,
        "searches_per_episode": 0.5,
        "finish_ratio": 0.5,
        "invalid_ratio": pytest.approx(1 / 3),
        "truncated_ratio": 0.5,
        "failed_search_ratio": 1.0,
        "policy_tokens_per_episode": 2.5,
        "tokens_per_episode": 3.5,
    }


def test_failures_are_counted_by_kind_and_described_with_their_addresses():
    url = "http://10.0.0.1:8000/retrieve"
    results = [
        SearchResult((0, 0), ("a",)),
        SearchResult((0, 1), (), "POST /retrieve: HTTP 500", "http_5xx", url),
        SearchResult((0, 2), (), "POST /retrieve: Timeout", "timeout", url),
        SearchResult((0, 3), (), "POST /retrieve: Timeout", "timeout", url),
        SearchResult((0, 4), (), "an engine of a user"),
    ]
    assert failure_counts(results) == {"timeout": 2, "http_5xx": 1, "other": 1}
    text = describe_failures(results)
    assert text.startswith("POST /retrieve: Timeout;") and text.count(url) == 1
    assert "timeout 2, http_5xx 1, other 1" in text
