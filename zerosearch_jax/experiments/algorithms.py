"""Runs the rl job once per algorithm config, all with one budget, and compares the results.

Finished runs are skipped, interrupted runs resume.
"""

import json
from pathlib import Path

import jax
from ml_collections import ConfigDict

from zerosearch_jax import config_flags
from zerosearch_jax.errors import UserError
from zerosearch_jax.evaluation.summary import text_table
from zerosearch_jax.experiments.config import AlgorithmsConfig
from zerosearch_jax.files import write_json
from zerosearch_jax.jobs import rl


def run(config: ConfigDict, workdir: str) -> None:
    """Writes one run per name in `config.configs` to `workdir/NAME`, and `algorithms.json`.

    Raises:
      UserError: a config has another number of episodes per step, or `workdir` holds a run with
        another number of steps.
    """
    config = config_flags.typed(AlgorithmsConfig, config)
    summaries = {}
    for name, run_config in {name: algorithm_run(config, name) for name in config.configs}.items():
        summary = Path(workdir) / name / "summary.json"
        if not summary.exists():
            print(f"\n==== {name}", flush=True)
            rl.run(run_config, str(summary.parent))
            jax.clear_caches()  # The next algorithm compiles different programs.
        summaries[name] = json.loads(summary.read_text())
        steps = summaries[name]["steps"]
        if steps != config.steps:
            raise UserError(
                f"{summary.parent} has {steps} training steps, config.steps is {config.steps}; "
                "use another --workdir or remove this directory"
            )
    first = next(iter(summaries.values()))
    table = {"base policy": first["base"]}
    table |= {name: summary["trained"] for name, summary in summaries.items()}
    title = f"{config.steps} steps each; {first['split']}, evaluated with {first['engine']}"
    print("\n" + text_table(table, title))
    path = Path(workdir) / "algorithms.json"
    write_json(path, summaries)
    print(f"written to {path}")


def algorithm_run(config: AlgorithmsConfig, name: str) -> ConfigDict:
    """Returns the rl config of `configs/NAME.py` with the comparison's budget.

    Raises:
      UserError: the config's episodes per step differ from `config.episodes_per_step`.
    """
    run_config = config_flags.load(f"{config.directory}/{name}.py")
    episodes = run_config.rollout.questions_per_step * run_config.rollout.group_size
    if episodes != config.episodes_per_step:
        raise UserError(
            f"{config.directory}/{name}.py runs {episodes} episodes per step, "
            f"config.episodes_per_step is {config.episodes_per_step}; change one of them"
        )
    run_config.seed = config.seed
    run_config.update(
        dict(rl=dict(steps=config.steps), optimizer=dict(schedule_steps=config.steps))
    )
    run_config.eval.update(dict(every=config.steps, test_questions=config.test_questions))
    return run_config
