"""The device mesh and the one table from logical axes to mesh axes.

Models name the axes of their parameters; nothing else decides how a parameter is sharded.
"""

import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from zerosearch_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")
ROWS = ("data", "fsdp")  # the axes that rows of a batch are split over

# Logical axis of a parameter or activation -> mesh axis (None: replicated).
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

# A generator's weights are whole on every replica but for `tensor`: gathering them for each token
# would cost more than the token.
GENERATE_RULES: Rules = {**TRAIN_RULES, "embed": None}


def make_mesh(
    data: int = 1, fsdp: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """A `data × fsdp × tensor` mesh over the first devices (or over those given).

    Where they belong to several TPU slices each slice holds a part of the data axis, which alone
    goes over the slow network between slices.

    Raises:
      UserError: the product of the sizes is more than the devices there are; or there are several
        slices, of which `data` is no multiple or whose chips are not all used.
    """
    devices = list(jax.devices() if devices is None else devices)
    size = data * fsdp * tensor
    asked = f"mesh data={data} × fsdp={fsdp} × tensor={tensor}"
    if size > len(devices):
        raise UserError(
            f"{asked} needs {size} devices, there are {len(devices)}; lower one of config.mesh's "
            "sizes"
        )
    types = (AxisType.Auto,) * 3
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    # A torus axis may be split between mesh axes: 8 chips of a 4 × 4 slice have to be two of its
    # rows.
    split = dict(allow_split_physical_axes=True)
    if slices == 1:
        placed = mesh_utils.create_device_mesh((data, fsdp, tensor), devices[:size], **split)
        return Mesh(placed, AXES, axis_types=types)
    if data % slices or size != len(devices):
        raise UserError(
            f"{asked}: there are {slices} slices of {len(devices) // slices} chips; data must be "
            "a multiple of the slices, and all chips be used"
        )
    inner = (data // slices, fsdp, tensor)
    placed = mesh_utils.create_hybrid_device_mesh(inner, (slices, 1, 1), devices, **split)
    return Mesh(placed, AXES, axis_types=types)


def local_meshes(
    mesh: Mesh, simulator_devices: int = 0, simulator_tensor: int = 0
) -> tuple[Mesh, Mesh]:
    """The meshes of this process's generators, the policy's and the simulator's.

    They hold this process's own devices of `mesh`, whole groups of its tensor axis; each group is
    a replica. One process's policy that shares its devices uses `mesh` itself.

    Args:
      simulator_devices: so many of each process's devices are the simulator's alone, the last
        ones; 0: policy and simulator both use all, in turns.
      simulator_tensor: devices of one replica of the simulator; 0: as many as of the policy.

    Raises:
      UserError: a group spans processes, a process has no group, or one of the two has no devices
        or not whole groups of them.
    """
    tensor = mesh.shape["tensor"]
    simulator_tensor = simulator_tensor or tensor
    groups = mesh.devices.reshape(-1, tensor)
    owners = [{device.process_index for device in group} for group in groups]
    if any(len(owner) > 1 for owner in owners):
        raise UserError(
            f"config.mesh.tensor={tensor} spans processes of {jax.local_device_count()} devices, "
            "and a generator lives on one process's; lower it and raise fsdp"
        )
    idle = set(range(jax.process_count())) - set.union(*owners)
    if idle:
        raise UserError(
            f"the mesh of {mesh.size} devices leaves out process {min(idle)}; raise config.mesh's "
            f"sizes to all {jax.device_count()} devices, say with --config.mesh.data"
        )
    own = groups[[owner == {jax.process_index()} for owner in owners]].reshape(-1)
    if simulator_devices % tensor or not 0 <= simulator_devices < own.size:
        raise UserError(
            f"config.search.simulator.devices={simulator_devices} must be a multiple of "
            f"config.mesh.tensor={tensor} below the {own.size} devices of a process"
        )
    policys, simulators = own, own
    if simulator_devices:
        policys, simulators = own[:-simulator_devices], own[-simulator_devices:]
    if simulator_tensor < 0 or simulators.size % simulator_tensor:
        raise UserError(
            f"config.search.simulator.tensor={simulator_tensor} does not divide the simulator's "
            f"{simulators.size} devices of a process; choose a size that does"
        )
    whole = jax.process_count() == 1 and not simulator_devices
    if whole and simulator_tensor == tensor:
        return mesh, mesh
    return mesh if whole else _replicas(policys, tensor), _replicas(simulators, simulator_tensor)


def _replicas(devices: np.ndarray, tensor: int) -> Mesh:
    grid = devices.reshape(-1, 1, tensor)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 3)


def partition_spec(axes: Sequence[str], rules: Rules = TRAIN_RULES) -> PartitionSpec:
    """The partition of an array whose dimensions bear these logical names."""
    spec = [rules[axis] for axis in axes]
    used = [name for entry in spec if entry for name in (entry if _many(entry) else (entry,))]
    if len(used) != len(set(used)):
        raise ValueError(f"logical axes {tuple(axes)} use a mesh axis twice: {used}")
    return PartitionSpec(*spec)


def sharding(
    mesh: Mesh, axes: Sequence[str], shape: Sequence[int], rules: Rules = TRAIN_RULES
) -> NamedSharding:
    """The sharding of an array of `shape` whose dimensions bear the logical names `axes`.

    Raises:
      UserError: a dimension does not divide by its mesh axes.
    """
    spec = partition_spec(axes, rules)
    for axis, size, entry in zip(axes, shape, spec, strict=True):
        names = () if entry is None else entry if _many(entry) else (entry,)
        parts = 1
        for name in names:
            parts *= mesh.shape[name]
        if size % parts:
            raise UserError(
                f"{axis} of size {size} does not divide by {parts} "
                f"(mesh {' × '.join(names)}); choose config.mesh sizes that divide it"
            )
    return NamedSharding(mesh, spec)


def check_divides(
    mesh: Mesh, dimensions: Sequence[tuple[str, int]], rules: Rules = TRAIN_RULES
) -> None:
    """Refuses a mesh that some parameter's dimension, (logical axis, size), does not divide by.

    Raises:
      UserError: it names the nearest mesh of as many devices that works.
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
    """The sharding that keeps a whole copy on every device of the mesh."""
    return NamedSharding(mesh, PartitionSpec())


def sharding_of_tokens(mesh: Mesh) -> NamedSharding:
    """Of `[B, T, …]`: rows over the data axes, their tokens over `tensor`."""
    return NamedSharding(mesh, PartitionSpec(ROWS, "tensor"))


def sharding_of_rows(mesh: Mesh) -> NamedSharding:
    """The sharding of arrays `[rows, ...]`: rows over the data axes."""
    return NamedSharding(mesh, PartitionSpec(ROWS))


def sharding_of_batch(mesh: Mesh) -> NamedSharding:
    """The sharding of learner arrays `[M, R, T]`: rows over the data axes."""
    return NamedSharding(mesh, PartitionSpec(None, ROWS))


def _many(entry) -> bool:
    return isinstance(entry, tuple)
