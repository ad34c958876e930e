"""RL without search, as in DeepSeek-R1 (arXiv 2501.12948): the baseline "R1".

  python -m zerosearch_jax.main --config=configs/r1.py[:PRESET]

Differs from grpo.py: one turn and no engine. A search ends the episode without an answer, also in
evaluations. Prompt, data and reward (F1) are grpo.py's, so that only search differs. R1 itself also
rewards the format.

Presets, hardware and time are those of grpo.py. Score in the miniature: docs/miniature/report.md.
"""

from pathlib import Path

from ml_collections import ConfigDict

from zerosearch_jax import config_flags

GRPO = Path(__file__).with_name("grpo.py")
PRESETS = config_flags.presets(GRPO)


def get_config(preset: str = "") -> ConfigDict:
    config = config_flags.load(f"{GRPO}:{preset}")
    config.rollout.max_turns = 0
    config.search.engine = config.eval.search.engine = "none"
    config.curriculum.end = 0.0  # only the simulator reads it
    return config
