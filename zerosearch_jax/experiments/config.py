"""Configs of the pipelines miniature and algorithms, as frozen dataclasses."""

from dataclasses import dataclass


@dataclass(frozen=True)
class MiniatureConfig:
    """The paper in miniature (job miniature)."""

    job: str
    """Name of the job."""
    recipe: str
    """Config file whose presets are the stages."""
    prefix: str
    """Prefix of those presets: `quick/`, or ""."""
    seeds: tuple[int, ...]
    """Seeds of each arm."""
    baseline_seeds: tuple[int, ...]
    """Those of `seeds` with which the baselines run."""
    arms: tuple[str, ...]
    """Ways to train: presets of the recipe."""
    baselines: tuple[str, ...]
    """Ways to train of other papers: presets of the recipe."""
    noise_arms: tuple[str, ...]
    """Arms that are also evaluated with noisy engines."""
    start_policies: dict[str, str]
    """Untrained policies that are evaluated with every method: name and model directory."""
    workers: int
    """Stages that run at once."""


@dataclass(frozen=True)
class AlgorithmsConfig:
    """Comparison of RL algorithms with one budget (job algorithms)."""

    job: str
    """Name of the job."""
    directory: str
    """Directory of the rl config files."""
    configs: tuple[str, ...]
    """Config files to compare, without .py."""
    seed: int
    """Seed of every run."""
    steps: int
    """Training steps of every run."""
    episodes_per_step: int
    """Episodes per step that every config must have."""
    test_questions: int
    """Questions of the evaluation after training."""
