"""Tests that the rl job on several processes (launch/local.sh) equals the run on one process."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from zerosearch_jax import config_flags
from zerosearch_jax.errors import UserError
from zerosearch_jax.jobs import rl
from zerosearch_jax.parallel.mesh import local_meshes
from zerosearch_jax.training import factory
from zerosearch_jax.training.config import RLConfig
from zerosearch_jax.training.validate import check

ROOT = Path(__file__).parents[2]
# Adam divides by the gradient's magnitude, so a rounding error of a zero gradient moves a parameter
# by up to RATE.
RATE = 1e-4
FLAGS = ("--config.rl.steps=2", f"--config.optimizer.learning_rate={RATE}", "--config.eval.every=2")
CHEAP = "--xla_backend_optimization_level=0"  # compiles faster
SINGLE_WRITERS = ("metrics.jsonl", "summary.json", "answers.jsonl")
# Name → processes, devices per process, flags. Slots are counted per process, rows over all.
CASES = {
    "2 x 1": (2, 1, ("--config.mesh.data=2",)),
    "4 x 1": (4, 1, ("--config.mesh.data=4",)),  # two processes have no group to roll out
    "2 x 2": (2, 2, ("--config.mesh.fsdp=2", "--config.mesh.data=2")),
    "2 x 2 disjoint": (
        2,
        2,
        (
            "--config.mesh.fsdp=4",
            "--config.search.simulator.devices=1",
            "--config.rollout.concurrent_searches=1",
        ),
    ),
}


def _run_single(config: Path, workdir: Path, *flags: str, devices: int = 1, programs: Path) -> str:
    environment = os.environ | {
        "XLA_FLAGS": f"{CHEAP} --xla_force_host_platform_device_count={devices}",
        "JAX_COMPILATION_CACHE_DIR": str(programs),
    }
    command = [sys.executable, "-m", "zerosearch_jax.main", f"--config={config}"]
    done = subprocess.run(
        [*command, f"--workdir={workdir}", *FLAGS, *flags],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1800,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def _start_processes(config: Path, workdir: Path, name: str, *flags: str, programs: Path):
    """Starts the processes of a case."""
    processes, devices, own = CASES[name]
    command = ["bash", "launch/local.sh", "--processes", str(processes)]
    command += ["--devices-per-process", str(devices), "--log-dir", f"{workdir}/logs"]
    command += ["--program", f"{sys.executable} -m zerosearch_jax.main", "--"]
    environment = os.environ | {"XLA_FLAGS": CHEAP, "JAX_COMPILATION_CACHE_DIR": str(programs)}
    return subprocess.Popen(
        [*command, f"--config={config}", f"--workdir={workdir}", *FLAGS, *own, *flags],
        cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    return tmp_path_factory.mktemp("programs")


@pytest.fixture(scope="module")
def single(rl_config, tmp_path_factory, programs):
    """The workdir of a run with one process on one device."""
    workdir = tmp_path_factory.mktemp("single")
    _run_single(rl_config, workdir, programs=programs)
    return workdir


def _assert_same_run(workdir: Path, single: Path, markov_model: Path) -> None:
    got, wanted, base = (
        load_file(d / "model.safetensors")
        for d in (workdir / "policy", single / "policy", markov_model)
    )
    assert got.keys() == wanted.keys() == base.keys()
    difference, moved = 0.0, 0.0
    for name, value in wanted.items():
        np.testing.assert_allclose(got[name], value, rtol=0, atol=1e-5, err_msg=name)
        assert np.abs(value - base[name]).max() > 0.5 * RATE, name
        difference += np.sum(np.square(got[name] - value))
        moved += np.sum(np.square(value - base[name]))
    assert difference < 1e-4 * moved  # squared norms: 1 % of the distance that training moved
    rows = [
        [json.loads(line) for line in (d / "metrics.jsonl").read_text().splitlines()]
        for d in (workdir, single)
    ]
    assert [row["step"] for row in rows[0]] == [1, 2]
    assert max(row["searches_per_episode"] for row in rows[1]) > 0
    for ours, theirs in zip(*rows, strict=True):
        for metric in ("reward", "em", "searches_per_episode", "tokens_per_episode", "p_noisy"):
            assert ours[metric] == pytest.approx(theirs[metric], abs=1e-6), metric
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
        assert ours["seconds/weights"] > 0
        assert ours["weights_bytes"] >= theirs["weights_bytes"] > 0
    answers = [(d / "answers.jsonl").read_text() for d in (workdir, single)]
    assert answers[0] == answers[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_several_processes_train_as_one_does(
    rl_config, markov_model, tmp_path, single, programs, name
):
    run = _start_processes(rl_config, tmp_path, name, programs=programs)
    output, _ = run.communicate(timeout=1800)
    assert run.returncode == 0, output
    _assert_same_run(tmp_path, single, markov_model)
    assert output.count("step 2/2") == 1  # only process 0 prints
    events = list((tmp_path / "tensorboard").iterdir())
    assert len(events) == 1
    for file in SINGLE_WRITERS:
        assert (tmp_path / file).is_file()


@pytest.mark.slow
def test_killed_process_ends_the_job_and_the_next_start_resumes(
    rl_config, markov_model, tmp_path, single, programs
):
    run = _start_processes(rl_config, tmp_path, "2 x 1", programs=programs)
    deadline = time.monotonic() + 1500
    while not (tmp_path / "checkpoints" / "1").is_dir():
        assert run.poll() is None, run.communicate()[0]
        assert time.monotonic() < deadline, "no first step"
        time.sleep(0.01)
    os.kill(_process_of(run, 1), signal.SIGKILL)
    output, _ = run.communicate(timeout=60)
    assert run.returncode != 0
    assert "ended with exit status" in output and "ending the others" in output
    assert not (tmp_path / "summary.json").exists()
    # Resumes on one process with one device, and on the two processes.
    shutil.copytree(tmp_path, tmp_path.with_name("single-process"))
    shown = _run_single(rl_config, tmp_path.with_name("single-process"), programs=programs)
    assert "resuming after step 1" in shown
    _assert_same_run(tmp_path.with_name("single-process"), single, markov_model)
    run = _start_processes(rl_config, tmp_path, "2 x 1", programs=programs)
    output, _ = run.communicate(timeout=1800)
    assert run.returncode == 0 and output.count("resuming after step 1") == 1, output
    _assert_same_run(tmp_path, single, markov_model)


def _process_of(run: subprocess.Popen, number: int) -> int:
    """Returns the pid of the job's process `number`, found by its JAX_PROCESS_ID variable."""
    for entry in Path("/proc").iterdir():
        try:
            environment = (entry / "environ").read_bytes().split(b"\0")
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError):
            continue
        if parent == run.pid and f"JAX_PROCESS_ID={number}".encode() in environment:
            return int(entry.name)
    raise AssertionError(f"no process {number} of {run.pid}")


@pytest.mark.slow
def test_checkpoint_of_eight_devices_resumes_on_two_processes_with_two_each(
    rl_config, markov_model, tmp_path, single, programs
):
    flags = ("--config.mesh.data=4", "--config.mesh.fsdp=2")
    _run_single(rl_config, tmp_path, "--config.rl.steps=1", *flags, devices=8, programs=programs)
    run = _start_processes(rl_config, tmp_path, "2 x 2", programs=programs)
    output, _ = run.communicate(timeout=1800)
    assert run.returncode == 0 and output.count("resuming after step 1") == 1, output
    _assert_same_run(tmp_path, single, markov_model)


# ---- one process, disjoint devices ------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(search=dict(simulator=dict(devices=1))), "rollout.concurrent_searches=1"),
        (dict(search=dict(engine="bm25", simulator=dict(devices=1))), "simulator in this process"),
    ],
)
def test_simulator_devices_that_would_idle_are_refused(rl_config, change, message):
    config = config_flags.load(str(rl_config))
    config.update(change)
    with pytest.raises(UserError, match=message):
        check(config_flags.typed(RLConfig, config))


@pytest.mark.slow
def test_simulator_on_separate_devices_changes_no_result(rl_config, markov_model, tmp_path, single):
    config = config_flags.load(str(rl_config))
    config.update(
        dict(
            mesh=dict(data=2),
            search=dict(simulator=dict(devices=1)),
            rl=dict(steps=2),
            optimizer=dict(learning_rate=RATE),
            rollout=dict(concurrent_searches=1),
            eval=dict(every=2),
        )
    )
    meshes = []

    def recorded(*arguments):
        meshes.append(local_meshes(*arguments))
        return meshes[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(factory, "local_meshes", recorded)
        rl.run(config, str(tmp_path))
    ((policy, simulator),) = meshes
    assert not {*policy.devices.flat} & {*simulator.devices.flat}
    assert {*policy.devices.flat, *simulator.devices.flat} == {*jax.devices()[:2]}
    _assert_same_run(tmp_path, single, markov_model)
