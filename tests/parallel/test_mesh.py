"""The mesh and its table of axes, on eight pretended devices."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from zerosearch_jax.errors import UserError
from zerosearch_jax.parallel.mesh import (
    AXES,
    TRAIN_RULES,
    make_mesh,
    partition_spec,
    replicated,
    sharding,
)


def test_mesh_has_the_sizes_asked_for_in_order():
    mesh = make_mesh(2, 1, 4)
    assert dict(mesh.shape) == {"data": 2, "fsdp": 1, "tensor": 4}
    assert mesh.axis_names == AXES
    assert list(make_mesh().devices.flat) == jax.devices()[:1]
    assert list(make_mesh(2, devices=jax.devices()[4:]).devices.flat) == jax.devices()[4:6]


def test_too_few_devices_is_a_user_error():
    with pytest.raises(UserError, match="needs 32 devices, there are 8"):
        make_mesh(4, 4, 2)


def test_every_rule_names_a_mesh_axis():
    used = {name for entry in TRAIN_RULES.values() if entry for name in jax.tree.leaves(entry)}
    assert used == set(AXES)


def test_partition_spec_reads_the_table():
    assert partition_spec(("embed", "heads", "head_dim")) == P("fsdp", "tensor", None)
    assert partition_spec(("batch", "length")) == P(("data", "fsdp"), None)


@pytest.mark.parametrize("axes", [("heads", "mlp"), ("batch", "embed")])
def test_a_mesh_axis_used_twice_is_refused(axes):
    with pytest.raises(ValueError, match="use a mesh axis twice"):
        partition_spec(axes)


def test_sharding_splits_an_array_over_devices():
    mesh = make_mesh(2, 2, 2)
    x = jax.device_put(jnp.zeros((8, 4)), sharding(mesh, ("batch", "length"), (8, 4)))
    assert {shard.data.shape for shard in x.addressable_shards} == {(2, 4)}
    y = jax.device_put(jnp.zeros((8, 4)), replicated(mesh))
    assert {shard.data.shape for shard in y.addressable_shards} == {(8, 4)}


def test_sizes_that_do_not_divide_are_user_errors():
    mesh = make_mesh(2, 2, 2)
    with pytest.raises(UserError, match="batch of size 6 does not divide by 4"):
        sharding(mesh, ("batch", "length"), (6, 4))
    with pytest.raises(UserError, match="mlp of size 5 does not divide by 2"):
        sharding(mesh, ("embed", "mlp"), (4, 5))
