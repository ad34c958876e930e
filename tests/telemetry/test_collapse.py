"""Tests of the collapse signals against steps computed by hand and against a reference."""

import json
import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zerosearch_jax.errors import UserError
from zerosearch_jax.telemetry.collapse import ALARM_AT, SIGNALS, CollapseWatch
from zerosearch_jax.telemetry.recorder import Recorder, earlier_rows

NAN = float("nan")


def _columns(**metrics: list[float | None]) -> list[dict[str, float]]:
    """Converts columns of metrics to rows; None is a missing entry."""
    names = list(metrics)
    return [
        {name: value for name, value in zip(names, values, strict=True) if value is not None}
        for values in zip(*metrics.values(), strict=True)
    ]


def _steps_on(watch: CollapseWatch, signal: str, rows: list[dict[str, float]]) -> list[int]:
    """Returns the steps, counted from 1, in which the signal holds."""
    return [
        step
        for step, row in enumerate(rows, start=1)
        if watch.update(row)[f"collapse/{signal}"] == 1.0
    ]


# Windows of 2; means of steps (3, 4), (4, 5), … : -0.25, -0.3125, -0.4375, -0.5, -0.5.
FALLING = [-0.25, -0.25, -0.25, -0.25, -0.375, -0.5, -0.5, -0.5]


@pytest.mark.parametrize(
    ("reward", "expected"),
    [
        ([0.5] * 8, [6, 7]),
        ([0.5] * 4 + [0.75] * 4, [6, 7]),
        ([0.5] * 4 + [0.46] * 4, [6, 7]),  # 8 % less: noise
        ([0.5] * 4 + [0.25] * 4, []),
    ],
)
def test_correct_loglik_signal_needs_a_large_fall_and_a_steady_reward(reward, expected):
    watch = CollapseWatch(window=2, loglik_fall=0.125)
    rows = _columns(correct_loglik=FALLING, reward=reward)
    assert _steps_on(watch, "correct_loglik_falls", rows) == expected


def test_fall_of_exactly_the_threshold_gives_no_signal():
    watch = CollapseWatch(window=1, loglik_fall=0.125)
    rows = _columns(correct_loglik=[-0.25, -0.375, -0.75], reward=[0.5] * 3)
    assert _steps_on(watch, "correct_loglik_falls", rows) == [3]


@pytest.mark.parametrize(
    ("entropy", "expected"),
    [
        # Step 8: 1.25 after 1, 1. Step 9: 1.375 after 1.0625, 1. Step 10: 1.375 after 1.25, 1.
        ([1.0] * 6 + [1.125, 1.375, 1.375, 1.375], [8, 9]),
        ([0.25 * step for step in range(12)], []),  # fast, but not faster
        ([4.0, 3.0, 2.0, 1.0] + [1.0] * 6, []),  # the end of a fall is no rise
        ([1.0, 1.0, 1.0, 1.0, 3.0, 3.0], [6]),  # three windows are needed
        ([float(2**step) for step in range(10)], [6, 7, 8, 9, 10]),
    ],
)
def test_entropy_signal_needs_a_growing_rise(entropy, expected):
    watch = CollapseWatch(window=2, entropy_rise=0.125)
    assert _steps_on(watch, "entropy_accelerates", _columns(entropy=entropy)) == expected


@pytest.mark.parametrize(
    ("grad_norm", "expected"),
    [
        # One spike (9) changes no median; at step 7, two of the newest three are large.
        ([1.0, 2.0, 1.0, 1.0, 9.0, 1.0, 3.0, 3.0, 1.0, 3.0], [7, 8, 9]),
        ([1.0] * 3 + [2.0] * 3, []),  # twice is not more than twice
        ([1.0] * 3 + [2.5] * 3, [6]),
        ([0.0] * 3 + [1.0] * 3, []),  # no ratio to zero
    ],
)
def test_grad_norm_signal_compares_medians_of_windows(grad_norm, expected):
    watch = CollapseWatch(window=3, grad_norm_ratio=2.0)
    assert _steps_on(watch, "grad_norm_surges", _columns(grad_norm=grad_norm)) == expected


@pytest.mark.parametrize(
    ("share", "reward", "expected"),
    [
        (0.5, [0.25, 0.75, 1.0, 1.0, 0.5, 0.5, 0.25, 0.25, 1.0], [7, 8]),
        (0.5, [1.0, 1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3], [8, 9]),  # slow but far
        (0.75, [1.0, 1.0, 0.0, 0.0], [4]),  # two windows are needed
        (0.5, [0.0] * 6, []),
    ],
)
def test_reward_signal_needs_a_fall_below_a_share_of_the_best_window(share, reward, expected):
    watch = CollapseWatch(window=2, reward_share=share)
    assert _steps_on(watch, "reward_drops", _columns(reward=reward)) == expected


def test_window_counts_if_half_of_its_steps_have_the_metric():
    before = [-0.25, None, None, -0.25]
    rows = _columns(correct_loglik=[*before, None, -0.5, -0.5, None], reward=[0.5] * 8)
    assert _steps_on(CollapseWatch(window=4), "correct_loglik_falls", rows) == [8]
    rows = _columns(correct_loglik=[*before, None, None, -0.5, None], reward=[0.5] * 8)
    assert _steps_on(CollapseWatch(window=4), "correct_loglik_falls", rows) == []
    nothing = {**dict.fromkeys(SIGNALS, 0.0), "collapse/signals": 0.0}
    assert CollapseWatch(window=1).update({}) == nothing


@pytest.mark.parametrize("value", [NAN, math.inf, -math.inf])
@pytest.mark.parametrize(("signal", "metric"), [(s, m) for s, (m, _) in SIGNALS.items()])
def test_value_that_is_not_finite_gives_its_signal_in_that_step_only(value, signal, metric):
    watch = CollapseWatch(window=2)
    usual = {"correct_loglik": -0.1, "entropy": 0.3, "grad_norm": 0.1, "reward": 0.4}
    for step in range(12):
        signals = watch.update({**usual, metric: value} if step in (0, 6) else usual)
        held = {name for name in SIGNALS if signals[name]}
        assert held == ({signal} if step in (0, 6) else set())
        assert signals["collapse/signals"] == len(held)


def _expected(rows: list[dict[str, float]], window: int) -> dict[str, bool]:
    """Computes the signals from the whole history at once; NaN marks a missing value."""
    names = ("correct_loglik", "entropy", "grad_norm", "reward")
    table = {name: np.array([row.get(name, np.nan) for row in rows]) for name in names}

    def spans(name: str, reduce=np.mean) -> np.ndarray:
        """Reduces every window of the history, oldest first; NaN if too few values are present."""
        every = np.lib.stride_tricks.sliding_window_view(table[name], window)
        present = [span[~np.isnan(span)] for span in every]
        return np.array([reduce(p) if len(p) >= window / 2 else np.nan for p in present])

    def newest(values: np.ndarray) -> tuple[float, float, float]:
        padded = np.concatenate([np.full(2 * window + 1, np.nan), values])
        return padded[-1], padded[-1 - window], padded[-1 - 2 * window]

    if len(rows) < window:
        return dict.fromkeys(SIGNALS, False)
    loglik, entropy = newest(spans("correct_loglik")), newest(spans("entropy"))
    grad_norm, rewards = newest(spans("grad_norm", np.median)), spans("reward")
    reward = newest(rewards)
    best = np.max(rewards[~np.isnan(rewards)], initial=-np.inf)
    speeds = entropy[0] - entropy[1], entropy[1] - entropy[2]
    return {
        "collapse/correct_loglik_falls": bool(
            loglik[1] - loglik[0] > 0.05 and reward[0] >= reward[1] - 0.1 * reward[1]
        ),
        "collapse/entropy_accelerates": bool(
            speeds[0] > 0.05 and (speeds[1] < 0 or speeds[0] - speeds[1] > 0.05)
        ),
        "collapse/grad_norm_surges": bool(grad_norm[1] > 0 and grad_norm[0] > 2 * grad_norm[1]),
        "collapse/reward_drops": bool(
            len(rows) >= 2 * window and best > 0 and reward[0] < 0.6 * best
        ),
    }


def _eighths(low: int, high: int) -> st.SearchStrategy[float | None]:
    return st.none() | st.integers(low, high).map(lambda n: n / 8)


ROW = st.fixed_dictionaries(
    {
        "correct_loglik": _eighths(-4, 0),
        "entropy": _eighths(0, 8),
        "grad_norm": _eighths(0, 8),
        "reward": _eighths(0, 8),
    }
).map(lambda row: {name: value for name, value in row.items() if value is not None})


@settings(deadline=None, max_examples=80)
@given(rows=st.lists(ROW, max_size=20), window=st.integers(1, 4))
def test_signals_equal_the_reference_over_the_whole_history(rows, window):
    watch = CollapseWatch(window=window)
    for count, row in enumerate(rows, start=1):
        signals = watch.update(row)
        expected = _expected(rows[:count], window)
        assert signals == {
            **{name: float(held) for name, held in expected.items()},
            "collapse/signals": float(sum(expected.values())),
        }


@pytest.mark.parametrize("seed", range(10))
def test_healthy_run_gives_no_signal(seed):
    """The reward rises, then falls a little; the entropy falls slowly; all metrics have noise."""
    noise = random.Random(seed)
    watch = CollapseWatch(window=10)
    for step in range(203):
        signals = watch.update(
            {
                "reward": 0.1
                + 0.3 * (1 - math.exp(-step / 40))
                - 0.05 * step / 203
                + noise.gauss(0, 0.05),
                "entropy": 0.1 + 0.5 * math.exp(-step / 60) + noise.gauss(0, 0.02),
                "correct_loglik": -0.05 - 0.1 * math.exp(-step / 50) + noise.gauss(0, 0.02),
                "grad_norm": 0.07 * math.exp(noise.gauss(0, 0.3)),
            }
        )
        assert signals["collapse/signals"] == 0.0, step
        assert watch.alarm() is None


def _collapse(steps: int = 60) -> list[dict[str, float]]:
    """Returns rows of steps 1 … `steps` whose metrics change in the order of a collapse."""
    return [
        {
            "correct_loglik": -0.1 - 0.02 * max(step - 20, 0),
            "entropy": 0.3 + 0.01 * (1.3 ** max(step - 30, 0) - 1),
            "grad_norm": 0.1 * 1.25 ** max(step - 40, 0),
            "reward": 0.3 - 0.025 * max(step - 45, 0),
        }
        for step in range(1, steps + 1)
    ]


def test_collapse_gives_the_signals_in_order():
    watch = CollapseWatch(window=5)
    first: dict[str, int] = {}
    alarms: dict[int, str] = {}
    for step, row in enumerate(_collapse(), start=1):
        signals = watch.update(row)
        for name in SIGNALS:
            if signals[name]:
                first.setdefault(name, step)
        if text := watch.alarm():
            alarms[step] = text
    assert list(first) == list(SIGNALS)
    # 5 steps into the fall the mean is 0.02 · (1 + 2 + 3 + 4 + 5) / 5 = 0.06 lower; at 4, 0.04.
    assert first["collapse/correct_loglik_falls"] == 25
    # n steps into the surge the newest median is 0.1 · 1.25**(n - 2), the one before still 0.1.
    # 1.25**3 < 2 < 1.25**4, so n = 6.
    assert first["collapse/grad_norm_surges"] == 46
    # 60 % of 0.3 is 0.18; the mean is 0.3 - 0.025 · (n - 2), below it from n = 7 on.
    assert first["collapse/reward_drops"] == 52
    # The first signal raises no alarm; each later one does, in its first step.
    assert sorted(alarms) == sorted(first.values())[1:]
    assert "correct_loglik_falls" in alarms[min(alarms)]


def test_alarm_needs_a_new_signal():
    watch = CollapseWatch(window=100)

    def alarm_of(*metrics: str) -> str | None:
        watch.update(dict.fromkeys(metrics, NAN))  # exactly the signals of `metrics` hold
        return watch.alarm()

    assert ALARM_AT == 2
    assert alarm_of("entropy") is None
    text = alarm_of("entropy", "reward")
    assert "WARNING: 2 of 4" in text
    assert "entropy_accelerates" in text and "reward_drops" in text
    assert "grad_norm_surges" not in text
    assert watch.alarm() == text  # reading the alarm does not reset it
    assert alarm_of("entropy", "reward") is None
    assert alarm_of("entropy") is None
    assert alarm_of("entropy", "reward") is None
    assert "grad_norm_surges" in alarm_of("entropy", "grad_norm")
    assert alarm_of("entropy", "grad_norm", "reward") is None
    text = alarm_of("entropy", "grad_norm", "reward", "correct_loglik")
    assert "WARNING: 4 of 4" in text
    assert len(text.splitlines()) == 6
    assert alarm_of() is None  # the collapse is over, so all signals count as new
    assert "WARNING: 2 of 4" in alarm_of("entropy", "reward")


def test_resumed_run_has_the_signals_and_alarms_of_the_uninterrupted_run(tmp_path):
    rows = _collapse(50) + [{"reward": 0.3}] * 7 + _collapse(12) + [{"entropy": NAN, "reward": 0.0}]
    for missing in range(0, len(rows), 4):
        rows[missing] = {k: v for k, v in rows[missing].items() if k != "correct_loglik"}
    recorder, watch, whole = Recorder(tmp_path, first_step=1), CollapseWatch(window=3), []
    for step, row in enumerate(rows, start=1):
        whole.append((watch.update(row), watch.alarm()))
        recorder.scalars(step, {**row, "em": 0.1})
    recorder.close()
    assert {signals["collapse/signals"] for signals, _ in whole} >= {0.0, 1.0, 2.0}
    assert any(alarm for _, alarm in whole)
    for first in range(1, len(rows) + 1):
        watch = CollapseWatch(window=3)
        for row in earlier_rows(tmp_path / "metrics.jsonl", first):
            watch.update(row)
        resumed = [(watch.update(row), watch.alarm()) for row in rows[first - 1 :]]
        assert resumed == whole[first - 1 :]


def test_earlier_rows_end_before_the_first_step_and_skip_a_truncated_row(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert earlier_rows(path, 3) == []
    rows = [{"step": step, "reward": 0.5 * step} for step in range(4)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 1, "rew')
    assert earlier_rows(path, 3) == rows[:3]
    assert earlier_rows(path, 0) == []
    assert earlier_rows(path, 9) == rows


def test_bad_window_and_bad_rows_are_refused(tmp_path):
    with pytest.raises(UserError, match="at least 1 step, not 0"):
        CollapseWatch(window=0)
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nreward 3\n')
    with pytest.raises(UserError, match="row 2"):
        earlier_rows(path, 5)
