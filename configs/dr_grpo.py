"""Dr. GRPO (arXiv 2503.20783) against a simulated search engine.

  python -m zerosearch_jax.main --config=configs/dr_grpo.py[:PRESET]

The presets are those of grpo.py; what differs: advantages are not divided by the group's standard
deviation, and a token counts 1 / (episodes × the most tokens an episode may write). The paper has
no KL term; here grpo.py's stays, so that the two can be compared.
"""

from pathlib import Path

from ml_collections import ConfigDict

from zerosearch_jax import config_flags


def get_config(preset: str = "") -> ConfigDict:
    config = config_flags.load(f"{Path(__file__).with_name('grpo.py')}:{preset}")
    most = (config.rollout.max_turns + 1) * config.rollout.response_tokens
    config.update(
        dict(
            advantage=dict(normalize_std=False),
            loss=dict(aggregate="fixed_length", fixed_tokens=most),
        )
    )
    return config
