"""Checkpoints restore every bit, survive a kill, and refuse the state of another config."""

import hashlib
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from zerosearch_jax.checkpoints import Checkpoints
from zerosearch_jax.errors import UserError
from zerosearch_jax.files import FORMAT
from zerosearch_jax.training.train_state import resume, roll_back


def _state(width: int = 8) -> dict:
    weights = jax.random.normal(jax.random.key(0), (4, width))
    params = {"layers": {"w.q": weights, "b": jnp.full((width,), -0.0, jnp.bfloat16)}}
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    opt_state = optimizer.init(params)
    _, opt_state = optimizer.update(jax.tree.map(jnp.ones_like, params), opt_state, params)
    return {"params": params, "opt": opt_state, "step": 7}


def _assert_same_bits(left, right) -> None:
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert np.asarray(a).dtype == np.asarray(b).dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_restore_returns_every_bit_and_the_metadata(tmp_path):
    state, metadata = _state(), {"position": 12, "curriculum": {"p": 0.1}, "seed": 2**40}
    with Checkpoints(tmp_path / "ckpt") as checkpoints:
        assert checkpoints.latest_step() is None
        checkpoints.save(3, state, metadata)
    with Checkpoints(tmp_path / "ckpt") as checkpoints:
        assert checkpoints.latest_step() == 3
        other = jax.tree.map(lambda leaf: leaf * 0, state)
        restored, restored_metadata = checkpoints.restore(None, other)
    _assert_same_bits(restored, state)
    assert restored_metadata == metadata


def test_restore_places_leaves_in_the_given_sharding(tmp_path):
    mesh = jax.make_mesh((4,), ("fsdp",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("fsdp"))
    state = {"w": jnp.arange(8.0)}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
        abstract = {"w": jax.ShapeDtypeStruct((8,), jnp.float32, sharding=sharding)}
        restored, _ = checkpoints.restore(1, abstract)
    assert restored["w"].sharding == sharding
    _assert_same_bits(restored, state)


def test_only_the_newest_are_kept_and_a_saved_step_is_not_rewritten(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, {"w": jnp.full((2,), step)}, {"step": step})
        checkpoints.save(3, {"w": jnp.zeros((2,), jnp.int32)}, {"step": -1})
        restored, metadata = checkpoints.restore(None, {"w": jnp.zeros((2,), jnp.int32)})
        assert restored["w"].tolist() == [3, 3]
        assert metadata == {"step": 3}
        with pytest.raises(UserError, match="no checkpoint of step 1"):
            checkpoints.restore(1, {"w": jnp.zeros((2,), jnp.int32)})


def test_partly_written_checkpoint_is_ignored(tmp_path):
    state = {"w": jnp.arange(4)}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
    # A kill during the next save leaves the directory that Orbax has not yet renamed.
    partial = tmp_path / "2.orbax-checkpoint-tmp"
    shutil.copytree(tmp_path / "1", partial)
    shutil.rmtree(partial / "state")
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert checkpoints.latest_step() == 1
    assert partial.exists()
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest_step() == 1
        checkpoints.save(3, {"w": jnp.arange(4) + 1}, {})  # not 2, which a SIGTERM may have saved
        assert not partial.exists()
        restored, _ = checkpoints.restore(None, state)
    assert restored["w"].tolist() == [1, 2, 3, 4]


def test_interrupted_save_leaves_the_previous_checkpoint(tmp_path, monkeypatch):
    state = {"w": jnp.arange(4)}
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state, {})

    def killed(*_args, **_kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        # The commit is a rename, after all files are written.
        patch.setattr("os.rename", killed)
        patch.setattr("pathlib.Path.rename", killed)
        with pytest.raises(KeyboardInterrupt):
            checkpoints.save(2, state, {})
    with Checkpoints(tmp_path) as fresh:
        assert fresh.latest_step() == 1
        restored, _ = fresh.restore(None, state)
    assert restored["w"].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("like", "named"),
    [
        ({"w": jnp.zeros((5,))}, r"w is \[4\] there and \[5\] here"),
        ({"w": jnp.zeros((4,)), "value": jnp.zeros(())}, r"value is absent there"),
        ({}, r"w is \[4\] there and absent here"),
    ],
)
def test_state_of_another_config_is_refused_with_the_leaf(tmp_path, like, named):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"w": jnp.zeros((4,))}, {})
        with pytest.raises(UserError, match=named) as refused:
            checkpoints.restore(None, like)
    assert str(tmp_path) in str(refused.value)
    assert "another --workdir" in str(refused.value)


def test_checkpoint_of_an_older_version_is_refused(tmp_path):
    state = {"w": jnp.zeros((4,))}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
    (kept,) = (tmp_path / "1" / "metadata").rglob("metadata")
    metadata = json.loads(kept.read_text())
    del metadata["format"]
    kept.write_text(json.dumps(metadata))
    (tmp_path / "1" / "checksums.json").unlink()  # older versions wrote none
    with (
        Checkpoints(tmp_path) as checkpoints,
        pytest.raises(UserError, match="older version.* new --workdir") as refused,
    ):
        checkpoints.restore(None, state)
    assert str(tmp_path) in str(refused.value)


def test_empty_directory_is_refused(tmp_path):
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(UserError, match="no checkpoint"):
        checkpoints.restore(None, {"w": jnp.zeros(())})


W, SHAPE = {"w": jnp.zeros((64,))}, {"step": int}


def test_the_remains_of_a_deleted_checkpoint_are_removed(tmp_path):
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, W, {})
    (tmp_path / "1" / "metadata" / "metadata").unlink()  # killed while it deletes the first
    with Checkpoints(tmp_path, read_only=True):
        assert (tmp_path / "1").exists()
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.restore(None, W)
    assert {path.name for path in tmp_path.iterdir()} == {"2", "3"}


def test_an_old_checkpoint_may_be_deleted_while_another_process_lists_them(
    two_checkpoints, tmp_path, monkeypatch
):
    shutil.copytree(two_checkpoints, tmp_path, dirs_exist_ok=True)
    find, manager = ocp.path.step.standard_name_format, ocp.CheckpointManager
    calls = []

    def found_and_then_deleted():
        found = list(find().find_all(tmp_path))
        shutil.rmtree(tmp_path / "1", ignore_errors=True)
        return SimpleNamespace(find_all=lambda _: found)

    def deleted_during_the_listing(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 1:
            raise FileNotFoundError
        monkeypatch.undo()
        return manager(*arguments, **options)

    monkeypatch.setattr(ocp.path.step, "standard_name_format", found_and_then_deleted)
    monkeypatch.setattr(ocp, "CheckpointManager", deleted_during_the_listing)
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert checkpoints.latest_step() == 2


def test_the_only_good_checkpoint_is_kept(tmp_path):
    with Checkpoints(tmp_path, keep=3) as checkpoints:  # a third one, as after a kill
        for step in (1, 2, 3):
            checkpoints.save(step, W, {})
    for step in (2, 3):
        _flip(_array_file(tmp_path / str(step)))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.restore(None, W)
        assert checkpoints.latest_step() == 1


def test_a_checkpoint_without_checksums_gets_them_when_it_is_restored(two_checkpoints, tmp_path):
    shutil.copytree(two_checkpoints, tmp_path, dirs_exist_ok=True)
    checksums = tmp_path / "2" / "checksums.json"
    written = json.loads(checksums.read_text())
    checksums.rename(f"{checksums}.part")  # killed before the last rename
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        checkpoints.restore(None, W)
    assert not checksums.exists()
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.restore(None, W)
        assert json.loads(checksums.read_text()) == written
        assert not Path(f"{checksums}.part").exists()
        _flip(_array_file(tmp_path / "2"))
        checkpoints.restore(None, W)
        assert checkpoints.latest_step() == 1


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory):
    """A directory with the checkpoints of steps 1 and 2, whose arrays are all 1 and all 2."""
    directory = tmp_path_factory.mktemp("two")
    with Checkpoints(directory) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, {"w": jnp.full((64,), float(step))}, {"step": step})
    return directory


def _array_file(folder):
    """The file with the array's bytes."""
    return max((folder / "state").rglob("d/*"), key=lambda path: path.stat().st_size)


def _flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


def _checked(folder, name, content):
    """Damage that the checksums do not show."""
    text = "[" * 100_000 if content == "nested" else json.dumps(content)
    assert (folder / name).exists()
    (folder / name).write_text(text)
    sums = json.loads((folder / "checksums.json").read_text())
    sums[name] = hashlib.sha256(text.encode()).hexdigest()
    (folder / "checksums.json").write_text(json.dumps(sums))


def _empty(folder):
    shutil.rmtree(folder)
    folder.mkdir()


def _unchecked(damage):
    """The damage of a checkpoint whose run was killed before it wrote the checksums."""

    def both(folder):
        (folder / "checksums.json").unlink()
        damage(folder)

    return both


DAMAGE = {
    "changed byte": lambda folder: _flip(_array_file(folder)),
    "truncated array": lambda folder: os.truncate(_array_file(folder), 9),
    "missing array": lambda folder: _array_file(folder).unlink(),
    "empty metadata": lambda folder: (folder / "metadata" / "metadata").write_text(""),
    "missing metadata": lambda folder: shutil.rmtree(folder / "metadata"),
    "missing state": lambda folder: shutil.rmtree(folder / "state"),
    "list as Orbax's metadata": lambda folder: _checked(folder, "_CHECKPOINT_METADATA", [1]),
    "right checksum, no metadata": lambda folder: _checked(
        folder, "metadata/metadata", {"format": FORMAT}
    ),
    "right checksum, text as step": lambda folder: _checked(
        folder,
        "metadata/metadata",
        {"format": FORMAT, "leaves": {"w": [64]}, "user": {"step": "2"}, "score": "high"},
    ),
    "right checksum, deep nesting": lambda folder: _checked(folder, "state/_METADATA", "nested"),
    "garbage checksums": lambda folder: (folder / "checksums.json").write_text("[1"),
    "empty directory": _empty,
    "unchecked, garbage metadata": _unchecked(
        lambda folder: (folder / "metadata" / "metadata").write_text("{]")
    ),
    "unchecked, missing metadata": _unchecked(lambda folder: shutil.rmtree(folder / "metadata")),
    "unchecked, missing state": _unchecked(lambda folder: shutil.rmtree(folder / "state")),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damaged_newest_checkpoint_is_set_aside(two_checkpoints, tmp_path, damage, capsys):
    directory = tmp_path / "ckpt"
    shutil.copytree(two_checkpoints, directory)
    damage(directory / "2")
    files = sorted(path.name for path in (directory / "2").rglob("*"))
    with (
        pytest.raises(UserError, match="checkpoint .*/2 is damaged"),
        Checkpoints(directory, SHAPE, read_only=True) as checkpoints,
    ):
        assert checkpoints.latest_step() == 2
        checkpoints.restore(None, W)
    with Checkpoints(directory, SHAPE) as checkpoints:
        if checkpoints.latest_step() == 2:
            with pytest.raises(UserError, match="checkpoint .*/2 is damaged"):
                checkpoints.restore(2, W)
        learner = SimpleNamespace(abstract_state=lambda: W)
        restored, first, metadata = resume(checkpoints, learner, W, {})
        assert (first, checkpoints.latest_step(), metadata) == (1, 1, {"step": 1})
        np.testing.assert_array_equal(restored["w"], np.ones(64))
        checkpoints.save(2, {"w": jnp.full((64,), 2.0)}, {"step": 2})  # the repeated step
    warning, resumed = capsys.readouterr().out.splitlines()
    assert f"{directory}/2 is damaged" in warning and resumed == "resuming after step 1"
    assert sorted(path.name for path in (directory / "damaged-2").rglob("*")) == files

    damage(directory / "1")
    damage(directory / "2")
    for _ in range(2):  # the refusal leaves the checkpoints, so a second run is refused, too
        with (
            pytest.raises(UserError, match="checkpoint .*/1 is damaged.*--workdir"),
            Checkpoints(directory, SHAPE) as checkpoints,
        ):
            checkpoints.restore(None, W)
    assert {path.name for path in directory.iterdir()} == {"1", "2", "damaged-2"}


def test_a_rollback_without_scores_restores_and_names_the_newest_checkpoint(
    two_checkpoints, capsys
):
    with Checkpoints(two_checkpoints) as checkpoints:
        restored = roll_back(checkpoints, SimpleNamespace(abstract_state=lambda: W))
    np.testing.assert_array_equal(restored["w"], np.full(64, 2.0))
    assert "step 2" in capsys.readouterr().out


def test_the_best_checkpoint_is_kept_next_to_the_newest(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.best_step() is None
        assert not checkpoints.improves(None) and checkpoints.improves(0.0)
        scores = {1: 0.2, 2: 0.5, 3: None, 4: float("nan"), 5: 0.5, 6: 0.4}
        for step, score in scores.items():
            assert checkpoints.improves(score) == (step in (1, 2))
            checkpoints.save(step, W, {}, score)
        assert checkpoints.best_step() == 2  # the first of equals
        assert {path.name for path in tmp_path.iterdir()} == {"2", "5", "6"}
    with Checkpoints(tmp_path) as checkpoints:  # another process
        assert (checkpoints.best_step(), checkpoints.latest_step()) == (2, 6)
        assert not checkpoints.improves(0.5) and checkpoints.improves(0.51)
        checkpoints.save(7, W, {}, 0.6)
        assert checkpoints.best_step() == 7
        assert {path.name for path in tmp_path.iterdir()} == {"6", "7"}
        checkpoints.restore(7, W)
