"""REINFORCE with the mean reward of the batch as baseline (Williams 1992).

  python -m zerosearch_jax.main --config=configs/reinforce.py[:PRESET]

Differs from grpo.py, as in the released script, only in the advantages: reward minus the mean
reward of the step, not normalised.

Presets, hardware and time are those of grpo.py. Embedded world, 10 steps: EM 0.792
(docs/algorithms.md).
"""

from pathlib import Path

from ml_collections import ConfigDict

from zerosearch_jax import config_flags

GRPO = Path(__file__).with_name("grpo.py")
PRESETS = config_flags.presets(GRPO)


def get_config(preset: str = "") -> ConfigDict:
    config = config_flags.load(f"{GRPO}:{preset}")
    config.advantage.update(dict(estimator="reinforce", baseline="batch_mean"))
    return config
