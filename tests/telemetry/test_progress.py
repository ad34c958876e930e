"""Tests of the progress display and of the step timer."""

import io

import pytest

from zerosearch_jax.telemetry.progress import Progress
from zerosearch_jax.telemetry.step_timer import StepTimer


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def _clock(*times: float):
    return iter(times).__next__


def test_line_shows_metrics_speed_and_remaining_time():
    out = io.StringIO()
    progress = Progress(60, first_step=10, stream=out, clock=_clock(100.0, 106.0, 110.0))
    metrics = {"em": 0.3125, "reward": 0.4321, "entropy": 1.0, "searches_per_episode": 1.4}
    progress.update(11, metrics)
    progress.update(12, {})
    progress.close()
    assert out.getvalue().splitlines() == [
        "step 11/60 reward 0.432 em 0.312 searches 1.4 | 6.0 s/step eta 4:54",
        "step 12/60  | 4.0 s/step eta 4:00",
    ]


def test_terminal_shows_a_bar():
    out = _Terminal()
    progress = Progress(4, stream=out)
    progress.update(1, {"reward": 0.5})
    progress.update(4, {"reward": 0.75})
    progress.close()
    assert "4/4" in out.getvalue()
    assert "reward 0.75" in out.getvalue()


def test_sections_add_up_and_nested_time_is_subtracted_from_the_outer_section():
    timer = StepTimer(clock=_clock(0.0, 1.0, 2.0, 5.0, 7.0, 10.0, 11.0, 11.5))
    with timer.section("rollout"), timer.section("search"):  # 1 → (2 → 5) → 7
        pass
    assert timer.pop() == {"seconds/rollout": 3.0, "seconds/search": 3.0, "seconds/step": 10.0}
    assert timer.pop() == {"seconds/step": 1.0}


def test_unknown_section_is_refused():
    with pytest.raises(KeyError, match="seconds/thinking"), StepTimer().section("thinking"):
        pass
