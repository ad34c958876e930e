"""The settings of DAPO (arXiv 2503.14476) against a simulated search engine.

  python -m zerosearch_jax.main --config=configs/dapo.py[:PRESET]

Differs from grpo.py: a higher upper clip, two updates per step, dynamic sampling, no KL,
and no loss on truncated episodes. Both use the token mean.

Presets, hardware and time are those of grpo.py. Embedded world, 10 steps: EM 0.771
(docs/algorithms.md).
"""

from pathlib import Path

from ml_collections import ConfigDict

from zerosearch_jax import config_flags

GRPO = Path(__file__).with_name("grpo.py")
PRESETS = config_flags.presets(GRPO)


def get_config(preset: str = "") -> ConfigDict:
    config = config_flags.load(f"{GRPO}:{preset}")
    config.rollout.max_rounds = 3
    episodes = config.rollout.questions_per_step * config.rollout.group_size
    config.update(
        dict(
            loss=dict(clip_high=0.28),
            rl=dict(minibatch_episodes=episodes // 2, overlong="mask"),
            kl=dict(coef=0.0),
        )
    )
    return config
