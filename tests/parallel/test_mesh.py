"""Tests of the mesh and its table of axes, on eight virtual devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from zerosearch_jax.errors import UserError
from zerosearch_jax.parallel.mesh import (
    AXES,
    TRAIN_RULES,
    local_meshes,
    make_mesh,
    partition_spec,
    replicated,
    sharding,
)


def test_mesh_axes_have_the_requested_sizes_and_order():
    mesh = make_mesh(2, 1, 4)
    assert dict(mesh.shape) == {"data": 2, "fsdp": 1, "tensor": 4}
    assert mesh.axis_names == AXES
    assert list(make_mesh().devices.flat) == jax.devices()[:1]
    assert list(make_mesh(2, devices=jax.devices()[4:]).devices.flat) == jax.devices()[4:6]


def test_mesh_larger_than_the_devices_is_refused():
    with pytest.raises(UserError, match="needs 32 devices, there are 8"):
        make_mesh(4, 4, 2)


class _Chip:
    """A TPU chip in slices of 2 × 2 chips, with the attributes of a `jax.Device`."""

    platform, device_kind, process_index = "tpu", "TPU v5 lite", 0

    def __init__(self, number: int):
        self.id = number
        self.slice_index, inner = divmod(number, 4)
        self.coords, self.core_on_chip = [inner % 2, inner // 2, 0], 0


def test_only_the_data_axis_spans_slices():
    chips = [_Chip(number) for number in range(8)]
    for sizes in ((2, 4, 1), (4, 1, 2), (2, 2, 2)):
        mesh = make_mesh(*sizes, devices=chips)
        assert mesh.devices.shape == sizes and mesh.axis_names == AXES
        slices = [{chip.slice_index for chip in row.flat} for row in mesh.devices]
        half = sizes[0] // 2
        assert slices == [{0}] * half + [{1}] * half
    for sizes in ((1, 8, 1), (2, 2, 1)):
        with pytest.raises(UserError, match="2 slices of 4 chips"):
            make_mesh(*sizes, devices=chips)


def test_rules_use_every_mesh_axis_and_no_other():
    used = {name for entry in TRAIN_RULES.values() if entry for name in jax.tree.leaves(entry)}
    assert used == set(AXES)


def test_partition_spec_follows_the_rules():
    assert partition_spec(("embed", "heads", "head_dim")) == P("fsdp", "tensor", None)
    assert partition_spec(("batch", "length")) == P(("data", "fsdp"), None)


@pytest.mark.parametrize("axes", [("heads", "mlp"), ("batch", "embed")])
def test_mesh_axis_used_twice_is_refused(axes):
    with pytest.raises(ValueError, match="use a mesh axis twice"):
        partition_spec(axes)


def test_sharding_splits_and_replicated_copies():
    mesh = make_mesh(2, 2, 2)
    x = jax.device_put(jnp.zeros((8, 4)), sharding(mesh, ("batch", "length"), (8, 4)))
    assert {shard.data.shape for shard in x.addressable_shards} == {(2, 4)}
    y = jax.device_put(jnp.zeros((8, 4)), replicated(mesh))
    assert {shard.data.shape for shard in y.addressable_shards} == {(8, 4)}


def test_sizes_that_do_not_divide_are_refused():
    mesh = make_mesh(2, 2, 2)
    with pytest.raises(UserError, match="batch of size 6 does not divide by 4"):
        sharding(mesh, ("batch", "length"), (6, 4))
    with pytest.raises(UserError, match="mlp of size 5 does not divide by 2"):
        sharding(mesh, ("embed", "mlp"), (4, 5))


def test_single_process_with_shared_devices_generates_on_the_learner_mesh():
    mesh = make_mesh(2, 2, 2)
    assert local_meshes(mesh) == (mesh, mesh)


def test_disjoint_meshes_hold_whole_tensor_groups():
    mesh = make_mesh(2, 2, 2)
    policy, simulator = local_meshes(mesh, 2)
    groups = mesh.devices.reshape(4, 2)
    np.testing.assert_array_equal(policy.devices, groups[:3, None])
    np.testing.assert_array_equal(simulator.devices, groups[3:, None])
    assert dict(policy.shape) == {"data": 3, "fsdp": 1, "tensor": 2}
    assert policy.axis_names == simulator.axis_names == AXES


@pytest.mark.parametrize("devices", [1, 3, 8, -2])
def test_impossible_simulator_devices_are_refused(devices):
    with pytest.raises(UserError, match=f"simulator.devices={devices} must be a multiple of"):
        local_meshes(make_mesh(2, 2, 2), devices)


def test_simulator_groups_may_differ_in_size_from_the_policy():
    mesh = make_mesh(1, 4, 2)
    for tensor in (1, 4):
        policy, simulator = local_meshes(mesh, 0, tensor)
        assert policy == mesh
        assert dict(simulator.shape) == {"data": 8 // tensor, "fsdp": 1, "tensor": tensor}
        np.testing.assert_array_equal(simulator.devices.reshape(-1), mesh.devices.reshape(-1))
    policy, simulator = local_meshes(mesh, 4, 4)
    assert dict(policy.shape) == {"data": 2, "fsdp": 1, "tensor": 2}
    assert simulator.devices.shape == (1, 1, 4)
    assert not {*policy.devices.flat} & {*simulator.devices.flat}
    for devices, tensor in ((0, 3), (4, 8), (0, -1)):
        with pytest.raises(UserError, match=f"simulator.tensor={tensor} does not divide"):
            local_meshes(mesh, devices, tensor)


class _Device:
    def __init__(self, number, process_index):
        self.id, self.process_index = number, process_index


def _mesh_of(monkeypatch, owners, shape, process):
    """Returns a mesh of fake devices as `process` sees it; `owners[i]` owns device i."""
    devices = np.array([_Device(i, owner) for i, owner in enumerate(owners)]).reshape(shape)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: process)
    return Mesh(devices, AXES, axis_types=(AxisType.Auto,) * 3)


@pytest.mark.parametrize("process", [0, 1])
def test_process_generates_on_its_own_devices(monkeypatch, process):
    owners = (0, 0, 0, 0, 1, 1, 1, 1)
    mesh = _mesh_of(monkeypatch, owners, (1, 4, 2), process)
    for devices in (0, 2):
        policy, simulator = local_meshes(mesh, devices)
        ids = [[d.id - 4 * process for d in m.devices.flat] for m in (policy, simulator)]
        assert ids == ([[0, 1, 2, 3]] * 2 if devices == 0 else [[0, 1], [2, 3]])
        assert policy.shape["tensor"] == simulator.shape["tensor"] == 2


def test_mesh_without_a_whole_group_in_each_process_is_refused(monkeypatch):
    with pytest.raises(UserError, match="config.mesh.tensor=4 spans processes"):
        local_meshes(_mesh_of(monkeypatch, (0, 0, 1, 1), (1, 1, 4), 0))
    with pytest.raises(UserError, match="leaves out process 1; raise config.mesh's"):
        local_meshes(_mesh_of(monkeypatch, (0, 0), (2, 1, 1), 0))
