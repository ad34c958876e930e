"""The comparison of algorithms: one run for each config, none of them twice."""

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
        "from zerosearch_jax import config_check\n\n\n"
        "def get_config():\n"
        f"    config = config_flags.load({str(rl_config)!r})\n"
        f"    config.update({changes!r})\n"
        "    return config\n"
    )


@pytest.fixture
def config(rl_config, tmp_path):
    """configs/algorithms.py for two tiny configs, one of them with other groups."""
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
def test_each_config_is_run_once_with_one_budget(config, tmp_path, monkeypatch, capsys):
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
    with pytest.raises(UserError, match="was trained for 1 steps, the comparison asks for 2"):
        algorithms.run(config, str(workdir))


def test_a_cell_has_the_comparisons_budget_and_its_own_algorithm(config):
    one = algorithms.cell(config, "single")
    assert (one.seed, one.rl.steps, one.optimizer.schedule_steps) == (3, 1, 1)
    assert (one.eval.every, one.eval.test_questions) == (1, 3)
    assert (one.advantage.estimator, one.rollout.group_size) == ("reinforce", 1)
    assert algorithms.cell(config, "rloo").advantage.estimator == "rloo"


def test_another_number_of_episodes_a_step_is_refused_before_anything_runs(
    config, rl_config, tmp_path
):
    _write(tmp_path / "configs", "more", rl_config, dict(rollout=dict(group_size=5)))
    config.configs = ("rloo", "more")
    told = "more.py plays 10 episodes a step, the comparison asks for 8; change its rollout or"
    with pytest.raises(UserError, match=told):
        algorithms.run(config, str(tmp_path / "runs"))
    assert not (tmp_path / "runs").exists()
