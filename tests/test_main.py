"""The command line: overrides reach the job, mistakes get one line and status 2."""

import errno
import fcntl
import io
import os
import shutil
import socket
import sys
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import pytest

from zerosearch_jax import config_flags, main
from zerosearch_jax.errors import Terminated, UserError
from zerosearch_jax.files import write_json
from zerosearch_jax.parallel import distributed
from zerosearch_jax.training.workdir import locked

CONFIG = """
from ml_collections import ConfigDict
from zerosearch_jax.errors import UserError

PRESETS = ("", "tiny")

def get_config(preset=""):
    if preset == "odd":
        raise ValueError("odd is no preset")
    if preset not in PRESETS:
        raise UserError(f"unknown preset {preset!r}; there are: tiny")
    return ConfigDict({
        "job": "rl",
        "rl": {"steps": 60, "whiten": True},
        "optimizer": {"learning_rate": 1e-3},
        "generator": {"chunk_tokens": 8},
        "eval": {"questions": 100, "sets": ("a", "b")},
    }).lock()
"""


@dataclass(frozen=True)
class Config:
    """The type of `CONFIG`."""

    job: str
    rl: dict[str, Any]
    optimizer: dict[str, Any]
    generator: dict[str, Any]
    eval: dict[str, Any]


@pytest.fixture
def job(tmp_path, monkeypatch):
    """A config file in an empty directory and a job that records its calls."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(main, "config_class", lambda config: Config)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "grpo.py").write_text(CONFIG)
    calls = []
    module = types.ModuleType("zerosearch_jax.jobs.rl")
    module.run = lambda config, workdir, **options: calls.append((config, workdir, options))
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
    ((config, workdir, options),) = job.calls
    assert (config.rl.steps, config.rl.whiten, config.optimizer.learning_rate) == (3, False, 1e-3)
    assert (workdir, options) == ("here", {})


def test_default_workdir_has_the_names_of_config_and_preset(job):
    assert main.cli(["main", "--config=configs/grpo.py"]) == 0
    assert main.cli(["main", "--config", "configs/grpo.py:tiny"]) == 0
    assert [workdir for _, workdir, _ in job.calls] == ["runs/grpo", "runs/grpo-tiny"]


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
def test_misspelt_key_is_refused_with_the_nearest_key(job, capsys, key, nearest):
    error = _refusal(capsys, "--config=configs/grpo.py", f"--config.{key}=1")
    assert f"--config.{key}: there is no such key; did you mean --config.{nearest}?" in error
    assert job.calls == []


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("rl.learning_rate", "optimizer.learning_rate"),
        ("rl.moment_dtype", "optimizer.moment_dtype"),
        ("rl.gae_lambda", "advantage.gae_lambda"),
        ("rl.importance_cap", "loss.importance_cap"),
        ("rl.kl", "kl.coef"),
        ("rl.kl_in", "kl.apply_to"),
        ("rl.nonfinite_limit", "watch.nonfinite_limit"),
        ("critic.value", "critic.coef"),
        ("generator.burst_tokens", "generator.chunk_tokens"),
        ("data.habits.vague", "data.behaviours.vague"),
        ("data.habits.astray", "data.behaviours.wrong_attribute"),
        ("judge.kind", "labeling.kind"),
        ("judge.generator.burst_tokens", "labeling.generator.chunk_tokens"),
    ],
)
def test_renamed_key_is_refused_with_its_new_name(job, capsys, old, new):
    error = _refusal(capsys, "--config=configs/grpo.py", f"--config.{old}=1")
    assert f"--config.{old}" in error and f"use --config.{new}\n" in error
    assert job.calls == []


def test_key_without_a_near_one_is_refused_with_the_sections(job, capsys):
    error = _refusal(capsys, "--config=configs/grpo.py", "--config.zzzz=1")
    assert "the sections are eval, generator, job, optimizer, rl" in error


def test_value_of_the_wrong_type_is_refused(job, capsys):
    error = _refusal(capsys, "--config=configs/grpo.py", "--config.rl.steps=abc")
    assert "--config.rl.steps=abc" in error
    assert "of type int, such as 60" in error


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (
            ["--config=configs/gpro.py"],
            "=configs/gpro.py: there is no such Python file; there are configs/grpo.py",
        ),
        (["--config=configs"], "--config=configs: there is no such Python file"),
        (["--config=configs/grpo.py:huge"], "unknown preset 'huge'; there are: tiny"),
        (["--config=configs/grpo.py:odd"], "odd is no preset"),
        ([], "--config=configs/grpo.py; there are configs/grpo.py"),
        (["--config=configs/grpo.py", "--wrkdir=x"], "wrkdir"),
        (["--config=configs/grpo.py", "rl.steps=3"], "'rl.steps=3' is not a flag"),
        (["--config=configs/grpo.py", "--config.eval.sets[0]=c"], "=\"('a', 'b')\""),
        (["--config=configs/grpo.py", "--config.eval[0]=c"], "eval[0]"),
        (["--config=configs/grpo.py", "--config.job=fly"], "'fly'; the jobs are rl, sft"),
        (["--config=configs/grpo.py", "--config=configs/grpo.py"], "is not allowed"),
        (["--config=configs/grpo.py", "--config"], "--config"),
        (["--config=configs/grpo.py", "--profile=0"], "--profile=0"),
        (["--config=configs/grpo.py", "--profile=2,-1"], "--profile=2,-1"),
        (["--config=configs/grpo.py", "--profile=2,"], "--profile=2,"),
        (["--config=configs/grpo.py", "--profile=2", "--config.job=bench"], "config.job=bench"),
        (["--config=configs/grpo.py", "--export=2", "--config.job=bench"], "--export is not for"),
        (["--config=configs/grpo.py", "--export=first"], "--export=first: give a step from 1"),
        (["--config=configs/grpo.py", "--export=-1"], "--export=-1: give a step from 1"),
        (["--config=configs/grpo.py", f"--export={'9' * 5000}"], "--export=999"),
        (["--config=configs/grpo.py", f"--profile={'9' * 5000}"], "--profile=999"),
        (["--config=configs/grpo.py", "--workdir=a\nb"], "--workdir='a"),
        (["--config=configs/grpo.py", f"--workdir={'a' * 5000}"], "shorter path"),
        (["--config=configs/grpo.py", "--config.=1"], "--config.: there is no such key"),
        (["--config=configs/grpo.py", "--config.rl=1"], "--config.rl is a section"),
        (["--config=configs/grpo.py", "--config.rl.steps"], "rl.steps"),
        (["--config=configs/grpo.py", "--describe=maybe"], "describe"),
        (["--config=configs/grpo.py", "--", "--workdir=x"], "is not a flag"),
        ([f"--config={'a' * 5000}.py"], "there is no such Python file"),
    ],
)
def test_other_mistakes_get_one_line(job, capsys, arguments, part):
    assert part in _refusal(capsys, *arguments)
    assert job.calls == []


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (b"x = 1\ndef get_config(:", ("line 2", "SyntaxError")),
        (b"x = '\xff'", ("SyntaxError", "utf-8")),
        (b"x = 1\n1 / 0", ("line 2", "ZeroDivisionError")),
        (b"import no_such_module", ("line 1", "no_such_module")),
        (b"import sys\nsys.exit(0)", ("line 2", "SystemExit")),
        (b"x = 1", ("no function get_config",)),
        (b"get_config = 3", ("no function get_config",)),
        (b"def get_config():\n    return {}", ("returned dict", "ConfigDict")),
        (b"def get_config():\n    return get_config()", ("line 2", "RecursionError")),
        (b"def get_config():\n    raise KeyError('a\\nb')", ("line 2", "KeyError")),
        (b"def get_config(preset): pass", ("TypeError", "preset")),
        (b"D = None\ndef get_config():\n    return D.x", ("line 3", "AttributeError")),
    ],
)
def test_a_broken_config_file_is_one_line_with_file_and_line(job, capsys, content, parts):
    Path("broken.py").write_bytes(content)
    error = _refusal(capsys, "--config=broken.py")
    assert "--config=broken.py" in error and all(part in error for part in parts), error


def test_a_preset_of_a_file_without_presets_is_refused(job, capsys):
    Path("plain.py").write_text(CONFIG.replace('preset=""', "").replace("preset", "''"))
    assert main.cli(["main", "--config=plain.py"]) == 0
    assert "--config=plain.py:tiny: TypeError" in _refusal(capsys, "--config=plain.py:tiny")


@pytest.mark.parametrize(
    ("value", "part"),
    [
        ("['rl']", "config.job"),
        ("{}", "config.job"),
        ("required_placeholder(str)", "RequiredValueError"),
        ("placeholder(str)", "config.job is None"),
        ("FieldReference('fly')", "'fly'"),
        ("10**5000", "ValueError"),
    ],
)
def test_a_job_of_another_type_is_one_line(job, capsys, value, part):
    imports = "from ml_collections import FieldReference\n"
    imports += "from ml_collections.config_dict import placeholder, required_placeholder\n"
    Path("odd.py").write_text(imports + CONFIG.replace('"job": "rl"', f'"job": {value}'))
    assert part in _refusal(capsys, "--config=odd.py")


def test_profile_steps_reach_the_job(job):
    assert main.cli(["main", "--config=configs/grpo.py", "--profile=2,5"]) == 0
    assert job.calls[0][2] == {"profile_steps": (2, 5)}


def test_export_needs_no_lock_and_does_not_train(job):
    exported = []
    job.export_checkpoint = lambda config, *rest: exported.append((config.job, *rest))
    with locked("runs/grpo"):
        assert main.cli(["main", "--config=configs/grpo.py", "--export=best"]) == 0
    assert exported == [("rl", "runs/grpo", "best")] and job.calls == []


def test_user_error_of_a_job_is_one_line_and_other_errors_are_not_hidden(job, capsys):
    def raising(error):
        def run(config, workdir):
            raise error

        return run

    job.run = raising(UserError("models/x: no such directory"))
    assert _refusal(capsys, "--config=configs/grpo.py") == "error: models/x: no such directory\n"
    job.run = raising(ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        main.cli(["main", "--config=configs/grpo.py"])
    for error, status in ((KeyboardInterrupt(), 130), (Terminated(), 143)):
        job.run = raising(error)
        assert main.cli(["main", "--config=configs/grpo.py"]) == status
        assert "resumes" in capsys.readouterr().err


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EFBIG])
def test_disk_errors_are_one_line(job, capsys, number):
    def run(config, workdir):
        Path(workdir, "begun").touch()
        raise OSError(number, os.strerror(number), f"{workdir}/checkpoints/3")

    job.run = run
    error = _refusal(capsys, "--config=configs/grpo.py")
    assert f"runs/grpo/checkpoints/3: {os.strerror(number)}" in error


def _full_disk():
    return os.fdopen(os.open("/dev/full", os.O_WRONLY), "w")


def _pipe_without_a_reader():
    read, write = os.pipe()
    os.close(read)
    return os.fdopen(write, "w")


OUTPUTS = {
    "closed pipe": (_pipe_without_a_reader, main.CLOSED_OUTPUT),
    "full disk": (_full_disk, 2),
    "closed": (lambda: None, 0),
    "ASCII": (lambda: io.TextIOWrapper(io.BytesIO(), encoding="ascii"), 0),
}


@pytest.mark.parametrize(("output", "status"), OUTPUTS.values(), ids=OUTPUTS)
def test_output_that_cannot_be_written_ends_without_a_traceback(
    job, monkeypatch, capsys, output, status
):
    Path("configs/grpo.py").write_text(f'"""Overrides: ≥ 1."""{CONFIG}')
    monkeypatch.setattr(sys, "stdout", output())
    assert main.cli(["main", "--help"]) == status
    sys.stdout.close()  # as at Python's exit: it does not raise again
    assert capsys.readouterr().err.count("\n") == (status == 2)


def test_the_exit_status_survives_a_closed_error_output(job, monkeypatch):
    monkeypatch.setattr(sys, "stderr", _pipe_without_a_reader())
    assert main.cli(["main", "--config=nowhere.py"]) == 2
    sys.stderr.close()


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "a\udcff", "a\nb"])
def test_a_workdir_without_a_usable_name_is_one_line(job, capsys, name):
    assert "--workdir" in _refusal(capsys, "--config=configs/grpo.py", f"--workdir={name}")
    assert job.calls == [] and os.listdir() == ["configs"]


def test_a_directory_in_place_of_the_lock_is_one_line(job, capsys):
    Path("w", "lock").mkdir(parents=True)
    assert "error: w/lock: " in _refusal(capsys, "--config=configs/grpo.py", "--workdir=w")
    assert job.calls == []


def test_a_directory_in_place_of_a_result_is_named(job, capsys):
    def run(config, workdir):
        path = Path(workdir, "summary.json")
        path.mkdir()
        write_json(path, {})

    job.run = run
    assert "error: w/summary.json: " in _refusal(capsys, "--config=configs/grpo.py", "--workdir=w")


def test_a_damaged_lock_file_of_a_running_job_is_one_line(job, capsys):
    def run(config, workdir):
        Path(workdir, "lock").write_bytes(b"\xff\n\0")
        _refusal(capsys, "--config=configs/grpo.py", "--workdir=w")

    job.run = run
    assert main.cli(["main", "--config=configs/grpo.py", "--workdir=w"]) == 0


@pytest.mark.parametrize("workdir", ["file", "file/below"])
def test_workdir_that_cannot_be_made_is_one_line(job, capsys, workdir):
    Path("file").touch()
    error = _refusal(capsys, "--config=configs/grpo.py", f"--workdir={workdir}")
    assert f"error: {workdir}: " in error
    assert job.calls == []


def test_a_workdir_in_use_is_refused(job, capsys):
    arguments = ["--config=configs/grpo.py", "--workdir=a/b"]
    seen = []

    def run(config, workdir):
        Path(workdir, "result").touch()
        seen.append(_refusal(capsys, *arguments))

    job.run = run
    assert main.cli(["main", *arguments]) == 0
    assert f"a/b is in use by process {os.getpid()} on " in seen[0]
    job.run = lambda config, workdir: seen.append("free")
    assert main.cli(["main", *arguments]) == 0  # the lock ended with the first run
    assert seen[1:] == ["free"]


def test_a_lock_file_that_another_run_removes_is_not_held(tmp_path, monkeypatch):
    """A run that ends removes its empty workdir, after another run has opened the lock file."""
    flock, workdir, removed = fcntl.flock, tmp_path / "a" / "b", []

    def after_the_removal(file, operation):
        if not removed:
            removed.append(shutil.rmtree(tmp_path / "a"))
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", after_the_removal)
    with locked(workdir):
        assert removed and (workdir / "lock").read_text().startswith(f"process {os.getpid()} ")
        with pytest.raises(UserError, match="in use"), locked(workdir):
            pass


def test_a_refused_run_leaves_no_directory(job, capsys):
    def refuse(config, workdir):
        raise UserError("no")

    def train(config, workdir):
        Path(workdir, "metrics.jsonl").touch()
        raise UserError("stopped")

    Path("own").mkdir()
    for workdir in ("runs/deep/grpo", "own"):
        job.run = refuse
        _refusal(capsys, "--config=configs/grpo.py", f"--workdir={workdir}")
        assert not Path("runs").exists() and list(Path("own").iterdir()) == []
    job.run = train
    _refusal(capsys, "--config=configs/grpo.py", "--workdir=own")
    assert Path("own", "metrics.jsonl").exists()


def test_every_config_of_the_project_has_a_known_job(monkeypatch):
    monkeypatch.chdir(main.Path(main.__file__).parents[1])
    for path in sorted(main.Path("configs").glob("*.py")):
        assert config_flags.load(str(path)).job in main.JOBS, path


def test_help_lists_flags_config_files_and_presets(job, capsys):
    assert main.cli(["main", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "--workdir=DIR" in shown and "--describe" in shown
    assert "configs/grpo.py" in shown and "presets: tiny" in shown


def test_describe_shows_every_key_with_type_value_and_documentation(monkeypatch, capsys):
    monkeypatch.chdir(main.Path(main.__file__).parents[1])
    arguments = ["--config=configs/grpo.py", "--config.rl.steps=7", "--describe"]
    assert main.cli(["main", *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    section = lines.index(next(line for line in lines if line.startswith("config.rl: ")))
    assert " ".join(lines[section + 1].split()).startswith("steps int ≥ 1 7 Training steps")
    assert any(line.startswith("config.search.simulator.generator: ") for line in lines)
    shown = {tuple(line.split()[:3]) for line in lines}
    assert {("int8_weights", "bool", "False"), ("normalize_std", "bool", "True")} <= shown


def test_partly_set_variables_of_processes_are_refused():
    whole = WHOLE
    assert main.distributed_arguments({}) == {}
    assert main.distributed_arguments(whole | {"HOME": "x"}) == {
        "coordinator_address": "host:1234", "num_processes": 2, "process_id": 1,
    }  # fmt: skip
    for name in main.PROCESS_VARIABLES:
        partial = {key: value for key, value in whole.items() if key != name}
        with pytest.raises(UserError, match=f"{name} is not; set all or none"):
            main.distributed_arguments(partial)
    for wrong in ("2", "-1", "one"):
        with pytest.raises(UserError, match=f"JAX_PROCESS_ID={wrong} must be a number below"):
            main.distributed_arguments(whole | {"JAX_PROCESS_ID": wrong})


WHOLE = dict(zip(main.PROCESS_VARIABLES, ("host:1234", "2", "1"), strict=True))


@pytest.mark.parametrize(
    ("variable", "values"),
    [
        (
            "JAX_COORDINATOR_ADDRESS",
            ("host", "host:", ":1", "host:0", "host:99999", "a b:1", "http://host:1", "::1:80", ""),
        ),
        ("JAX_NUM_PROCESSES", ("abc", "0", "-2", "1e3", "", "1.5", "9" * 5000)),
        ("JAX_PROCESS_ID", ("abc", "-1", "2", "", "0x1", "9" * 5000)),
    ],
)
def test_a_wrong_jax_process_variable_is_refused_before_jax_is_imported(
    job, capsys, monkeypatch, variable, values
):
    monkeypatch.setattr(main, "_run_job", lambda *arguments: job.calls.append(arguments))
    for value in values:
        for name, right in WHOLE.items():
            monkeypatch.setenv(name, value if name == variable else right)
        error = _refusal(capsys, "--config=configs/grpo.py", "--distributed")
        assert error.startswith(f"error: {variable}=") and len(error) < 300
    assert job.calls == []
    for address in ("10.0.0.1:80", "[::1]:80", "a-b.c_d:65535"):
        variables = WHOLE | {"JAX_COORDINATOR_ADDRESS": address}
        assert main.distributed_arguments(variables)["coordinator_address"] == address


def test_processes_that_jax_does_not_detect_are_one_line(monkeypatch):
    def initialize(**arguments):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with pytest.raises(UserError, match="--distributed: coordinator.* set JAX_COORDINATOR_ADDRESS"):
        distributed.initialize({})


def test_a_process_does_not_wait_for_process_0_without_bound(monkeypatch):
    calls = []
    monkeypatch.setattr(distributed, "START_SECS", 0)
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    monkeypatch.setattr(jax.distributed, "initialize", lambda **given: calls.append(given))
    monkeypatch.setattr(sys, "stdout", sys.stdout)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        arguments = dict(coordinator_address=address, num_processes=2, process_id=1)
        distributed.initialize(arguments)
    assert len(calls) == 1
    with pytest.raises(UserError, match=f"{address}: process 0 cannot be reached"):
        distributed.initialize(arguments)
    assert len(calls) == 1


def test_single_process_jobs_refuse_the_distributed_flag(job, capsys):
    Path("configs/grpo.py").write_text(CONFIG.replace('"job": "rl"', '"job": "sft"'))
    error = _refusal(capsys, "--config=configs/grpo.py", "--distributed")
    assert "--distributed is not for config.job=sft" in error
