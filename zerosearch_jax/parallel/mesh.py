"""The device mesh and the one table from logical axes to mesh axes.

Models name the axes of their parameters; nothing else decides how a parameter is sharded.
"""

from collections.abc import Mapping, Sequence

import jax
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

    Raises:
      UserError: the product of the sizes is more than the devices there are.
    """
    devices = list(jax.devices() if devices is None else devices)
    size = data * fsdp * tensor
    if size > len(devices):
        raise UserError(
            f"mesh data={data} × fsdp={fsdp} × tensor={tensor} needs {size} devices, "
            f"there are {len(devices)}; lower one of config.mesh's sizes"
        )
    return jax.make_mesh(
        (data, fsdp, tensor), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices[:size]
    )


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


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding that keeps a whole copy on every device of the mesh."""
    return NamedSharding(mesh, PartitionSpec())


def sharding_of_rows(mesh: Mesh) -> NamedSharding:
    """The sharding of arrays `[rows, ...]`: rows over the data axes."""
    return NamedSharding(mesh, PartitionSpec(ROWS))


def sharding_of_batch(mesh: Mesh) -> NamedSharding:
    """The sharding of learner arrays `[M, R, T]`: rows over the data axes."""
    return NamedSharding(mesh, PartitionSpec(None, ROWS))


def _many(entry) -> bool:
    return isinstance(entry, tuple)
