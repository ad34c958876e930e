"""Config of the compile job, as frozen dataclasses."""

from dataclasses import dataclass
from typing import Annotated, Any

from zerosearch_jax.ranges import Choice, CountOrZero, Devices, DevicesOrZero, Rows
from zerosearch_jax.training.config import REMAT


@dataclass(frozen=True)
class ChosenMeshConfig:
    """Device mesh. Sizes of 0 are chosen by the job and printed."""

    data: DevicesOrZero
    """Parts that share a batch. 0 takes the number of slices."""
    fsdp: DevicesOrZero
    """Parts over which parameters and batch rows are sharded."""
    tensor: DevicesOrZero
    """Parts over which attention heads, MLP features and the vocabulary are sharded."""


@dataclass(frozen=True)
class CompileConfig:
    """Compilation of an rl config's programs for a TPU topology, without a TPU (job compile)."""

    job: str
    """Name of the job."""
    recipe: str
    """The rl config file."""
    preset: str
    """Preset of the recipe."""
    topology: str
    """Chip and shape of each slice, such as v5e:8x8."""
    slices: Devices
    """Slices. Traffic between slices is counted as if it went over the chips' links."""
    mesh: ChosenMeshConfig
    """Mesh of the policy."""
    simulator_mesh: ChosenMeshConfig
    """Mesh of the simulator. Its tensor is search.simulator.tensor in a run."""
    int8_simulator: bool
    """Value of search.simulator.generator.int8_weights in a run."""
    rows_each: Rows
    """Rows of a microbatch per data × fsdp part of the mesh."""
    slots_each: Rows
    """Slots of a generator per data × fsdp part of its mesh."""
    microbatches: CountOrZero
    """Microbatches per update. 0 takes as many as the preset's episodes can need."""
    remat: Annotated[str, Choice(*REMAT)]
    """Value of learner.remat."""
    programs: tuple[str, ...]
    """Programs to compile."""
    models: dict[str, dict[str, Any]]
    """Sizes of the models by name, from their config.json. `name` is the rl config's model."""
