"""Tests of atomic file writes, and of writes that fail."""

import os
import resource
from contextlib import contextmanager
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zerosearch_jax.checkpoints import Checkpoints
from zerosearch_jax.data.records import Records
from zerosearch_jax.errors import UserError, disk_error
from zerosearch_jax.files import atomic_path, read_json, write_atomically, write_json
from zerosearch_jax.models.weights import save_tensors
from zerosearch_jax.telemetry.metrics import METRICS
from zerosearch_jax.telemetry.recorder import Recorder
from zerosearch_jax.training.nonfinite import NonFiniteCounter


def test_interrupted_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_atomically(path, "old")

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", killed)
        write_atomically(path, "new")
    assert path.read_text() == "old"
    write_atomically(path, "néw")
    assert path.read_text(encoding="utf-8") == "néw"
    write_atomically(path, b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff"


LIMIT = 50_000
LARGE = np.random.default_rng(0).random(LIMIT)  # 8 bytes each, and not compressible


@contextmanager
def _file_size_limit():
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def _save_checkpoint(path: Path) -> None:
    with Checkpoints(path.parent) as checkpoints:
        checkpoints.save(int(path.name), {"w": jnp.asarray(LARGE)}, {})


def _save_tensors(path: Path) -> None:
    with atomic_path(path) as part:
        save_tensors(part, {"w": LARGE})


def _record(path: Path) -> None:
    recorder = Recorder(path.parent)
    try:
        for step in range(LIMIT):
            recorder.scalars(step, dict.fromkeys(METRICS, 1.0))
    finally:
        recorder.close()


def _record_batch(path: Path) -> None:
    class Batch:
        arrays = staticmethod(lambda: {"w": LARGE})

    NonFiniteCounter(path.parent.parent, 1).record(0, 0, True, Batch)


WRITERS = {
    "file": (write_atomically, "a.json"),
    "tensors": (_save_tensors, "model.safetensors"),
    "records": (lambda path, text=None: Records(path).append([{"id": "x" * LIMIT}]), "r.jsonl"),
    "metrics": (_record, "tensorboard"),
    "batch": (_record_batch, "skipped_batches/step000001_update1.npz"),
    "checkpoint": (_save_checkpoint, "2"),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_write_that_fails_names_its_file_in_one_line(tmp_path, name, capfd):
    """The file-size limit stands for a full disk: both end a write in the middle."""
    write, file = WRITERS[name]
    path = tmp_path / file
    arguments = ("y" * 2 * LIMIT,) if name == "file" else ()
    with _file_size_limit(), pytest.raises(OSError) as failure:
        write(path, *arguments)
    line = disk_error(failure.value)
    assert line.startswith(str(path)) and ": File too large; " in line and "\n" not in line
    shown = capfd.readouterr()
    assert "Traceback" not in shown.out + shown.err
    if name in ("file", "tensors"):
        assert not path.exists()


def test_a_failed_save_keeps_the_previous_checkpoint(tmp_path):
    state = {"w": jnp.arange(4)}
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, state, {})
    with _file_size_limit(), pytest.raises(OSError):
        _save_checkpoint(tmp_path / "2")
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        restored, _ = checkpoints.restore(None, state)
        assert checkpoints.latest_step() == 1 and restored["w"].tolist() == [0, 1, 2, 3]
        checkpoints.save(2, jax.tree.map(lambda leaf: leaf + 1, state), {})
        assert checkpoints.restore(None, state)[0]["w"].tolist() == [1, 2, 3, 4]


def test_a_file_in_place_of_the_checkpoints_is_refused(tmp_path):
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(OSError) as failure:
        Checkpoints(tmp_path / "checkpoints")
    assert disk_error(failure.value).startswith(f"{tmp_path}/checkpoints: ")


def test_other_errors_are_no_disk_errors():
    for error in (OSError("no number"), FileNotFoundError(2, "x", "y"), ValueError("os error 99")):
        assert disk_error(error) is None


SHAPE = {
    **{"id": str, "n?": int, "x": float | None, "list": [float, ...], "pair": (float, float)},
    **{"map": {str: {"a": int}}, "choice": {"u", None}},
}
ROW = {"id": "a", "x": None, "list": [1, 2.5], "pair": [1, 2], "map": {"k": {"a": 1}}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, ""),
        ({"n": 3, "x": 10**18, "choice": "u", "other": [[]]}, ""),
        ({"id": None}, "id: expected a text, not null"),
        ({"n": True}, "n: expected a whole number, not true or false"),
        ({"n": 2**63}, "n: expected a whole number, not one of more than 64 bits"),
        ({"x": "1"}, "x: expected a number or null, not a text"),
        ({"list": []}, "list: the list is empty"),
        ({"list": [1, "a"]}, r"list\[1\]: expected a number"),
        ({"pair": [1]}, "pair: expected 2 elements, not 1"),
        ({"map": {"k": {}}}, "map.k.a is missing"),
        ({"map": {"k\nl": 3}}, "map.k l: expected an object"),
        ({"choice": "v"}, 'choice: expected one of "u", null'),
        ({"id": "\ud800"}, "surrogates not allowed"),
    ],
)
def test_a_value_of_another_shape_is_refused_with_its_key(tmp_path, change, message):
    path = tmp_path / "a.json"
    row = ROW | {"choice": None} | change
    write_json(path, row)
    if not message:
        assert read_json(path, SHAPE, "fix it") == row
        return
    with pytest.raises(UserError, match=f"^{path}: .*{message}.*; fix it$"):
        read_json(path, SHAPE, "fix it")
