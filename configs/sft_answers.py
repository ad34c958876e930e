"""The SFT baseline: fine-tunes a policy to answer the training questions without a search.

  python -m zerosearch_jax.main --config=configs/sft_answers.py

Differs from sft_policy.py: the examples are questions with their gold answers, without searches
and without reasoning (the baseline of Search-R1, arXiv 2503.09516 §4). Evaluate it with the method
`direct` of eval.py.

Hardware: 1 CPU core. Time: 2 minutes. Score in the miniature: docs/miniature/report.md.
"""

from pathlib import Path

from ml_collections import ConfigDict

from zerosearch_jax import config_flags

SFT_POLICY = Path(__file__).with_name("sft_policy.py")
PRESETS = config_flags.presets(SFT_POLICY)


def get_config(preset: str = "") -> ConfigDict:
    config = config_flags.load(f"{SFT_POLICY}:{preset}")
    with config.unlocked():
        config.init = config.init or "zerosearch_jax/assets/policy"
        config.data.update(
            dict(examples="answers", source="world", split="train", inserted_weight=0.0)
        )
    config.optimizer.update(dict(learning_rate=1e-3, warmup_steps=10))
    config.sft.steps = 100
    return config
