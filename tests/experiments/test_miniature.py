"""The miniature: its stages, who waits for whom, and that a stage's failure is told."""

import fcntl
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from zerosearch_jax import config_flags
from zerosearch_jax.data.records import Records
from zerosearch_jax.errors import UserError
from zerosearch_jax.experiments import miniature
from zerosearch_jax.experiments.miniature import Stage

RECIPE = "configs/miniature.py"


@pytest.mark.parametrize("prefix", ["", "quick"])
def test_each_stage_reads_what_stages_before_it_write(tmp_path, prefix):
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
def test_every_stages_flags_are_keys_of_its_config(tmp_path, prefix):
    config = config_flags.load(f"{RECIPE}:{prefix.rstrip('/')}")
    for stage in miniature.stages(config, tmp_path):
        known = config_flags.load(stage.argv[0].removeprefix("--config=")).to_dict()
        for flag in stage.argv[1:]:
            config_flags.check_key(flag.removeprefix("--config.").partition("=")[0], known)


def test_all_arms_have_one_budget():
    budgets = set()
    for arm in [*_arms("arms"), *_arms("baselines")]:
        config = config_flags.load(f"{RECIPE}:{arm}")
        episodes = config.rollout.questions_per_step * config.rollout.group_size
        budgets.add((config.rl.steps, episodes, config.eval.test_questions))
    assert len(budgets) == 1


def test_the_noise_schedules_have_one_mean():
    from zerosearch_jax.search.curriculum import noise_probability

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


def test_stages_run_in_order_and_are_not_run_again(tmp_path, capsys):
    todo = [
        Stage("a", ("--help",), "log.txt"),
        Stage("b", ("--help",), "log.txt", ("a",)),
    ]
    log = Records(tmp_path / "stages.jsonl")
    miniature.run_stages(todo, tmp_path, 1, log)
    assert "--config=FILE" in (tmp_path / "b" / "log.txt").read_text()
    assert [record["id"].partition("@")[0] for record in log] == ["a", "b"]
    miniature.run_stages(todo, tmp_path, 1, log)
    assert len(log) == 2
    assert "2 of 2 stages are done" in capsys.readouterr().out


def test_a_stage_that_fails_is_named_with_its_log(tmp_path):
    todo = [Stage("bad", ("--config=nowhere.py",), "summary.json")]
    with pytest.raises(UserError, match="stage bad failed; see the end of .*bad/log.txt"):
        miniature.run_stages(todo, tmp_path, 1, Records(tmp_path / "stages.jsonl"))
    assert "there is no file nowhere.py" in (tmp_path / "bad" / "log.txt").read_text()


def test_more_workers_than_cores_are_refused(tmp_path):
    with pytest.raises(UserError, match="config.workers=999"):
        miniature.run_stages([], tmp_path, 999, Records(tmp_path / "stages.jsonl"))


def test_a_cell_is_read_from_what_its_stages_wrote(tmp_path):
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
    assert miniature.cell(tmp_path, "ppo", 1) == {
        "arm": "ppo",
        "seed": 1,
        "engine": "bm25",
        "em": [1.0, 0.0],
        "f1": [1.0, 0.5],
        "searches_per_episode": 1.5,
        "noise": {"0.5": [0.0, 1.0]},
        "curve": [{"step": 1, "em": 0.25}],
    }
    assert miniature.base_cell(folder, "base")["em"] == [0.0]


def test_the_report_names_what_was_overridden():
    config = config_flags.load(f"{RECIPE}:quick").unlock()
    config.recipe = RECIPE
    assert miniature.config_flags(config) == [f"--config={RECIPE}:quick"]
    config.seeds = (3, 4)
    assert miniature.config_flags(config)[1:] == ['--config.seeds="(3, 4)"']


def test_of_some_arms_only_their_noise_is_measured(tmp_path):
    config = config_flags.load(RECIPE).unlock()
    config.update(dict(recipe=RECIPE, arms=("constant_noise",), baselines=(), seeds=(0,)))
    names = [stage.name for stage in miniature.stages(config, tmp_path)]
    assert [name for name in names if name.startswith("noise-")] == ["noise-constant_noise-0"]


def test_time_in_which_two_stages_ran_counts_once(tmp_path):
    log = Records(tmp_path / "stages.jsonl")
    spans = [(0, 10), (4, 8), (6, 15), (20, 21)]
    log.append([{"id": str(s), "ended": s[1], "seconds": s[1] - s[0]} for s in spans])
    assert miniature.busy_seconds(log) == 16


def test_a_killed_job_leaves_no_stage_running(tmp_path):
    """Else the job that is started again would have two processes write to one folder."""
    slow, pid_file, script = (tmp_path / name for name in ("slow.py", "pid", "job.py"))
    slow.write_text(
        f"import os, pathlib, time\n"
        f"pathlib.Path({str(pid_file)!r}).write_text(str(os.getpid()))\ntime.sleep(600)\n"
    )
    script.write_text(
        "from pathlib import Path\n"
        "from zerosearch_jax.data.records import Records\n"
        "from zerosearch_jax.experiments.miniature import Stage, run_stages\n"
        "if __name__ == '__main__':\n"
        f"    root = Path({str(tmp_path)!r})\n"
        f"    stage = Stage('slow', ('--config={slow}',), 'never.json')\n"
        "    run_stages([stage], root, 1, Records(root / 'stages.jsonl'))\n"
    )
    environment = dict(os.environ, PYTHONPATH=str(Path(__file__).parents[2]))
    job = subprocess.Popen([sys.executable, str(script)], env=environment)
    try:
        pid = int(_within(60, lambda: pid_file.exists() and pid_file.read_text()))
    finally:
        job.kill()
        job.wait()
    _within(30, lambda: not _alive(pid))


def _alive(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    # A process that has ended may wait as a zombie ("Z") for whoever adopted it.
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


def _within(seconds: float, condition):
    until = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < until, f"not within {seconds} s"
        time.sleep(0.1)
    return value


def test_a_workdir_in_use_is_refused(tmp_path):
    with (tmp_path / "lock").open("w") as holder:
        fcntl.flock(holder, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="in use by another process"):
            miniature.run(config_flags.load(RECIPE), str(tmp_path))


@pytest.mark.slow
def test_the_quick_miniature_runs_every_stage_and_writes_its_report(tmp_path):
    """The whole method from the base models on, in the smallest sizes, two stages at a time."""
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
