"""Configs of the pipelines miniature and algorithms, as frozen dataclasses."""

from dataclasses import dataclass

from zerosearch_jax.errors import UserError
from zerosearch_jax.ranges import Count, Seed, Threads


@dataclass(frozen=True)
class MiniatureConfig:
    """The paper in miniature (job miniature)."""

    job: str
    """Name of the job."""
    recipe: str
    """Config file whose presets are the stages."""
    prefix: str
    """Prefix of those presets: `quick/`, or ""."""
    seeds: tuple[Seed, ...]
    """Seeds of each arm."""
    baseline_seeds: tuple[Seed, ...]
    """Those of `seeds` with which the baselines run."""
    arms: tuple[str, ...]
    """Ways to train: presets of the recipe."""
    baselines: tuple[str, ...]
    """Ways to train of other papers: presets of the recipe."""
    noise_arms: tuple[str, ...]
    """Arms that are also evaluated with noisy engines."""
    start_policies: dict[str, str]
    """Untrained policies that are evaluated with every method: name and model directory."""
    workers: Threads
    """Stages that run at once."""

    def __post_init__(self):
        if not self.seeds or not self.arms:
            raise UserError("seeds and arms must not be empty; give at least one of each")
        if extra := set(self.baseline_seeds) - set(self.seeds):
            raise UserError(f"baseline_seeds has {sorted(extra)}, seeds does not; add it to seeds")
        if extra := set(self.noise_arms) - set(self.arms):
            raise UserError(f"noise_arms has {sorted(extra)}, arms does not; add it to arms")


@dataclass(frozen=True)
class AlgorithmsConfig:
    """Comparison of RL algorithms with one budget (job algorithms)."""

    job: str
    """Name of the job."""
    directory: str
    """Directory of the rl config files."""
    configs: tuple[str, ...]
    """Config files to compare, without .py."""
    seed: Seed
    """Seed of every run."""
    steps: Count
    """Training steps of every run."""
    episodes_per_step: Count
    """Episodes per step that every config must have."""
    test_questions: Count
    """Questions of the evaluation after training."""

    def __post_init__(self):
        if not self.configs:
            raise UserError("configs is empty; give at least one config file")
