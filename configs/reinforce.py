"""REINFORCE with the batch's mean reward as baseline, against a simulated search engine.

  python -m zerosearch_jax.main --config=configs/reinforce.py[:PRESET]

The presets are those of grpo.py; as in the released script only the advantages differ: reward
less the mean of the step's rewards, not normalised.
"""

from pathlib import Path

from ml_collections import ConfigDict

from zerosearch_jax import config_flags


def get_config(preset: str = "") -> ConfigDict:
    config = config_flags.load(f"{Path(__file__).with_name('grpo.py')}:{preset}")
    config.advantage.update(dict(estimator="reinforce", baseline="batch_mean"))
    return config
