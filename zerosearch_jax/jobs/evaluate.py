"""Evaluation: a policy answers questions with an engine, greedily; a table with intervals.

As a job it evaluates any Hugging Face directory on any question set; the `rl` job calls
`evaluate_policy` for its own.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import jax
from ml_collections import ConfigDict

from zerosearch_jax.data.qa import QARow, load_qa
from zerosearch_jax.generate.generator import Generator
from zerosearch_jax.generate.sampling import Sampling
from zerosearch_jax.jobs import build
from zerosearch_jax.jobs.scores import answer_scores, episode_figures, wilson_interval
from zerosearch_jax.parallel.mesh import make_mesh
from zerosearch_jax.rollout.episodes import STOP_STRINGS, Limits, Rollouts
from zerosearch_jax.rollout.trajectory import Episode, Trajectory
from zerosearch_jax.search.engine import SearchEngine

GREEDY = Sampling(temperature=0.0)


def run(config: ConfigDict, workdir: str) -> None:
    """Evaluates `config.policy.model` on each of `config.data.splits`; writes `evaluation.json`."""
    mesh = make_mesh(**config.mesh)
    model = build.load_model(config.policy.model, mesh, "float32")
    generator = build.make_generator(model, config.policy.generator, mesh, STOP_STRINGS)
    engine = build.make_engine(config.search, config.seed, config.mesh)
    table = {}
    for split in config.data.splits:
        rows = load_qa(config.data.source, split, config.data.limit)
        trajectories = evaluate_policy(
            generator,
            engine,
            model.tokenizer,
            rows,
            limits=Limits(**config.limits),
            forbid_search=config.forbid_search,
        )
        table[f"{config.data.source}/{split}"] = summary(trajectories)
    print_table(table, f"{config.policy.model}, engine {engine.name}")
    path = Path(workdir) / "evaluation.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(table, indent=1) + "\n")
    print(f"written to {path}")


def evaluate_policy(
    generator: Generator,
    engine: SearchEngine,
    tokenizer,
    rows: Sequence[QARow],
    *,
    limits: Limits,
    forbid_search: bool = False,
) -> list[Trajectory]:
    """One greedy episode a row, in order."""
    rollouts = Rollouts(
        generator,
        engine,
        tokenizer,
        limits=limits,
        sampling=GREEDY,
        forbid_search=forbid_search,
    )
    episodes = [Episode(i, row.question, row.golden_answers) for i, row in enumerate(rows)]
    return rollouts.play(episodes, jax.random.key(0))


def summary(trajectories: Sequence[Trajectory]) -> dict[str, float | list[float]]:
    """EM with its 95% interval, F1, number of questions, searches per episode."""
    matches = answer_scores(trajectories, "em")
    figures = episode_figures(trajectories)
    return {
        "em": figures["em"],
        "em_interval": list(wilson_interval(sum(matches), len(matches))),
        "f1": figures["f1"],
        "questions": len(matches),
        "searches_per_episode": figures["searches_per_episode"],
    }


def print_table(table: dict[str, dict], title: str) -> None:
    """Prints `summary`'s figures, one line an entry."""
    width = max(len(name) for name in table)
    print(f"\n{title}")
    print(f"{'':{width}}    EM  [95% interval]     F1  searches  questions")
    for name, row in table.items():
        low, high = row["em_interval"]
        print(
            f"{name:{width}}  {row['em']:.3f}  [{low:.3f}, {high:.3f}]  {row['f1']:.3f}"
            f"  {row['searches_per_episode']:8.2f}  {row['questions']:9d}"
        )
