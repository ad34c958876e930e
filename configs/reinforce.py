"""REINFORCE (Williams 1992) against a simulated search engine.

  python -m zerosearch_jax.main --config=configs/reinforce.py[:PRESET]

Differs from grpo.py only in the advantages, which are not normalised. In the default and
smollm2-135m, an advantage is the reward minus the mean reward of the step. In the presets of the
paper's models it is the reward itself, without a baseline, as in the released script.

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
    baseline = "batch_mean" if preset in ("", "smollm2-135m") else "none"
    config.advantage.update(dict(estimator="reinforce", baseline=baseline))
    return config
