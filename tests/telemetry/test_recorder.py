"""Tests of the recorder: known metrics only, and one row per step even after a resume."""

import json

import pytest
from tensorboardX.proto.event_pb2 import Event

from zerosearch_jax.telemetry.metrics import METRICS
from zerosearch_jax.telemetry.recorder import Recorder


def _rows(workdir) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def _events(workdir) -> list[Event]:
    """Parses TensorBoard's event files: length (8 bytes), crc (4), data, crc (4) per record."""
    events = []
    for path in sorted((workdir / "tensorboard").iterdir()):
        data = path.read_bytes()
        while data:
            size = int.from_bytes(data[:8], "little")
            events.append(Event.FromString(data[12 : 12 + size]))
            data = data[12 + size + 4 :]
    return events


def test_metrics_reach_the_rows_and_tensorboard(tmp_path):
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


def test_unknown_metric_is_refused_and_nothing_is_written(tmp_path):
    recorder = Recorder(tmp_path)
    with pytest.raises(KeyError, match="rewrd"):
        recorder.scalars(0, {"reward": 1.0, "rewrd": 1.0})
    recorder.close()
    assert _rows(tmp_path) == []


def test_disabled_recorder_refuses_unknown_metrics_and_writes_nothing(tmp_path):
    recorder = Recorder(tmp_path / "none", enabled=False)
    with pytest.raises(KeyError, match="rewrd"):
        recorder.scalars(0, {"rewrd": 1.0})
    recorder.scalars(0, {"reward": 1.0})
    recorder.text(0, "episode", "x")
    recorder.close()
    assert not (tmp_path / "none").exists()


def test_resume_replaces_later_rows_and_drops_a_truncated_row(tmp_path):
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


def test_every_metric_has_a_description():
    assert {"reward", "eval/em", "seconds/search", "correct_loglik"} <= METRICS.keys()
    assert all(len(description) > 10 for description in METRICS.values())
