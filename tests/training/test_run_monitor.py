"""Decisions after a step, from metrics that a test invents."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zerosearch_jax import config_flags
from zerosearch_jax.errors import UserError
from zerosearch_jax.training.config import PlateauConfig, RLConfig
from zerosearch_jax.training.run_monitor import Decision, Plateau, RunMonitor

ROOT = Path(__file__).parents[2]
CALM = {"reward": 0.5, "entropy": 1.0, "grad_norm": 1.0}
INF = float("inf")
COLLAPSED = CALM | {"entropy": INF, "grad_norm": INF}  # two signals, which give an alarm
GO, BACK, DONE, STOP = Decision.CONTINUE, Decision.ROLL_BACK, Decision.FINISH, Decision.STOP


@pytest.mark.parametrize(
    ("patience", "min_gain", "scores", "end"),
    [
        (0, 0.0, [0.5] * 9, None),
        (2, 0.0, [0.1, 0.2, 0.2, 0.3, 0.3, 0.3], 6),
        (2, 0.0, [0.1, 0.2, 0.1, 0.21, 0.1, 0.22], None),
        (1, 0.0, [0.0, 0.0], 2),
        (2, 0.1, [0.25, 0.3125, 0.34375, 0.5], 3),  # two small gains
        (2, 0.1, [0.25, 0.3125, 0.375, 0.5], None),  # two small gains that together are a gain
        (1, 0.125, [0.25, 0.375], 2),  # a gain of exactly min_gain is too small
    ],
)
def test_plateau_ends_after_patience_evaluations_without_a_gain(patience, min_gain, scores, end):
    plateau, reached = Plateau(PlateauConfig(patience, min_gain)), []
    for score in scores:
        plateau.update(score)
        reached.append(plateau.reached)
    assert [number for number, one in enumerate(reached, 1) if one][:1] == ([end] if end else [])


def _config(action="log", most=2, patience=0):
    config = config_flags.load(str(ROOT / "configs" / "grpo.py"))
    config.rl.stop_when.patience = patience
    config.watch.update(dict(action=action, max_rollbacks=most, rollback_rate_factor=0.25))
    return config_flags.typed(RLConfig, config)


@pytest.mark.parametrize(
    ("action", "decisions", "rollbacks"),
    [
        ("log", [GO, GO, GO, GO, GO, DONE], 0),
        ("stop", [GO, STOP, GO, GO, GO, DONE], 0),
        # The watch starts again, so the lasting collapse is new to it. The plateau does, too.
        ("rollback", [GO, BACK, BACK, STOP, GO, GO], 2),
    ],
)
def test_an_alarm_leads_to_the_configured_action(tmp_path, action, decisions, rollbacks):
    monitor = RunMonitor(_config(action, most=2, patience=5), tmp_path, {})
    rows, made, counts = [CALM, COLLAPSED, COLLAPSED, COLLAPSED, CALM, CALM], [], []
    for row in rows:
        counts.append(monitor.decide(row | {"eval/em": 0.5})["rollbacks"])
        made.append(monitor.decision)
    assert made == decisions
    assert counts[-1] == monitor.rollbacks == rollbacks
    assert monitor.rate_scale == 0.25**rollbacks


def test_the_message_of_a_stop_names_the_rollbacks_and_the_key(tmp_path, capsys):
    monitor = RunMonitor(_config("rollback", most=1), tmp_path, {})
    monitor.decide(COLLAPSED)
    monitor.report(4)
    monitor.raise_if_stopped(4)
    assert "step 4" in capsys.readouterr().out
    monitor.decide(COLLAPSED)
    with pytest.raises(UserError, match="after step 5.*after 1 rollback.*config.watch.action=log"):
        monitor.raise_if_stopped(5)


def test_too_many_skipped_updates_stop_a_run_that_could_roll_back(tmp_path):
    monitor = RunMonitor(_config("rollback"), tmp_path, {})
    monitor.nonfinite.in_a_row = 3
    monitor.decide(COLLAPSED)
    assert (monitor.decision, monitor.rollbacks) == (STOP, 0)
    with pytest.raises(UserError, match="not finite"):
        monitor.raise_if_stopped(1)


def test_a_stop_at_the_last_step_lets_the_run_conclude(tmp_path):
    config = _config("stop")
    last, monitor = config.rl.steps, RunMonitor(config, tmp_path, {})
    monitor.decide(COLLAPSED)
    assert monitor.decision is STOP
    for in_a_row in (0, config.watch.nonfinite_limit):
        monitor.nonfinite.in_a_row = in_a_row
        with pytest.raises(UserError):
            monitor.raise_if_stopped(last - 1)
        monitor.raise_if_stopped(last)


def test_steps_end_at_a_plateau_also_after_a_resume(tmp_path):
    config, rows = _config(patience=2), []
    monitor = RunMonitor(config, tmp_path, {})
    for step in monitor.steps(0):
        rows.append(CALM | {"eval/em": [0.1, 0.2, 0.2][min(step, 2)]})
        monitor.decide(rows[-1])
    assert len(rows) == 4 < config.rl.steps
    assert list(RunMonitor(config, tmp_path, {}, rows).steps(4)) == []
    assert list(RunMonitor(config, tmp_path, {}, rows[:3]).steps(3))[0] == 3


steps = st.lists(
    st.tuples(st.sampled_from([CALM, COLLAPSED]), st.sampled_from([None, 0.25, 0.5])), max_size=12
)


@settings(deadline=None, max_examples=50)
@given(steps, st.integers(0, 12), st.sampled_from(["log", "rollback"]))
def test_a_resumed_monitor_decides_as_the_uninterrupted_one(tmp_path_factory, steps, cut, action):
    config, workdir = _config(action, most=3, patience=3), tmp_path_factory.getbasetemp()
    monitor, rows, kept, decisions = RunMonitor(config, workdir, {}), [], [], []
    for row, em in steps:
        row = row | ({} if em is None else {"eval/em": em})
        kept.append(monitor.kept())
        rows.append(row | monitor.decide(row))
        decisions.append(monitor.decision)
    kept.append(monitor.kept())
    cut = min(cut, len(rows))
    resumed = RunMonitor(config, workdir, kept[cut], rows[:cut])
    if cut and decisions[cut - 1] is not STOP:  # a stopped run does not go on by itself
        assert (resumed.decision is DONE) == (decisions[cut - 1] is DONE)
    for row, decision in zip(rows[cut:], decisions[cut:], strict=True):
        assert row | resumed.decide(row) == row
        assert resumed.decision is decision
    assert resumed.rate_scale == monitor.rate_scale
