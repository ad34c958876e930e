"""Steps and evaluations that teach nothing are explained, once per cause."""

from types import SimpleNamespace

import numpy as np
import pytest

from zerosearch_jax.search.engine import SearchResult
from zerosearch_jax.training.no_signal import Notices, failed_searches, no_signal, unanswered

ANSWERED = dict(finish_ratio=1.0, invalid_ratio=0.0, truncated_ratio=0.0, failed_search_ratio=0.0)
SILENT = ANSWERED | dict(finish_ratio=0.0, em=0.0)


def _config(estimator="grpo", baseline="group_mean", overlong="keep"):
    return SimpleNamespace(
        advantage=SimpleNamespace(estimator=estimator, baseline=baseline),
        rl=SimpleNamespace(overlong=overlong),
    )


@pytest.mark.parametrize(
    ("metrics", "cause"),
    [
        (ANSWERED, None),
        (SILENT | dict(finish_ratio=0.01, invalid_ratio=0.99), None),
        (SILENT | dict(invalid_ratio=1.0), "the format"),
        (SILENT | dict(truncated_ratio=0.75, invalid_ratio=0.8), "limits.response_tokens"),
        (SILENT | dict(failed_search_ratio=1.0, truncated_ratio=1.0), "search engine"),
        (SILENT | dict(invalid_ratio=0.2), "limits.max_turns"),
    ],
)
def test_episodes_without_an_answer_are_explained(metrics, cause):
    reason = unanswered(metrics, "limits")
    assert (reason is None) == (cause is None)
    assert cause is None or cause in reason[1]


def test_the_first_failed_searches_of_each_kind_are_noted(capsys):
    def episodes(*kinds):
        results = [
            SearchResult((0, 0), (), kind and "POST /x: no", kind, kind and "http://h/x")
            for kind in kinds
        ]
        return [SimpleNamespace(searches=[(None, result) for result in results])]

    assert failed_searches(episodes("", "too_long")) is None
    notices = Notices()
    for step, kinds in enumerate([("timeout", ""), ("timeout",), ("http_5xx", "timeout")]):
        notices.show(f"step {step}", failed_searches(episodes(*kinds)))
    lines = capsys.readouterr().out.split("note: ")[1:]
    assert [line[:7] for line in lines] == ["step 0:", "step 2:"]
    assert "1 of 2 searches failed" in lines[0] and "http://h/x" in lines[0]
    assert "timeout 1, http_5xx 1" in lines[1]


EQUAL, MIXED = [[0.5, 0.5], [0.5, 0.5]], [[1.0, 1.0], [0.0, 0.0]]


@pytest.mark.parametrize(
    ("config", "em", "rewards", "remedy"),
    [
        (_config(), 0.5, [[1.0, 0.0], [0.0, 0.0]], None),
        (_config(), 0.5, MIXED, "rollout.max_rounds"),
        (_config(), 0.0, EQUAL, "reward.name"),
        (_config(), 1.0, [[1.0, 1.0]], "harder questions"),
        (_config("reinforce"), 0.5, MIXED, "rollout.group_size"),
        # These estimators compare an episode with the whole batch.
        (_config("reinforce", "batch_mean"), 0.5, MIXED, None),
        (_config("ppo"), 0.5, MIXED, None),
        (_config("ppo"), 0.0, EQUAL, "reward.name"),
        # The reward is the advantage.
        (_config("reinforce", "none"), 0.0, EQUAL, None),
        (_config("reinforce", "none"), 0.0, [[0.0, 0.0]], "reward.name"),
        (_config("grpo"), 0.0, [[0.5], [0.5]], None),
    ],
)
def test_a_step_without_a_signal_names_the_keys_to_change(config, em, rewards, remedy):
    reason = no_signal(config, ANSWERED | dict(em=em), np.array(rewards))
    assert (reason is None) == (remedy is None)
    assert remedy is None or remedy in reason[1]


def test_masked_episodes_teach_nothing_even_with_unequal_rewards():
    cut = SILENT | dict(truncated_ratio=1.0)
    rewards = np.array([[1.0, 0.0]])
    assert no_signal(_config(), cut, rewards) is None
    assert "rl.overlong=mask" in no_signal(_config(overlong="mask"), cut, rewards)[1]


def test_a_step_without_answers_gets_the_cause_of_the_missing_answers():
    zeros = np.zeros((2, 2))
    assert "the format" in no_signal(_config(), SILENT | dict(invalid_ratio=1.0), zeros)[1]
    # A reward for the format is a signal.
    assert no_signal(_config(), SILENT | dict(invalid_ratio=0.5), zeros + [0.0, 0.1]) is None


def test_each_cause_is_printed_once_whatever_its_numbers(capsys):
    notices = Notices()
    for step, invalid in enumerate((0.9, 1.0, 0.2, 0.8)):
        notices.show(f"step {step}", unanswered(SILENT | dict(invalid_ratio=invalid), "rollout"))
    notices.show("step 9", None)
    printed = capsys.readouterr().out
    assert [where in printed for where in ("step 0", "step 1", "step 2", "step 3", "step 9")] == (
        [True, False, True, False, False]
    )
