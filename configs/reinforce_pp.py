"""REINFORCE++ (arXiv 2501.03262) against a simulated search engine.

  python -m zerosearch_jax.main --config=configs/reinforce_pp.py[:PRESET]

Differs from grpo.py: one episode per question, the KL (k1) in each token's reward, returns
whitened over all tokens of the step.

Presets, hardware and time are those of grpo.py. Embedded world, 10 steps: EM 0.779
(docs/algorithms.md).
"""

from pathlib import Path

from ml_collections import ConfigDict

from zerosearch_jax import config_flags

GRPO = Path(__file__).with_name("grpo.py")
PRESETS = config_flags.presets(GRPO)


def get_config(preset: str = "") -> ConfigDict:
    config = config_flags.load(f"{GRPO}:{preset}")
    rollout = config.rollout
    rollout.questions_per_step *= rollout.group_size
    rollout.group_size = 1
    config.update(
        dict(advantage=dict(estimator="reinforce_pp"), kl=dict(apply_to="reward", estimator="k1"))
    )
    return config
