"""Dr. GRPO (arXiv 2503.20783) against a simulated search engine.

  python -m zerosearch_jax.main --config=configs/dr_grpo.py[:PRESET]

Differs from grpo.py: advantages are not divided by the group's standard deviation, and each token
has the weight 1 / (episodes × most policy tokens of an episode). The paper has no KL term; this
config keeps grpo.py's, so that the two can be compared.

Presets, hardware and time are those of grpo.py. Embedded world, 10 steps: EM 0.812
(docs/algorithms.md).
"""

from pathlib import Path

from ml_collections import ConfigDict

from zerosearch_jax import config_flags

GRPO = Path(__file__).with_name("grpo.py")
PRESETS = config_flags.presets(GRPO)


def get_config(preset: str = "") -> ConfigDict:
    config = config_flags.load(f"{GRPO}:{preset}")
    most = (config.rollout.max_turns + 1) * config.rollout.response_tokens
    config.update(
        dict(
            advantage=dict(normalize_std=False),
            loss=dict(aggregate="fixed_length", fixed_tokens=most),
        )
    )
    return config
