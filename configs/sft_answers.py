"""The SFT baseline: a policy is fine-tuned to answer the training questions at once.

  python -m zerosearch_jax.main --config=configs/sft_answers.py

On top of sft_policy.py; the examples are questions with their gold answers, no search, no
reasoning (the baseline of Search-R1, arXiv 2503.09516 §4). Judge it with eval.py's method direct.
"""

from pathlib import Path

from ml_collections import ConfigDict

from zerosearch_jax import config_flags


def get_config(preset: str = "") -> ConfigDict:
    config = config_flags.load(f"{Path(__file__).with_name('sft_policy.py')}:{preset}").unlock()
    config.init = config.init or "zerosearch_jax/assets/policy"
    config.data.update(dict(examples="answers", source="world", split="train", inserted_weight=0.0))
    config.optimizer.update(dict(learning_rate=1e-3, warmup_steps=10, schedule_steps=100))
    config.sft.steps = 100
    return config.lock()
