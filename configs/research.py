"""ReSearch (arXiv 2503.19470): GRPO on a real engine, a small reward for the format if F1 is 0.

  python -m zerosearch_jax.main --config=configs/research.py[:PRESET]

Differs from grpo.py: BM25 instead of the simulator, and the reward rule. The paper uses E5 over
Wikipedia 2018 and the questions of MuSiQue. The presets of the paper's models need
passages for BM25: see search_r1.py.

Presets, hardware and time are those of grpo.py. Score in the miniature: docs/miniature/report.md.
"""

from pathlib import Path

from ml_collections import ConfigDict

from zerosearch_jax import config_flags

GRPO = Path(__file__).with_name("grpo.py")
PRESETS = config_flags.presets(GRPO)


def get_config(preset: str = "") -> ConfigDict:
    config = config_flags.load(f"{GRPO}:{preset}")
    config.search.engine = "bm25"
    config.curriculum.end = 0.0  # only the simulator reads it
    config.reward.rule = "research"
    return config
