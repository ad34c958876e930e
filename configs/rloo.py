"""RLOO (Ahmadian et al., arXiv 2402.14740) against a simulated search engine.

  python -m zerosearch_jax.main --config=configs/rloo.py[:PRESET]

Differs from grpo.py: an episode's baseline is the mean reward of the remaining episodes of its
group. The KL (k1, summed over the episode) is subtracted from the reward.

Presets, hardware and time are those of grpo.py. Embedded world, 10 steps: EM 0.804
(docs/algorithms.md).
"""

from pathlib import Path

from ml_collections import ConfigDict

from zerosearch_jax import config_flags

GRPO = Path(__file__).with_name("grpo.py")
PRESETS = config_flags.presets(GRPO)


def get_config(preset: str = "") -> ConfigDict:
    config = config_flags.load(f"{GRPO}:{preset}")
    config.update(
        dict(advantage=dict(estimator="rloo"), kl=dict(apply_to="reward", estimator="k1"))
    )
    return config
