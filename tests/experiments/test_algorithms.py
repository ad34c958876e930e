"""The comparison of algorithms: one run per config, with the same budget, never repeated."""

import json
from pathlib import Path

import pytest

from zerosearch_jax import config_flags
from zerosearch_jax.errors import UserError
from zerosearch_jax.experiments import algorithms
from zerosearch_jax.jobs import rl

pytestmark = pytest.mark.usefixtures("compiled_once")
ROOT = Path(__file__).parents[2]


def _write(directory: Path, name: str, rl_config: Path, changes: dict) -> None:
    (directory / f"{name}.py").write_text(
        "from zerosearch_jax import config_flags\n\n\n"
        "def get_config():\n"
        f"    config = config_flags.load({str(rl_config)!r})\n"
        f"    config.update({changes!r})\n"
        "    return config\n"
    )


@pytest.fixture
def config(rl_config, tmp_path):
    """configs/algorithms.py for two tiny configs with different group sizes."""
    directory = tmp_path / "configs"
    directory.mkdir()
    _write(directory, "rloo", rl_config, dict(advantage=dict(estimator="rloo")))
    single = dict(
        rollout=dict(questions_per_step=8, group_size=1),
        advantage=dict(estimator="reinforce", baseline="batch_mean"),
    )
    _write(directory, "single", rl_config, single)
    config = config_flags.load(str(ROOT / "configs" / "algorithms.py"))
    config.update(
        dict(
            directory=str(directory),
            configs=("rloo", "single"),
            seed=3,
            steps=1,
            episodes_per_step=8,
            test_questions=3,
        )
    )
    return config


@pytest.mark.slow
def test_each_config_runs_once_with_the_same_budget(config, tmp_path, monkeypatch, capsys):
    workdir = tmp_path / "runs"
    algorithms.run(config, str(workdir))
    summaries = json.loads((workdir / "algorithms.json").read_text())
    assert list(summaries) == ["rloo", "single"]
    for name, summary in summaries.items():
        assert summary == json.loads((workdir / name / "summary.json").read_text())
        assert summary["steps"] == 1 and summary["trained"]["questions"] == 3
        rows = (workdir / name / "metrics.jsonl").read_text().splitlines()
        assert len(rows) == 1
    assert summaries["rloo"]["base"] == summaries["single"]["base"]
    table = capsys.readouterr().out.rpartition("1 steps each")[2]
    for name in ("base policy", "rloo", "single"):
        assert f"\n{name}" in table

    def fail(*_):
        raise AssertionError("a finished run was repeated")

    monkeypatch.setattr(rl, "run", fail)
    algorithms.run(config, str(workdir))
    assert json.loads((workdir / "algorithms.json").read_text()) == summaries
    assert capsys.readouterr().out.rpartition("1 steps each")[2] == table

    config.steps = 2
    with pytest.raises(UserError, match="rl.steps: 1 → 2"):
        algorithms.run(config, str(workdir))


def test_a_finished_run_of_another_config_is_refused(config, tmp_path):
    run_config = algorithms.algorithm_run(config, "rloo")
    kept = json.loads(json.dumps({"format": 3, "contents": {}, **run_config.to_dict()}))
    algorithms.check_same(kept, run_config, tmp_path)
    run_config.seed = 4
    with pytest.raises(UserError, match="seed: 3 → 4"):
        algorithms.check_same(kept, run_config, tmp_path)
    with pytest.raises(UserError, match="another config"):
        algorithms.check_same(None, run_config, tmp_path)


def test_an_algorithm_run_has_the_common_budget_and_the_algorithm_of_its_config(config):
    single = algorithms.algorithm_run(config, "single")
    assert (single.seed, single.rl.steps, single.optimizer.schedule_steps) == (3, 1, 0)
    assert (single.eval.every, single.eval.test_questions) == (1, 3)
    assert (single.advantage.estimator, single.rollout.group_size) == ("reinforce", 1)
    assert algorithms.algorithm_run(config, "rloo").advantage.estimator == "rloo"


def test_different_episodes_per_step_are_refused_before_any_run(config, rl_config, tmp_path):
    _write(tmp_path / "configs", "more", rl_config, dict(rollout=dict(group_size=5)))
    config.configs = ("rloo", "more")
    with pytest.raises(UserError, match="more.py runs 10 episodes .*episodes_per_step is 8"):
        algorithms.run(config, str(tmp_path / "runs"))
    assert not (tmp_path / "runs").exists()
