"""GSPO (arXiv 2507.18071) against a simulated search engine.

  python -m zerosearch_jax.main --config=configs/gspo.py[:PRESET]

Differs from grpo.py: one ratio and one loss per sequence with a narrow clip, and four updates per
step as in the paper. In a step's first update every ratio is 1. The paper's presets compute in
bfloat16, so they set old_logprobs=learner to keep it 1 (docs/algorithms.md#gspo-in-bfloat16). The
embedded example has a learning rate of 5e-4 and not 1e-6, so its clip is wider.

Presets, hardware and time are those of grpo.py. Embedded world, 10 steps: EM 0.667
(docs/algorithms.md).
"""

from pathlib import Path

from ml_collections import ConfigDict

from zerosearch_jax import config_flags

GRPO = Path(__file__).with_name("grpo.py")
PRESETS = config_flags.presets(GRPO)


def get_config(preset: str = "") -> ConfigDict:
    config = config_flags.load(f"{GRPO}:{preset}")
    embedded = preset == ""
    loss = dict(
        surrogate="sequence",
        aggregate="sequence_mean",
        clip_low=0.03 if embedded else 3e-4,
        clip_high=0.04 if embedded else 4e-4,
    )
    episodes = config.rollout.questions_per_step * config.rollout.group_size
    old_logprobs = "sampler" if embedded else "learner"
    rl = dict(minibatch_episodes=episodes // 4, old_logprobs=old_logprobs)
    config.update(dict(loss=loss, rl=rl))
    return config
