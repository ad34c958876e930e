"""GRPO on low-rank adapters (arXiv 2106.09685) against a simulated search engine.

  python -m zerosearch_jax.main --config=configs/lora.py[:PRESET]

Differs from grpo.py: only adapters of rank 16 are trained, with four times the learning rate. The
reference policy is the model without its adapters.

Presets, hardware and time are those of grpo.py. Embedded world, 10 steps: EM 0.817
(docs/algorithms.md).
"""

from pathlib import Path

from ml_collections import ConfigDict

from zerosearch_jax import config_flags

GRPO = Path(__file__).with_name("grpo.py")
PRESETS = config_flags.presets(GRPO)


def get_config(preset: str = "") -> ConfigDict:
    config = config_flags.load(f"{GRPO}:{preset}")
    config.lora.rank = 16
    config.optimizer.learning_rate *= 4
    return config
