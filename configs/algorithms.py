"""Compares the RL algorithms on the embedded world with one budget: steps × episodes.

  make algorithms      # or:
  python -m zerosearch_jax.main --config=configs/algorithms.py

Hardware: 2 CPU cores. Time: about 80 minutes. Scores: docs/algorithms.md.

The rl job trains each algorithm from its own config file below runs/algorithms. Finished runs are
kept, so the command can be stopped and repeated. Dynamic sampling (dapo) may run up to three times
as many episodes, but all algorithms train on the same number.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        dict(
            job="algorithms",
            directory="configs",
            configs=(
                "grpo",
                "dr_grpo",
                "dapo",
                "gspo",
                "cispo",
                "reinforce",
                "reinforce_pp",
                "rloo",
                "ppo",
                "lora",
            ),
            seed=0,
            steps=10,
            episodes_per_step=120,
            test_questions=240,
        )
    ).lock()
