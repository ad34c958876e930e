"""CISPO (MiniMax-M1, arXiv 2506.13585) against a simulated search engine.

  python -m zerosearch_jax.main --config=configs/cispo.py[:PRESET]

The presets are those of grpo.py; what differs: the ratio is clipped as a weight, so no token loses
its gradient; no lower bound; two updates a step (with one, every ratio would be 1).
"""

from pathlib import Path

from ml_collections import ConfigDict

from zerosearch_jax import config_flags


def get_config(preset: str = "") -> ConfigDict:
    config = config_flags.load(f"{Path(__file__).with_name('grpo.py')}:{preset}")
    config.update(
        dict(loss=dict(surrogate="cispo", clip_low=1.0, clip_high=0.28), rl=dict(minibatches=2))
    )
    return config
