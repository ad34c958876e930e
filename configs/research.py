"""ReSearch (arXiv 2503.19470): GRPO on a real engine; a little for the format where F1 is 0.

  python -m zerosearch_jax.main --config=configs/research.py[:PRESET]

The presets are those of grpo.py; what differs: BM25 in the simulator's place and the reward's
rule. The paper's engine is E5 over Wikipedia 2018, its questions are MuSiQue's. As to BM25 in the
paper presets see search_r1.py.
"""

from pathlib import Path

from ml_collections import ConfigDict

from zerosearch_jax import config_flags


def get_config(preset: str = "") -> ConfigDict:
    config = config_flags.load(f"{Path(__file__).with_name('grpo.py')}:{preset}")
    config.search.engine = "bm25"
    config.reward.rule = "research"
    return config
