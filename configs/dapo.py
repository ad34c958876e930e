"""DAPO's settings (arXiv 2503.14476) against a simulated search engine.

  python -m zerosearch_jax.main --config=configs/dapo.py[:PRESET]

The presets are those of grpo.py; what differs: a higher upper clip, several updates a step,
dynamic sampling, episodes that ran out of room masked, no KL. Token-mean is grpo.py's, too.
"""

from pathlib import Path

from ml_collections import ConfigDict

from zerosearch_jax import config_flags


def get_config(preset: str = "") -> ConfigDict:
    config = config_flags.load(f"{Path(__file__).with_name('grpo.py')}:{preset}")
    config.rollout.max_rounds = 3
    config.update(
        dict(loss=dict(clip_high=0.28), rl=dict(minibatches=2, overlong="mask"), kl=dict(coef=0.0))
    )
    return config
