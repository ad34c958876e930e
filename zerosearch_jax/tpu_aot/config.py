"""Config of the compile job, as frozen dataclasses."""

from dataclasses import dataclass
from typing import Any

from zerosearch_jax.training.sections import MeshConfig


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
    slices: int
    """Slices. Traffic between slices is counted as if it went over the chips' links."""
    mesh: MeshConfig
    """Mesh of the policy. Sizes of 0 are chosen by the job and printed."""
    simulator_mesh: MeshConfig
    """Mesh of the simulator. Its tensor is search.simulator.tensor in a run."""
    int8_simulator: bool
    """Value of search.simulator.generator.int8_weights in a run."""
    rows_each: int
    """Rows of a microbatch per data × fsdp part of the mesh."""
    slots_each: int
    """Slots of a generator per data × fsdp part of its mesh."""
    microbatches: int
    """Microbatches per update. 0 takes as many as the preset's episodes can need."""
    remat: str
    """Value of learner.remat."""
    programs: tuple[str, ...]
    """Programs to compile."""
    models: dict[str, dict[str, Any]]
    """Sizes of the models by name, from their config.json. `name` is the rl config's model."""
