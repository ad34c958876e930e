"""The paper in miniature: all stages from the base models on, and tests of the paper's claims.

  make miniature                       # all stages, on 2 CPU cores, about 2.5 hours
  make miniature CONFIG_SIZE=:quick    # every stage once at a small size, 7.5 minutes; no verdicts

Both can be stopped and repeated. Scores: docs/miniature/report.md. Each stage is a job with its own
folder in the workdir. A preset is the config of one stage, so any stage can be run by hand, for
example one training run:

  python -m zerosearch_jax.main --config=configs/miniature.py:no_mask --config.seed=1

An arm is a training setting: a config of this directory with changes. All arms have one budget.
"""

from functools import partial
from pathlib import Path

from ml_collections import ConfigDict

from zerosearch_jax import config_flags
from zerosearch_jax.errors import UserError
from zerosearch_jax.search.curriculum import noise_probability

READER = "zerosearch_jax/assets/reader"
ARMS = {
    "zerosearch": ("grpo", {}),
    "real_engine": ("grpo", {"search.engine": "bm25", "curriculum.end": 0.0}),
    # The model that the simulator is fine-tuned from, with the prompt for untuned models.
    "prompted_simulator": (
        "grpo",
        {
            "search.simulator.model": READER,
            "search.simulator.form": "prompted",
            "search.simulator.generator.max_tokens": 832,
            "search.simulator.generator.window_tokens": 832,
            "search.simulator.generator.prefill_buckets": (640,),
        },
    ),
    "constant_noise": ("grpo", {}),  # `trained` sets the mean of the rising schedule
    "reversed_noise": (
        "grpo",
        {"curriculum.start": 0.5, "curriculum.end": 0.0, "curriculum.base": 0.25},
    ),
    "no_mask": ("grpo", {"rl.document_mask": False, "rl.old_logprobs": "learner"}),
    "reinforce": ("reinforce", {}),
    "ppo": ("ppo", {}),
    "instruct": ("grpo", {"policy.model": READER}),
    "r1": ("r1", {}),
    "search_r1": ("search_r1", {}),
    "r1_searcher": ("r1_searcher", {"reward.stage_one_steps": 2}),
    "research": ("research", {}),
    "deepresearcher": ("deepresearcher", {}),
}
BASELINES = ("r1", "search_r1", "r1_searcher", "research", "deepresearcher")
NOISE = (0, 25, 50, 75)
"""Percentages of noisy searches at evaluation."""


def get_config(preset: str = "") -> ConfigDict:
    """Returns the config of the pipeline or of one stage; quick/STAGE is the small one."""
    name = "" if preset == "quick" else preset.removeprefix("quick/")
    if name not in STAGES:
        raise UserError(
            f"configs/miniature.py has no preset {preset!r}; the presets are "
            f"{', '.join(filter(None, PRESETS))}, each stage also as quick/STAGE"
        )
    return STAGES[name](name != preset).lock()


def miniature(quick: bool) -> ConfigDict:
    return ConfigDict(
        dict(
            job="miniature",
            recipe="configs/miniature.py",
            prefix="quick/" if quick else "",
            seeds=(0,) if quick else (0, 1, 2),
            baseline_seeds=(0,),
            arms=tuple(arm for arm in ARMS if arm not in BASELINES),
            baselines=BASELINES,
            noise_arms=("zerosearch", "constant_noise", "reversed_noise"),
            start_policies=dict(base="zerosearch_jax/assets/policy", instruct=READER),
            workers=2,
        )
    )


def collect(quick: bool) -> ConfigDict:
    config = _load("collect")
    if quick:
        config.data.limit = 240
    return config


def simulator(quick: bool) -> ConfigDict:
    config = _load("sft_simulator")
    if quick:
        config.sft.update(dict(steps=10, eval_every=5, checkpoint_every=5))
        config.optimizer.warmup_steps = 2
    return config


def report(quick: bool) -> ConfigDict:
    config = _load("simulator_report")
    if quick:
        config.limit = 24
    return config


def trained(arm: str, quick: bool) -> ConfigDict:
    """The rl config of an arm with the miniature's budget."""
    file, changes = ARMS[arm]
    config = _load(file)
    config.update_from_flattened_dict(changes)
    steps = 2 if quick else 6
    config.rl.steps = steps
    if arm == "constant_noise":
        rising = [noise_probability(i, steps - 1, **config.curriculum) for i in range(steps)]
        config.curriculum.update(dict.fromkeys(("start", "end"), sum(rising) / steps))
    config.checkpoint_every = 2
    config.eval.update(dict(every=steps + 1, test_questions=24 if quick else 240))
    if quick:
        config.rollout.questions_per_step = 24 // config.rollout.group_size
    else:  # the quick simulator, with ten steps, would not pass the gate
        config.search.simulator.gate.update(useful_min=0.6, noisy_max=0.35)
    return config


def sft(quick: bool) -> ConfigDict:
    config = _load("sft_answers")
    config.init = "zerosearch_jax/assets/policy"
    steps = 10 if quick else 100
    config.sft.update(dict(steps=steps, eval_every=steps, checkpoint_every=steps))
    return config


def methods(quick: bool) -> ConfigDict:
    config = _load("eval")
    config.methods = ("direct", "cot", "rag", "search", "search_o1")
    config.data.update(dict(sets=("world/test",), limit=24 if quick else 240))
    return config


def noise(quick: bool) -> ConfigDict:
    config = methods(quick)
    config.methods = ("search",)
    engine = config.engines.bm25.to_dict()
    config.engines = ConfigDict(
        {
            f"noise_{percent}": engine | dict(engine="noisy_bm25", noise=percent / 100)
            for percent in NOISE
        }
    )
    return config


def _load(file: str) -> ConfigDict:
    return config_flags.load(f"{Path(__file__).with_name(file)}.py").unlock()


STAGES = {
    "": miniature,
    "collect": collect,
    "simulator": simulator,
    "simulator_report": report,
    "noise": noise,
    "methods": methods,
    "sft": sft,
    **{arm: partial(trained, arm) for arm in ARMS},
}
PRESETS = ("quick", *STAGES)
