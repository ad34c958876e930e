"""Tests of the profiler's traces."""

import gzip
import json

import jax
import jax.numpy as jnp
import pytest

from zerosearch_jax.telemetry import profiler as profiler_lib
from zerosearch_jax.telemetry.profiler import Profiler
from zerosearch_jax.telemetry.step_timer import StepTimer


def _traced_steps(directory) -> list[str]:
    return sorted({path.relative_to(directory).parts[0] for path in directory.rglob("*.xplane.pb")})


def _run(profiler: Profiler, numbers) -> None:
    double = jax.jit(lambda x: 2 * x)
    for number in numbers:
        with profiler.step(number):
            double(jnp.ones(4)).block_until_ready()


def test_listed_steps_and_no_others_are_traced(tmp_path):
    _run(Profiler((2, 4), tmp_path / "profile"), range(1, 6))
    assert _traced_steps(tmp_path / "profile") == ["step_000002", "step_000004"]


def test_no_listed_steps_write_nothing(tmp_path):
    _run(Profiler((), tmp_path / "profile"), range(3))
    assert not (tmp_path / "profile").exists()


def test_trace_holds_the_step_its_sections_and_its_programs(tmp_path):
    timer = StepTimer()
    with Profiler((7,), tmp_path).step(7), timer.section("learner"):
        jax.jit(_update)(jnp.ones(4)).block_until_ready()
    (path,) = tmp_path.rglob("*.trace.json.gz")
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    names = {event.get("name") for event in events}
    assert {"train", "learner", "PjitFunction(_update)"} <= names
    (step,) = [event for event in events if event.get("name") == "train"]
    assert step["args"]["step_num"] == "7"


def _update(x):
    return 2 * x


def test_trace_ends_when_the_step_raises(tmp_path):
    profiler = Profiler((1, 2), tmp_path)
    with pytest.raises(KeyError), profiler.step(1):
        raise KeyError
    _run(profiler, [2])
    assert _traced_steps(tmp_path) == ["step_000001", "step_000002"]


@pytest.mark.parametrize(("process", "writes"), [(0, True), (1, False), (2, True), (3, False)])
def test_one_process_of_each_host_writes(tmp_path, monkeypatch, process, writes):
    monkeypatch.setattr(profiler_lib, "gather", lambda own: ["a", "a", "b", "b"])
    monkeypatch.setattr(jax, "process_index", lambda: process)
    profiler = Profiler((1,), tmp_path)
    monkeypatch.undo()
    _run(profiler, [1])
    assert _traced_steps(tmp_path) == ["step_000001"] * writes
