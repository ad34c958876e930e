"""Slips of the pen get one clear line and status 2; what is right reaches the job."""

import sys
import types
from pathlib import Path

import pytest

from zerosearch_jax import config_flags, main
from zerosearch_jax.errors import UserError
from zerosearch_jax.parallel import distributed

CONFIG = """
from ml_collections import ConfigDict
from zerosearch_jax.errors import UserError

def get_config(preset=""):
    if preset == "odd":
        raise ValueError("odd is no preset")
    if preset not in ("", "tiny"):
        raise UserError(f"unknown preset {preset!r}; there are: tiny")
    return ConfigDict({
        "job": "rl",
        "rl": {"learning_rate": 1e-3, "steps": 60, "whiten": True},
        "eval": {"questions": 100, "sets": ("a", "b")},
    }).lock()
"""


@pytest.fixture
def job(tmp_path, monkeypatch):
    """A config file in an empty directory and a job that notes what it is called with."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "grpo.py").write_text(CONFIG)
    calls = []
    module = types.ModuleType("zerosearch_jax.jobs.rl")
    module.run = lambda config, workdir: calls.append((config, workdir))
    module.calls = calls
    monkeypatch.setitem(sys.modules, "zerosearch_jax.jobs.rl", module)
    return module


def _refusal(capsys, *arguments: str) -> str:
    assert main.cli(["main", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    return captured.err


def test_overrides_reach_the_job(job):
    arguments = ["--config=configs/grpo.py", "--config.rl.steps=3", "--noconfig.rl.whiten"]
    assert main.cli(["main", *arguments, "--workdir=here"]) == 0
    ((config, workdir),) = job.calls
    assert (config.rl.steps, config.rl.whiten, config.optimizer.learning_rate) == (3, False, 1e-3)
    assert workdir == "here"


def test_the_default_workdir_names_config_and_preset(job):
    assert main.cli(["main", "--config=configs/grpo.py"]) == 0
    assert main.cli(["main", "--config", "configs/grpo.py:tiny"]) == 0
    assert [workdir for _, workdir in job.calls] == ["runs/grpo", "runs/grpo-tiny"]


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("rl.lernrate", "optimizer.learning_rate"),
        ("rl.step", "rl.steps"),
        ("steps", "rl.steps"),
        ("evl.questions", "eval.questions"),
        ("rl.steps.x", "rl.steps"),
    ],
)
def test_a_misspelt_key_is_refused_with_the_nearest(job, capsys, key, nearest):
    error = _refusal(capsys, "--config=configs/grpo.py", f"--config.{key}=1")
    assert f"--config.{key}: there is no such key; did you mean --config.{nearest}?" in error
    assert job.calls == []


def test_a_key_like_no_other_gets_the_sections(job, capsys):
    error = _refusal(capsys, "--config=configs/grpo.py", "--config.zzzz=1")
    assert "the sections are eval, job, rl" in error


def test_a_wrong_type_is_refused(job, capsys):
    error = _refusal(capsys, "--config=configs/grpo.py", "--config.rl.steps=abc")
    assert "--config.rl.steps=abc" in error
    assert "must be of type int, such as 60" in error


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--config=configs/gpro.py"], "no file configs/gpro.py; there are configs/grpo.py"),
        (["--config=configs"], "there is no file configs"),
        (["--config=configs/grpo.py:huge"], "unknown preset 'huge'; there are: tiny"),
        (["--config=configs/grpo.py:odd"], "odd is no preset"),
        ([], "say --config=configs/grpo.py; there are configs/grpo.py"),
        (["--config=configs/grpo.py", "--wrkdir=x"], "wrkdir"),
        (["--config=configs/grpo.py", "rl.steps=3"], "'rl.steps=3' is not a flag"),
        (["--config=configs/grpo.py", "--config.job=fly"], "'fly'; the jobs are rl, sft"),
        (["--config=configs/grpo.py", "--config=configs/grpo.py"], "is not allowed"),
        (["--config=configs/grpo.py", "--config"], "--config"),
    ],
)
def test_other_slips_get_one_line(job, capsys, arguments, told):
    assert told in _refusal(capsys, *arguments)
    assert job.calls == []


def test_a_user_error_in_the_job_is_one_line_and_other_errors_are_not_hidden(job, capsys):
    def raising(error):
        def run(config, workdir):
            raise error

        return run

    job.run = raising(UserError("models/x: no such directory"))
    assert _refusal(capsys, "--config=configs/grpo.py") == "error: models/x: no such directory\n"
    job.run = raising(ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        main.cli(["main", "--config=configs/grpo.py"])
    job.run = raising(KeyboardInterrupt())
    assert main.cli(["main", "--config=configs/grpo.py"]) == 130
    assert "resumes" in capsys.readouterr().err


def test_every_config_of_the_project_loads_and_names_a_job(monkeypatch):
    root = main.Path(main.__file__).parents[1]
    monkeypatch.chdir(root)
    configs = sorted(main.Path("configs").glob("*.py"))
    for path in configs:
        assert config_flags.load(str(path)).job in main.JOBS, path


def test_help_tells_the_flags(capsys):
    assert main.cli(["main", "--help"]) == 0
    assert "--workdir=DIR" in capsys.readouterr().out


def test_processes_that_are_named_in_part_are_refused():
    whole = dict(zip(distributed.VARIABLES, ("host:1234", "2", "1"), strict=True))
    assert distributed.distributed_arguments({}) == {}
    assert distributed.distributed_arguments(whole | {"HOME": "x"}) == {
        "coordinator_address": "host:1234", "num_processes": 2, "process_id": 1,
    }  # fmt: skip
    for name in distributed.VARIABLES:
        partial = {key: value for key, value in whole.items() if key != name}
        with pytest.raises(UserError, match=f"{name} is not; set all or none"):
            distributed.distributed_arguments(partial)
    for wrong in ("2", "-1", "one"):
        with pytest.raises(UserError, match=f"JAX_PROCESS_ID={wrong} must be a number below"):
            distributed.distributed_arguments(whole | {"JAX_PROCESS_ID": wrong})


def test_jobs_that_only_one_process_can_run_refuse_others(job, capsys):
    Path("configs/grpo.py").write_text(CONFIG.replace('"job": "rl"', '"job": "sft"'))
    error = _refusal(capsys, "--config=configs/grpo.py", "--distributed")
    assert "--distributed is not for config.job=sft" in error
