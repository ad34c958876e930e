"""R1-Searcher (arXiv 2503.05592): a real engine and a reward in two stages.

  python -m zerosearch_jax.main --config=configs/r1_searcher.py[:PRESET]

Differs from reinforce_pp.py, the paper's algorithm: BM25 instead of the simulator, and a reward in
two stages: first for searches and format alone, then F1 minus a penalty for a wrong format. The
paper's first stage has 350 of its 8498 questions. The presets of the paper's models use the same
share of the steps, the default and smollm2-135m a sixth. The paper has 16 episodes per question,
this config one. BM25 needs passages: see search_r1.py.

Presets, hardware and time are those of grpo.py. Score in the miniature: docs/miniature/report.md.
"""

from pathlib import Path

from ml_collections import ConfigDict

from zerosearch_jax import config_flags

REINFORCE_PP = Path(__file__).with_name("reinforce_pp.py")
PRESETS = config_flags.presets(REINFORCE_PP)


def get_config(preset: str = "") -> ConfigDict:
    config = config_flags.load(f"{REINFORCE_PP}:{preset}")
    share = 1 / 6 if preset in ("", "smollm2-135m") else 350 / 8498
    config.search.engine = "bm25"
    config.curriculum.end = 0.0  # only the simulator reads it
    config.reward.rule = "r1_searcher"
    config.reward.stage_one_steps = round(share * config.rl.steps)
    return config
