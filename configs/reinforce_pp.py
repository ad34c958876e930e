"""REINFORCE++ (arXiv 2501.03262) against a simulated search engine.

  python -m zerosearch_jax.main --config=configs/reinforce_pp.py[:PRESET]

The presets are those of grpo.py; what differs: one episode a question, KL (k1) in each token's
reward, returns whitened over all tokens of the step.
"""

from pathlib import Path

from ml_collections import ConfigDict

from zerosearch_jax import config_flags


def get_config(preset: str = "") -> ConfigDict:
    config = config_flags.load(f"{Path(__file__).with_name('grpo.py')}:{preset}")
    rollout = config.rollout
    rollout.questions_per_step *= rollout.group_size
    rollout.group_size = 1
    config.update(
        dict(advantage=dict(estimator="reinforce_pp"), kl=dict(apply_to="reward", estimator="k1"))
    )
    return config
