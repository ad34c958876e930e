"""The device mesh and the table that maps logical axes to mesh axes.

Models name the axes of their parameters. The table alone decides how a parameter is sharded.
"""

import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from zerosearch_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")
ROWS = ("data", "fsdp")  # the mesh axes that shard the rows of a batch

# Maps the logical axis of a parameter or activation to a mesh axis (None: replicated).
Rules = Mapping[str, str | tuple[str, ...] | None]
TRAIN_RULES: Rules = {
    "layers": None,
    "vocab": "tensor",
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "batch": ROWS,
    "length": None,
}

# A generator shards weights over `tensor` only: an all-gather over `fsdp` for each token would cost
# more than the token.
GENERATE_RULES: Rules = {**TRAIN_RULES, "embed": None}


def make_mesh(
    data: int = 1, fsdp: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """Returns a `data × fsdp × tensor` mesh over the first of `devices` (default: all devices).

    With several TPU slices, only the data axis spans slices, because their network is slow.

    Raises:
      UserError: the mesh needs more devices than there are; or, with several slices, `data` is not
        a multiple of the number of slices, or some chips are unused.
    """
    devices = list(jax.devices() if devices is None else devices)
    size = data * fsdp * tensor
    described = f"mesh data={data} × fsdp={fsdp} × tensor={tensor}"
    if size > len(devices):
        raise UserError(
            f"{described} needs {size} devices, there are {len(devices)}; lower one of "
            "config.mesh's sizes"
        )
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    # Mesh axes may share a torus axis: 8 chips of a 4 × 4 slice are two of its rows.
    split = dict(allow_split_physical_axes=True)
    if slices == 1:
        return _mesh(mesh_utils.create_device_mesh((data, fsdp, tensor), devices[:size], **split))
    if data % slices or size != len(devices):
        raise UserError(
            f"{described}: there are {slices} slices of {len(devices) // slices} chips; data must "
            "be a multiple of the number of slices, and the mesh must use all chips"
        )
    inner = (data // slices, fsdp, tensor)
    return _mesh(mesh_utils.create_hybrid_device_mesh(inner, (slices, 1, 1), devices, **split))


def local_meshes(
    mesh: Mesh, simulator_devices: int = 0, simulator_tensor: int = 0
) -> tuple[Mesh, Mesh]:
    """Returns the meshes of this process's policy generator and simulator generator.

    Each mesh holds this process's devices of `mesh` as whole tensor groups; a group is a replica.
    With one process and shared devices, the policy's mesh is `mesh`.

    Args:
      simulator_devices: number of each process's devices, taken from the end, that only the
        simulator uses. 0: policy and simulator alternate on all devices.
      simulator_tensor: devices per replica of the simulator. 0: the same as for the policy.

    Raises:
      UserError: a tensor group spans processes, a process has no group, or the policy or the
        simulator has no devices or an incomplete group.
    """
    tensor = mesh.shape["tensor"]
    simulator_tensor = simulator_tensor or tensor
    groups = mesh.devices.reshape(-1, tensor)
    owners = [{device.process_index for device in group} for group in groups]
    if any(len(owner) > 1 for owner in owners):
        raise UserError(
            f"config.mesh.tensor={tensor} spans processes of {jax.local_device_count()} devices, "
            "and a generator uses the devices of one process; lower it and raise fsdp"
        )
    idle = set(range(jax.process_count())) - set.union(*owners)
    if idle:
        raise UserError(
            f"the mesh of {mesh.size} devices leaves out process {min(idle)}; raise config.mesh's "
            f"sizes to all {jax.device_count()} devices, for example with --config.mesh.data"
        )
    own = groups[[owner == {jax.process_index()} for owner in owners]].reshape(-1)
    if simulator_devices % tensor or not 0 <= simulator_devices < own.size:
        raise UserError(
            f"config.search.simulator.devices={simulator_devices} must be a multiple of "
            f"config.mesh.tensor={tensor} below the {own.size} devices of a process"
        )
    policy_devices = own[: own.size - simulator_devices]
    simulators = own[-simulator_devices:]  # all of them if the simulator has no devices alone
    if simulator_tensor < 0 or simulators.size % simulator_tensor:
        raise UserError(
            f"config.search.simulator.tensor={simulator_tensor} does not divide the simulator's "
            f"{simulators.size} devices of a process; choose a divisor"
        )
    whole = jax.process_count() == 1 and not simulator_devices
    if whole and simulator_tensor == tensor:
        return mesh, mesh
    policy_mesh = mesh if whole else _mesh(policy_devices.reshape(-1, 1, tensor))
    return policy_mesh, _mesh(simulators.reshape(-1, 1, simulator_tensor))


def _mesh(grid: np.ndarray) -> Mesh:
    """Returns the mesh of a `[data, fsdp, tensor]` array of devices."""
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 3)


def partition_spec(axes: Sequence[str], rules: Rules = TRAIN_RULES) -> PartitionSpec:
    """Returns the partition of an array with these logical axes.

    Raises:
      ValueError: two dimensions map to the same mesh axis.
    """
    spec = [rules[axis] for axis in axes]
    used = [name for entry in spec for name in _names(entry)]
    if len(used) != len(set(used)):
        raise ValueError(f"logical axes {tuple(axes)} use a mesh axis twice: {used}")
    return PartitionSpec(*spec)


def sharding(
    mesh: Mesh, axes: Sequence[str], shape: Sequence[int], rules: Rules = TRAIN_RULES
) -> NamedSharding:
    """Returns the sharding of an array of `shape` with logical axes `axes`.

    Raises:
      UserError: a dimension is not a multiple of the size of its mesh axes.
    """
    spec = partition_spec(axes, rules)
    for axis, size, entry in zip(axes, shape, spec, strict=True):
        names = _names(entry)
        parts = math.prod(mesh.shape[name] for name in names)
        if size % parts:
            raise UserError(
                f"{axis} of size {size} does not divide by {parts} "
                f"(mesh {' × '.join(names)}); choose config.mesh sizes that divide it"
            )
    return NamedSharding(mesh, spec)


def check_divides(
    mesh: Mesh, dimensions: Sequence[tuple[str, int]], rules: Rules = TRAIN_RULES
) -> None:
    """Checks that the mesh divides every parameter dimension, given as (logical axis, size).

    Raises:
      UserError: a size does not divide. The message names the nearest valid mesh with the same
        number of devices.
    """
    fits = dict(mesh.shape)
    for name in ("fsdp", "tensor"):
        sizes = [size for axis, size in dimensions if rules[axis] == name]
        fits[name] = math.gcd(mesh.shape[name], *sizes)
        fits["data"] *= mesh.shape[name] // fits[name]
    for axis, size in dimensions:
        name = rules[axis]
        if name is not None and size % mesh.shape[name]:
            nearest = " ".join(f"--config.mesh.{name}={n}" for name, n in fits.items())
            raise UserError(
                f"{axis} of size {size} does not divide by {mesh.shape[name]} (mesh {name}); the "
                f"nearest mesh that works is {nearest}"
            )


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding that replicates an array on every device of the mesh."""
    return NamedSharding(mesh, PartitionSpec())


def sharding_of_tokens(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of `[B, T, ...]`: rows over the data axes, tokens over `tensor`."""
    return NamedSharding(mesh, PartitionSpec(ROWS, "tensor"))


def sharding_of_rows(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of arrays `[rows, ...]`: rows over the data axes."""
    return NamedSharding(mesh, PartitionSpec(ROWS))


def sharding_of_batch(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of learner arrays `[M, R, T]`: rows over the data axes."""
    return NamedSharding(mesh, PartitionSpec(None, ROWS))


def _names(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """Returns the mesh axes of one entry of the rules."""
    return (entry,) if isinstance(entry, str) else entry or ()
