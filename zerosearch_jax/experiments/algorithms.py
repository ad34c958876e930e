"""Runs the rl job once per algorithm config, all with one budget, and compares the results.

Finished runs are skipped, interrupted runs resume.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from zerosearch_jax import config_flags
from zerosearch_jax.errors import UserError
from zerosearch_jax.evaluation.summary import SUMMARY, text_table
from zerosearch_jax.experiments.config import AlgorithmsConfig
from zerosearch_jax.files import read_json, write_json
from zerosearch_jax.jobs import rl
from zerosearch_jax.training import validate
from zerosearch_jax.training.config import RLConfig
from zerosearch_jax.training.inputs import check_inputs
from zerosearch_jax.training.workdir import check_workdir


def run(config: ConfigDict, workdir: str) -> None:
    """Writes one run per name in `config.configs` to `workdir/NAME`, and `algorithms.json`.

    Raises:
      UserError: a config has another number of episodes per step, or `workdir` holds a finished
        run with another config.
    """
    config = config_flags.typed(AlgorithmsConfig, config)
    runs = {name: algorithm_run(config, name) for name in config.configs}
    paths = {name: Path(workdir) / name / "summary.json" for name in runs}
    for name, run_config in runs.items():  # before the first run trains
        typed = config_flags.typed(RLConfig, run_config)
        validate.check(typed)
        check_inputs(typed)
        if paths[name].exists():
            check_same(check_workdir(paths[name].parent), run_config, paths[name].parent)
            read_summary(paths[name])
    summaries = {}
    for name, run_config in runs.items():
        if not paths[name].exists():
            print(f"\n==== {name}", flush=True)
            rl.run(run_config, str(paths[name].parent))
            jax.clear_caches()  # The next algorithm compiles different programs.
        summaries[name] = read_summary(paths[name])
    first = next(iter(summaries.values()))
    table = {"base policy": first["base"]}
    table |= {name: summary["trained"] for name, summary in summaries.items()}
    title = f"{config.steps} steps each; {first['split']}, evaluated with {first['engine']}"
    print("\n" + text_table(table, title))
    path = Path(workdir) / "algorithms.json"
    write_json(path, summaries)
    print(f"written to {path}")


def read_summary(path: Path) -> dict[str, Any]:
    """Reads the `summary.json` of a finished run; UserError if it is damaged."""
    shape = {"base": SUMMARY, "trained": SUMMARY, "split": str, "engine": str}
    return read_json(path, shape, f"remove {path.parent} to run it again, or restore it")


def check_same(before: Mapping[str, Any] | None, run_config: ConfigDict, workdir: Path) -> None:
    """Raises UserError if the finished run in `workdir` had another config.

    Args:
      before: content of its config.json.
    """
    now = json.loads(json.dumps(run_config.to_dict()))
    of_run = {key: value for key, value in (before or {}).items() if key in now}
    if differences := config_flags.differences(of_run, now):
        raise UserError(
            f"{workdir} holds a run with another config ({', '.join(differences)}); use another "
            "--workdir or remove this directory"
        )


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
    run_config.rl.steps = config.steps
    run_config.optimizer.schedule_steps = 0
    run_config.eval.update(dict(every=config.steps, test_questions=config.test_questions))
    return run_config
