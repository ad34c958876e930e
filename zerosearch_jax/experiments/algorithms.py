"""Runs the rl job once for each algorithm's config, all with one budget, and sets the results side
by side. A run that is finished is not repeated, one that was cut off is resumed."""

import json
from pathlib import Path

import jax
from ml_collections import ConfigDict

from zerosearch_jax import config_flags
from zerosearch_jax.errors import UserError
from zerosearch_jax.evaluation.summary import text_table
from zerosearch_jax.jobs import rl


def run(config: ConfigDict, workdir: str) -> None:
    """Writes a run below `workdir/NAME` for each of `config.configs`, and `algorithms.json`."""
    summaries = {}
    for name, one in {name: cell(config, name) for name in config.configs}.items():
        summary = Path(workdir) / name / "summary.json"
        if not summary.exists():
            print(f"\n==== {name}", flush=True)
            rl.run(one, str(summary.parent))
            jax.clear_caches()  # the next one's programs are others
        summaries[name] = json.loads(summary.read_text())
        steps = summaries[name]["steps"]
        if steps != config.steps:
            raise UserError(
                f"{summary.parent} was trained for {steps} steps, the comparison asks for "
                f"{config.steps}; give another --workdir or remove it"
            )
    first = next(iter(summaries.values()))
    table = {"base policy": first["base"]}
    table |= {name: summary["trained"] for name, summary in summaries.items()}
    judge = f"{first['split']}, judged with {first['engine']}"
    print("\n" + text_table(table, f"{config.steps} steps each; {judge}"))
    path = Path(workdir) / "algorithms.json"
    path.write_text(json.dumps(summaries, indent=1) + "\n")
    print(f"written to {path}")


def cell(config: ConfigDict, name: str) -> ConfigDict:
    """The rl config `configs/NAME.py` with the comparison's budget."""
    one = config_flags.load(f"{config.directory}/{name}.py")
    episodes = one.rollout.questions_per_step * one.rollout.group_size
    if episodes != config.episodes_per_step:
        raise UserError(
            f"{config.directory}/{name}.py plays {episodes} episodes a step, the comparison asks "
            f"for {config.episodes_per_step}; change its rollout or config.episodes_per_step"
        )
    one.seed = config.seed
    one.update(dict(rl=dict(steps=config.steps), optimizer=dict(schedule_steps=config.steps)))
    one.eval.update(dict(every=config.steps, test_questions=config.test_questions))
    return one
