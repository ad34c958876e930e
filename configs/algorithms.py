"""Every algorithm on the embedded world with one budget: steps × episodes of training.

  make algorithms      # the same as
  python -m zerosearch_jax.main --config=configs/algorithms.py

Each is trained by the rl job from its own config file below runs/algorithms; what is finished is
kept, so the command can be stopped and given again. Dynamic sampling (dapo) may play up to three
times as many episodes; its updates see as many as the others'.
"""

from ml_collections import ConfigDict


def get_config(preset: str = "") -> ConfigDict:
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
