"""CISPO (MiniMax-M1, arXiv 2506.13585) against a simulated search engine.

  python -m zerosearch_jax.main --config=configs/cispo.py[:PRESET]

Differs from grpo.py: the clipped ratio is a weight, so no token loses its gradient. The ratio has
no lower bound. A step has two updates, because in its first update every ratio is 1.

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
    episodes = config.rollout.questions_per_step * config.rollout.group_size
    config.update(
        dict(
            loss=dict(surrogate="cispo", clip_low=1.0, clip_high=0.28),
            rl=dict(minibatch_episodes=episodes // 2),
        )
    )
    return config
