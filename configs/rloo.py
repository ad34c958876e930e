"""RLOO (Ahmadian et al., arXiv 2402.14740) against a simulated search engine.

  python -m zerosearch_jax.main --config=configs/rloo.py[:PRESET]

The presets are those of grpo.py; what differs: an episode's baseline is the mean reward of the
others of its group, and the KL (k1, summed over the episode) is taken off the reward.
"""

from pathlib import Path

from ml_collections import ConfigDict

from zerosearch_jax import config_flags


def get_config(preset: str = "") -> ConfigDict:
    config = config_flags.load(f"{Path(__file__).with_name('grpo.py')}:{preset}")
    config.update(
        dict(advantage=dict(estimator="rloo"), kl=dict(apply_to="reward", estimator="k1"))
    )
    return config
