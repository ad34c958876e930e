"""Search-R1 (arXiv 2503.09516): training on a real engine with exact match as reward.

  python -m zerosearch_jax.main --config=configs/search_r1.py[:PRESET]

Differs from grpo.py: BM25 instead of the simulator, and the EM reward. The presets of the models of
ZeroSearch's paper have 3 documents per search and at most 4 searches. Search-R1 itself uses E5 over
Wikipedia 2018 and mainly PPO with 512 questions per step. This config keeps GRPO and its batch, so
that only engine and reward differ. BM25 searches the embedded world unless search.corpus names a
file; for NQ and HotpotQA questions, set it to passages that answer them.

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
    config.reward.name = "em"
    if preset not in ("", "smollm2-135m"):
        config.search.topk = config.eval.search.topk = 3
        config.rollout.max_turns = 4
    return config
