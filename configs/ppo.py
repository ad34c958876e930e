"""PPO with a critic (Schulman et al., arXiv 1707.06347) against a simulated search engine.

  python -m zerosearch_jax.main --config=configs/ppo.py[:PRESET]

Differs from grpo.py: GAE with a critic, and the KL (k1) in each token's reward. The default and
smollm2-135m have one episode per question and as many questions per step as grpo.py has episodes.
The presets of the paper's models have 64 questions with 5 episodes each and a shorter warm-up, like
the released PPO script.

Presets, hardware and time are those of grpo.py. Embedded world, 10 steps: EM 0.787
(docs/algorithms.md).
"""

from pathlib import Path

from ml_collections import ConfigDict

from zerosearch_jax import config_flags

GRPO = Path(__file__).with_name("grpo.py")
PRESETS = config_flags.presets(GRPO)


def get_config(preset: str = "") -> ConfigDict:
    config = config_flags.load(f"{GRPO}:{preset}")
    rollout = config.rollout
    if preset in ("", "smollm2-135m"):
        rollout.questions_per_step *= rollout.group_size
        rollout.group_size = 1
    else:  # the released script's warm-up: 0.285 of the steps
        config.optimizer.warmup_steps = round(0.285 * config.rl.steps)
    config.update(dict(advantage=dict(estimator="ppo"), kl=dict(apply_to="reward", estimator="k1")))
    return config
