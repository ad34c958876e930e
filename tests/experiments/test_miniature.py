"""The miniature: its stages and their order, its arm runs, its lock, and the whole pipeline."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from zerosearch_jax import config_flags
from zerosearch_jax.data.records import Records
from zerosearch_jax.experiments import miniature
from zerosearch_jax.search.curriculum import noise_probability

RECIPE = "configs/miniature.py"


@pytest.mark.parametrize("prefix", ["", "quick"])
def test_a_stage_reads_only_results_of_stages_that_it_waits_for(tmp_path, prefix):
    config = config_flags.load(f"{RECIPE}:{prefix}")
    stages = miniature.stages(config, tmp_path)
    names = [stage.name for stage in stages]
    assert len(set(names)) == len(names)
    for i, stage in enumerate(stages):
        assert set(stage.after) <= set(names[:i]), stage
        read = {other for other in names for flag in stage.argv if f"{tmp_path}/{other}/" in flag}
        waits = set(stage.after)
        while more := {a for s in stages if s.name in waits for a in s.after} - waits:
            waits |= more
        assert read <= waits, stage
    tuned = {stage.name for stage in stages if "simulator_report" in stage.after}
    seeds = config.seeds
    assert {f"zerosearch-{seed}" for seed in seeds} <= tuned
    assert not tuned & {f"{arm}-0" for arm in ("real_engine", "prompted_simulator", "r1")}


@pytest.mark.parametrize("prefix", ["", "quick/"])
def test_stage_flags_are_keys_of_the_stage_config(tmp_path, prefix):
    config = config_flags.load(f"{RECIPE}:{prefix.rstrip('/')}")
    for stage in miniature.stages(config, tmp_path):
        known = config_flags.load(stage.argv[0].removeprefix("--config=")).to_dict()
        for flag in stage.argv[1:]:
            config_flags.check_key(flag.removeprefix("--config.").partition("=")[0], known)


def test_all_arms_have_the_same_budget():
    budgets = set()
    for arm in [*_arms("arms"), *_arms("baselines")]:
        config = config_flags.load(f"{RECIPE}:{arm}")
        episodes = config.rollout.questions_per_step * config.rollout.group_size
        budgets.add((config.rl.steps, episodes, config.eval.test_questions))
    assert len(budgets) == 1


def test_noise_schedules_have_the_same_mean():
    schedules = []
    for arm in ("zerosearch", "constant_noise", "reversed_noise"):
        config = config_flags.load(f"{RECIPE}:{arm}")
        assert config.rl.steps == 6
        schedules.append([noise_probability(i, 5, **config.curriculum) for i in range(6)])
    rising, constant, falling = np.array(schedules)
    # 0.5 (4^x - 1) / 3 at x = 0, 0.2, ..., 1.
    by_hand = [0, 0.053251, 0.123517, 0.216233, 0.338572, 0.5]
    np.testing.assert_allclose(rising, by_hand, atol=1e-6)
    np.testing.assert_allclose(constant, np.mean(by_hand), atol=1e-6)
    np.testing.assert_allclose(falling, by_hand[::-1], atol=1e-6)


def _arms(group):
    return config_flags.load(RECIPE)[group]


def test_an_arm_run_is_read_from_the_files_of_its_stages(tmp_path):
    folder = tmp_path / "ppo-1"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text('{"step": 1, "em": 0.25, "f1": 0.3}\n')
    summary = {"engine": "bm25", "trained": {"searches_per_episode": 1.5}}
    (folder / "summary.json").write_text(json.dumps(summary))
    answers = [
        {"policy": "base", "id": "q", "em": 0.0, "f1": 0.0},
        {"policy": "trained", "id": "q", "em": 1.0, "f1": 1.0},
        {"policy": "trained", "id": "r", "em": 0.0, "f1": 0.5},
    ]
    (folder / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answers))
    noise = tmp_path / "noise-ppo-1"
    noise.mkdir()
    rows = [{"settings": {"engine": {"noise": 0.5}}, "em_of_each": [0.0, 1.0]}]
    (noise / "evaluation.json").write_text(json.dumps(rows))
    assert miniature.arm_run(tmp_path, "ppo", 1) == {
        "arm": "ppo",
        "seed": 1,
        "engine": "bm25",
        "em": [1.0, 0.0],
        "f1": [1.0, 0.5],
        "searches_per_episode": 1.5,
        "noise": {"0.5": [0.0, 1.0]},
        "curve": [{"step": 1, "em": 0.25}],
    }
    assert miniature.base_run(folder, "base")["em"] == [0.0]


def test_the_report_has_one_row_per_method_that_of_the_last_settings(tmp_path):
    (tmp_path / "methods-sft").mkdir()
    row = dict(method="direct", engine="none", set="world/test", searches_per_episode=0)
    row |= dict(f1=0.0, em_interval=[0, 1], f1_interval=[0, 1])
    rows = [row | {"limit": limit, "em": em} for limit, em in ((24, 0.25), (240, 0.5))]
    (tmp_path / "methods-sft" / "evaluation.json").write_text(json.dumps(rows))
    config = SimpleNamespace(start_policies={}, baselines=(), arms=())
    (found,) = miniature.methods_rows(config, tmp_path, [])
    assert found["em"] == (0.5, 0, 1)


def test_the_report_command_contains_the_overrides():
    config = config_flags.load(f"{RECIPE}:quick").unlock()
    config.recipe = RECIPE
    assert miniature.command_flags(config) == [f"--config={RECIPE}:quick"]
    config.seeds = (3, 4)
    assert miniature.command_flags(config)[1:] == ['--config.seeds="(3, 4)"']


def test_noise_is_measured_only_for_selected_arms(tmp_path):
    config = config_flags.load(RECIPE).unlock()
    config.update(dict(recipe=RECIPE, arms=("constant_noise",), baselines=(), seeds=(0,)))
    names = [stage.name for stage in miniature.stages(config, tmp_path)]
    assert [name for name in names if name.startswith("noise-")] == ["noise-constant_noise-0"]


def test_overlapping_stage_times_count_once(tmp_path):
    log = Records(tmp_path / "stages.jsonl")
    spans = [(0, 10), (4, 8), (6, 15), (20, 21)]
    log.append([{"id": str(s), "ended": s[1], "seconds": s[1] - s[0]} for s in spans])
    assert miniature.busy_seconds(log) == 16


@pytest.mark.slow
def test_quick_miniature_runs_every_stage_and_writes_its_report(tmp_path):
    """The whole method from the base models on, in the smallest sizes, with two workers."""
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "zerosearch_jax.main", f"--config={RECIPE}:quick"]
    subprocess.run(
        [*command, f"--workdir={tmp_path}"],
        cwd=root,
        env=dict(os.environ, PYTHONPATH=str(root)),
        check=True,
    )
    report = (tmp_path / "report.md").read_text()
    rows = json.loads((tmp_path / "claims.json").read_text())
    assert [row["claim"] for row in rows if row["verdict"] == "not run"] == []
    for arm in [*_arms("arms"), *_arms("baselines")]:
        assert f"trained: {arm}" in report
    assert (tmp_path / "training.png").stat().st_size > 10_000
