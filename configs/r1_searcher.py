"""R1-Searcher (arXiv 2503.05592): a real engine and two stages of rewards.

  python -m zerosearch_jax.main --config=configs/r1_searcher.py[:PRESET]

The presets are those of grpo.py; what differs: BM25 in the simulator's place; REINFORCE++, the
paper's algorithm, set as in reinforce_pp.py; first a reward for searching and for the format
alone, then F1 less a penalty for a wrong format. The paper's first stage has 350 of its 8498
questions, which is the share of the steps in the paper presets; the embedded default has a sixth.
Its 16 episodes a question are not kept. As to BM25 in the paper presets see search_r1.py.
"""

from pathlib import Path

from ml_collections import ConfigDict

from zerosearch_jax import config_flags


def get_config(preset: str = "") -> ConfigDict:
    config = config_flags.load(f"{Path(__file__).with_name('reinforce_pp.py')}:{preset}")
    share = 1 / 6 if preset in ("", "smollm2-135m") else 350 / 8498
    config.search.engine = "bm25"
    config.reward.rule = "r1_searcher"
    config.reward.stage_one_steps = round(share * config.rl.steps)
    return config
