"""Search-R1 (arXiv 2503.09516): trained on a real engine, rewarded by exact match.

  python -m zerosearch_jax.main --config=configs/search_r1.py[:PRESET]

The presets are those of grpo.py; what differs: BM25 in the simulator's place, the EM reward, in
the paper presets 3 documents a search and 4 searches. The paper's engine is E5 over Wikipedia
2018, its main algorithm PPO with 512 questions a step; here GRPO and its batch stay, so that the
engine and the reward are all that differs. BM25 searches the embedded world unless search.corpus
names a file: the paper presets need passages that answer their questions.
"""

from pathlib import Path

from ml_collections import ConfigDict

from zerosearch_jax import config_flags


def get_config(preset: str = "") -> ConfigDict:
    config = config_flags.load(f"{Path(__file__).with_name('grpo.py')}:{preset}")
    config.search.engine = "bm25"
    config.reward.name = "em"
    if preset not in ("", "smollm2-135m"):
        config.search.topk = config.eval.search.topk = 3
        config.rollout.max_turns = 4
    return config
