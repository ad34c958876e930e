"""RL without search, as DeepSeek-R1 does it (arXiv 2501.12948): the baseline "R1".

  python -m zerosearch_jax.main --config=configs/r1.py[:PRESET]

The presets are those of grpo.py; what differs: one turn, no engine. A search ends the episode
unanswered, in the closing evaluation, too. Prompt, data and reward (F1) stay grpo.py's, so that
search is all that differs; R1's own rewards also pay for the format.
"""

from pathlib import Path

from ml_collections import ConfigDict

from zerosearch_jax import config_flags


def get_config(preset: str = "") -> ConfigDict:
    config = config_flags.load(f"{Path(__file__).with_name('grpo.py')}:{preset}")
    config.rollout.max_turns = 0
    config.search.engine = config.eval.search.engine = "none"
    return config
