"""GSPO (arXiv 2507.18071) against a simulated search engine.

  python -m zerosearch_jax.main --config=configs/gspo.py[:PRESET]

The presets are those of grpo.py; what differs: one ratio and one loss for a sequence, its narrow
clip, and four updates a step as in the paper (with one, every ratio would be 1). The embedded
example learns at 5e-4 and not at 1e-6, so there the ratio may move further.
"""

from pathlib import Path

from ml_collections import ConfigDict

from zerosearch_jax import config_flags


def get_config(preset: str = "") -> ConfigDict:
    config = config_flags.load(f"{Path(__file__).with_name('grpo.py')}:{preset}")
    config.update(
        dict(
            loss=dict(
                surrogate="sequence",
                aggregate="sequence_mean",
                clip_low=0.03 if preset == "" else 3e-4,
                clip_high=0.04 if preset == "" else 4e-4,
            ),
            rl=dict(minibatches=4),
        )
    )
    return config
