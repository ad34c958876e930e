"""GRPO on low-rank adapters (arXiv 2106.09685) against a simulated search engine.

  python -m zerosearch_jax.main --config=configs/lora.py[:PRESET]

The presets are those of grpo.py; what differs: only adapters of rank 16 are trained, at four times
the learning rate; the reference is the model with its adapters off.
"""

from pathlib import Path

from ml_collections import ConfigDict

from zerosearch_jax import config_flags


def get_config(preset: str = "") -> ConfigDict:
    config = config_flags.load(f"{Path(__file__).with_name('grpo.py')}:{preset}")
    config.lora.rank = 16
    config.optimizer.learning_rate *= 4
    return config
