"""Checkpoints restore every bit, survive a kill, and refuse the state of another config."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from zerosearch_jax.checkpoints import Checkpoints
from zerosearch_jax.errors import UserError


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
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest_step() == 1
        checkpoints.save(2, {"w": jnp.arange(4) + 1}, {})
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
    with (
        Checkpoints(tmp_path) as checkpoints,
        pytest.raises(UserError, match="older version.* new --workdir") as refused,
    ):
        checkpoints.restore(None, state)
    assert str(tmp_path) in str(refused.value)


def test_empty_directory_is_refused(tmp_path):
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(UserError, match="no checkpoint"):
        checkpoints.restore(None, {"w": jnp.zeros(())})
