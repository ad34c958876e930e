"""The rl job on several real processes (launch/local.sh) does what it does on one."""

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

ROOT = Path(__file__).parents[2]
RATE = 1e-4  # Adam divides by a gradient's size: where that is 0, rounding turns into RATE
FLAGS = ("--config.rl.steps=2", f"--config.optimizer.learning_rate={RATE}", "--config.eval.every=2")
CHEAP = "--xla_backend_optimization_level=0"  # to compile; the results are what is compared
SINGLE_WRITERS = ("metrics.jsonl", "summary.json", "answers.jsonl")
# Name → processes, devices of each, flags. Slots are of a process, rows of all of them.
CASES = {
    "2 x 1": (2, 1, ("--config.mesh.data=2",)),
    "4 x 1": (4, 1, ("--config.mesh.data=4",)),  # two of them have no group to play
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


def _alone(config: Path, workdir: Path, *flags: str, devices: int = 1, programs: Path) -> str:
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


def _together(config: Path, workdir: Path, name: str, *flags: str, programs: Path):
    """Starts a case's processes."""
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
def alone(rl_config, tmp_path_factory, programs):
    """The run of one process on one device."""
    workdir = tmp_path_factory.mktemp("alone")
    _alone(rl_config, workdir, programs=programs)
    return workdir


def _assert_same_run(workdir: Path, alone: Path, markov_model: Path) -> None:
    got, wanted, base = (
        load_file(d / "model.safetensors")
        for d in (workdir / "policy", alone / "policy", markov_model)
    )
    assert got.keys() == wanted.keys() == base.keys()
    off, moved = 0.0, 0.0
    for name, value in wanted.items():
        np.testing.assert_allclose(got[name], value, rtol=0, atol=1e-5, err_msg=name)
        assert np.abs(value - base[name]).max() > 0.5 * RATE, name
        off += np.sum(np.square(got[name] - value))
        moved += np.sum(np.square(value - base[name]))
    assert off < 1e-4 * moved  # a hundredth of how far training went
    rows = [
        [json.loads(line) for line in (d / "metrics.jsonl").read_text().splitlines()]
        for d in (workdir, alone)
    ]
    assert [row["step"] for row in rows[0]] == [1, 2]
    assert max(row["searches_per_episode"] for row in rows[1]) > 0
    for ours, theirs in zip(*rows, strict=True):
        for figure in ("reward", "em", "searches_per_episode", "tokens_per_episode", "p_noisy"):
            assert ours[figure] == pytest.approx(theirs[figure], abs=1e-6), figure
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
        assert ours["seconds/weights"] > 0
        assert ours["weights_bytes"] >= theirs["weights_bytes"] > 0
    answers = [(d / "answers.jsonl").read_text() for d in (workdir, alone)]
    assert answers[0] == answers[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_processes_train_as_one_does(rl_config, markov_model, tmp_path, alone, programs, name):
    run = _together(rl_config, tmp_path, name, programs=programs)
    output, _ = run.communicate(timeout=1800)
    assert run.returncode == 0, output
    _assert_same_run(tmp_path, alone, markov_model)
    assert output.count("step 2/2") == 1  # the first process speaks for all
    events = list((tmp_path / "tensorboard").iterdir())
    assert len(events) == 1
    for file in SINGLE_WRITERS:
        assert (tmp_path / file).is_file()


@pytest.mark.slow
def test_a_dead_process_ends_the_job_and_the_next_start_resumes(
    rl_config, markov_model, tmp_path, alone, programs
):
    run = _together(rl_config, tmp_path, "2 x 1", programs=programs)
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
    # On one device of one process, and on the two processes.
    shutil.copytree(tmp_path, tmp_path.with_name("on-one"))
    shown = _alone(rl_config, tmp_path.with_name("on-one"), programs=programs)
    assert "resuming after step 1" in shown
    _assert_same_run(tmp_path.with_name("on-one"), alone, markov_model)
    run = _together(rl_config, tmp_path, "2 x 1", programs=programs)
    output, _ = run.communicate(timeout=1800)
    assert run.returncode == 0 and output.count("resuming after step 1") == 1, output
    _assert_same_run(tmp_path, alone, markov_model)


def _process_of(run: subprocess.Popen, number: int) -> int:
    """The pid of the job's process `number`, found by the environment that local.sh gave it."""
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
def test_a_checkpoint_of_eight_devices_resumes_on_two_processes_of_two(
    rl_config, markov_model, tmp_path, alone, programs
):
    flags = ("--config.mesh.data=4", "--config.mesh.fsdp=2")
    _alone(rl_config, tmp_path, "--config.rl.steps=1", *flags, devices=8, programs=programs)
    run = _together(rl_config, tmp_path, "2 x 2", programs=programs)
    output, _ = run.communicate(timeout=1800)
    assert run.returncode == 0 and output.count("resuming after step 1") == 1, output
    _assert_same_run(tmp_path, alone, markov_model)


# ---- one process, disjoint devices ------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (dict(search=dict(simulator=dict(devices=1))), "overlap by rollout.concurrent_searches"),
        (dict(search=dict(engine="bm25", simulator=dict(devices=1))), "simulator that runs here"),
    ],
)
def test_devices_apart_that_would_idle_are_refused(rl_config, change, told):
    config = config_flags.load(str(rl_config))
    config.update(change)
    with pytest.raises(UserError, match=told):
        rl.check(config)


@pytest.mark.slow
def test_a_simulator_on_devices_of_its_own_changes_no_result(
    rl_config, markov_model, tmp_path, alone
):
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
    seen = []
    make_mesh = rl.build.local_meshes
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            rl.build, "local_meshes", lambda *a: seen.append(make_mesh(*a)) or make_mesh(*a)
        )
        rl.run(config, str(tmp_path))
    ((policy, simulator),) = seen
    assert not {*policy.devices.flat} & {*simulator.devices.flat}
    assert {*policy.devices.flat, *simulator.devices.flat} == {*jax.devices()[:2]}
    _assert_same_run(tmp_path, alone, markov_model)
