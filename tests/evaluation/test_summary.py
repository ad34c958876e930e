"""Tests of the evaluation summary and its table."""

import pytest

from zerosearch_jax.evaluation.intervals import bootstrap_interval, wilson_interval
from zerosearch_jax.evaluation.summary import summary, text_table
from zerosearch_jax.rollout.trajectory import Episode, Trajectory, Turn
from zerosearch_jax.search.engine import SearchRequest, SearchResult
from zerosearch_jax.text.actions import parse_action


def _trajectory(answer: str, failures: tuple[str, ...]) -> Trajectory:
    trajectory = Trajectory(Episode(0, "q", ("Lima Peru",)))
    text = f"<answer>{answer}</answer>"
    trajectory.turns.append(Turn(text, parse_action(text)))
    for turn, failure in enumerate(failures):
        request = SearchRequest(0, turn, "q", "q", ("Lima Peru",))
        trajectory.searches.append((request, SearchResult(request.key, (), failure, failure)))
    return trajectory


def test_summary_holds_scores_intervals_and_searches():
    found = summary([_trajectory("Lima Peru", ("", "timeout")), _trajectory("Lima", ())])
    assert found["em"] == 0.5
    assert found["em_interval"] == list(wilson_interval(1, 2))
    assert found["f1"] == pytest.approx((1 + 2 / 3) / 2)
    assert found["f1_interval"] == pytest.approx(list(bootstrap_interval([1.0, 2 / 3])))
    assert found["questions"] == 2
    assert found["searches_per_episode"] == 1.0
    assert found["failed_search_ratio"] == 0.5
    assert found["failed_searches"] == {"timeout": 1}


def test_text_table_has_a_line_per_name_and_lists_failed_searches():
    row = dict(em=0.5, em_interval=[0.25, 0.75], f1=1 / 3, f1_interval=[0.0, 1.0], questions=12)
    row |= dict(searches_per_episode=1.5, failed_search_ratio=0.0)
    text = text_table(
        {
            "base": row,
            "2024": row | {"failed_search_ratio": 0.25, "failed_searches": {"timeout": 3}},
        },
        "world/test",
    )
    title, header, base, other, failed = text.splitlines()
    assert title == "world/test"
    assert header.split() == [
        "EM", "95%", "interval", "F1", "95%", "interval", "searches", "questions"
    ]  # fmt: skip
    cells = ["0.500", "[0.250,", "0.750]", "0.333", "[0.000,", "1.000]", "1.50", "12"]
    assert base.split() == ["base", *cells]
    assert other.split() == ["2024", *cells]
    assert failed.startswith("2024") and "25.0%" in failed and "timeout 3" in failed
