"""The recorder writes what the glossary names, once for each step, also after a resume."""

import json

import pytest
from tensorboardX.proto.event_pb2 import Event

from zerosearch_jax.telemetry.metrics import METRICS
from zerosearch_jax.telemetry.recorder import Recorder


def _rows(workdir) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def _events(workdir) -> list[Event]:
    """Reads TensorBoard's files: records of length (8 bytes), crc (4), data, crc (4)."""
    events = []
    for path in sorted((workdir / "tensorboard").iterdir()):
        data = path.read_bytes()
        while data:
            size = int.from_bytes(data[:8], "little")
            events.append(Event.FromString(data[12 : 12 + size]))
            data = data[12 + size + 4 :]
    return events


def test_figures_reach_the_rows_and_tensorboard(tmp_path):
    recorder = Recorder(tmp_path)
    recorder.scalars(0, {"reward": 0.25, "kl": 0.5})
    recorder.text(0, "episode", "<search> a\nb")
    recorder.close()
    assert _rows(tmp_path) == [{"step": 0, "reward": 0.25, "kl": 0.5}]
    values = [value for event in _events(tmp_path) for value in event.summary.value]
    scalars = {v.tag: v.simple_value for v in values if not v.HasField("tensor")}
    assert scalars == {"reward": 0.25, "kl": 0.5}
    texts = [v.tensor.string_val[0].decode() for v in values if v.HasField("tensor")]
    assert texts == ["    <search> a\n    b"]


def test_a_name_outside_the_glossary_is_refused_and_nothing_is_written(tmp_path):
    recorder = Recorder(tmp_path)
    with pytest.raises(KeyError, match="rewrd"):
        recorder.scalars(0, {"reward": 1.0, "rewrd": 1.0})
    recorder.close()
    assert _rows(tmp_path) == []


def test_a_name_outside_the_glossary_is_refused_on_silent_processes_too(tmp_path):
    recorder = Recorder(tmp_path / "none", enabled=False)
    with pytest.raises(KeyError, match="rewrd"):
        recorder.scalars(0, {"rewrd": 1.0})
    recorder.scalars(0, {"reward": 1.0})
    recorder.text(0, "episode", "x")
    recorder.close()
    assert not (tmp_path / "none").exists()


def test_a_resumed_run_doubles_no_row_and_drops_a_row_cut_by_the_kill(tmp_path):
    first = Recorder(tmp_path)
    for step in range(4):
        first.scalars(step, {"reward": step})
    first.close()
    with (tmp_path / "metrics.jsonl").open("a") as rows:
        rows.write('{"step": 1, "rew')
    second = Recorder(tmp_path, first_step=2)
    second.scalars(2, {"reward": 20})
    second.close()
    assert [(row["step"], row["reward"]) for row in _rows(tmp_path)] == [(0, 0), (1, 1), (2, 20)]


def test_every_metric_has_a_meaning():
    assert {"reward", "eval/em", "seconds/search", "correct_loglik"} <= METRICS.keys()
    assert all(len(meaning) > 10 for meaning in METRICS.values())
