"""Stages of a pipeline: order, skipping, failures, and the end of the pipeline's process."""

import os
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from zerosearch_jax.data.records import Records
from zerosearch_jax.errors import UserError
from zerosearch_jax.experiments.stages import Stage, check_finished, run_stages

ROOT = Path(__file__).parents[2]


def test_stages_run_in_order_and_finished_stages_are_skipped(tmp_path, capsys):
    todo = [
        Stage("a", ("--help",), "log.txt"),
        Stage("b", ("--help",), "log.txt", ("a",)),
    ]
    log = Records(tmp_path / "stages.jsonl")
    run_stages(todo, tmp_path, 1, log)
    assert "--config=FILE" in (tmp_path / "b" / "log.txt").read_text()
    assert [record["id"].partition("@")[0] for record in log] == ["a", "b"]
    run_stages(todo, tmp_path, 1, log)
    assert len(log) == 2
    assert "2 of 2 stages are done" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("ended", "changes", "message"),
    [
        ({"a": 1, "b": 2}, {}, None),
        ({"a": 1}, {}, None),  # b was not finished by this pipeline
        ({"a": 3, "b": 2}, {}, "stage b is older than .* stage a"),
        ({"a": 1, "b": 2}, {"argv": ("--help", "--x")}, "stage b ran with other flags"),
        ({"a": 1, "b": 2}, {"config": "edited"}, "stage b ran with other flags or .* config file"),
    ],
)
def test_a_stale_stage_is_refused(tmp_path, ended, changes, message):
    a = Stage("a", (f"--x={tmp_path}/out",), "done")
    b = Stage("b", ("--help",), "done", ("a",))
    log = Records(tmp_path / "stages.jsonl")
    moved = [Stage("a", ("--x=elsewhere/out",), "done"), b]  # a workdir may move
    for stage in moved:
        if stage.name in ended:
            recipe = stage.recipe(Path("elsewhere"))
            time_ = ended[stage.name]
            log.append([{"id": f"{stage.name}@{time_}", "ended": time_, "recipe": recipe}])
    check = partial(check_finished, [a, replace(b, **changes)], [], tmp_path, log)
    if message is None:
        check()
        return
    with pytest.raises(UserError, match=message):
        check()


def test_a_finished_stage_waits_for_no_stage_that_runs_again(tmp_path):
    a, b = Stage("a", (), "done"), Stage("b", (), "done", ("a",))
    log = Records(tmp_path / "stages.jsonl")
    log.append([{"id": "b@2", "ended": 2, "recipe": b.recipe(tmp_path)}])
    with pytest.raises(UserError, match="stage b is older than .* stage a"):
        check_finished([b], [a], tmp_path, log)


def test_a_failed_stage_is_named_with_its_log(tmp_path):
    todo = [Stage("bad", ("--config=nowhere.py",), "summary.json")]
    with pytest.raises(UserError, match="stage bad failed; .*bad/log.txt"):
        run_stages(todo, tmp_path, 1, Records(tmp_path / "stages.jsonl"))
    assert "nowhere.py" in (tmp_path / "bad" / "log.txt").read_text()


def test_more_workers_than_cores_are_refused(tmp_path):
    with pytest.raises(UserError, match="config.workers=999"):
        run_stages([], tmp_path, 999, Records(tmp_path / "stages.jsonl"))


def test_a_stage_has_its_share_of_the_cores_and_the_shared_compilation_cache(tmp_path):
    own_cores = os.sched_getaffinity(0)
    config = tmp_path / "show.py"
    config.write_text(
        "import os, pathlib\n"
        f"out = pathlib.Path({str(tmp_path)!r})\n"
        "text = [sorted(os.sched_getaffinity(0)), os.environ['JAX_COMPILATION_CACHE_DIR']]\n"
        "(out / 'seen').write_text(repr(text))\n"
        "os._exit(0)\n"
    )
    workers = min(2, len(own_cores))
    stage = Stage("show", (f"--config={config}",), "log.txt")
    run_stages([stage], tmp_path, workers, Records(tmp_path / "stages.jsonl"))
    share = sorted(own_cores)[::workers]
    assert (tmp_path / "seen").read_text() == repr([share, str(tmp_path / "compiled")])
    assert os.sched_getaffinity(0) == own_cores


def test_a_failed_stage_ends_the_others(tmp_path):
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs two cores")
    pid_file = tmp_path / "pid"
    todo = [
        Stage("slow", (f"--config={_slow_config(tmp_path, pid_file)}",), "never.json"),
        Stage("bad", (f"--config={_failing_config(tmp_path, pid_file)}",), "never.json"),
    ]
    with pytest.raises(UserError, match="stage bad failed"):
        run_stages(todo, tmp_path, 2, Records(tmp_path / "stages.jsonl"))
    assert not _alive(int(pid_file.read_text()))


def test_stages_end_when_the_pipeline_is_killed(tmp_path):
    """Otherwise a restarted pipeline and an old stage would write to the same folder."""
    pid_file, script = tmp_path / "pid", tmp_path / "pipeline.py"
    slow = _slow_config(tmp_path, pid_file)
    script.write_text(
        "from pathlib import Path\n"
        "from zerosearch_jax.data.records import Records\n"
        "from zerosearch_jax.experiments.stages import Stage, run_stages\n"
        f"root = Path({str(tmp_path)!r})\n"
        f"stage = Stage('slow', ('--config={slow}',), 'never.json')\n"
        "run_stages([stage], root, 1, Records(root / 'stages.jsonl'))\n"
    )
    environment = dict(os.environ, PYTHONPATH=str(ROOT))
    pipeline = subprocess.Popen([sys.executable, str(script)], env=environment)
    try:
        pid = int(_within(60, lambda: pid_file.exists() and pid_file.read_text()))
        assert _alive(pid)
    finally:
        pipeline.kill()
        pipeline.wait()
    _within(30, lambda: not _alive(pid))


def _slow_config(folder: Path, pid_file: Path) -> Path:
    """A config file whose stage writes its process id and then sleeps."""
    path = folder / "slow.py"
    path.write_text(
        "import os, pathlib, time\n"
        f"part = pathlib.Path({str(pid_file)!r} + '.part')\n"
        "part.write_text(str(os.getpid()))\n"
        f"part.rename({str(pid_file)!r})\n"
        "time.sleep(600)\n"
    )
    return path


def _failing_config(folder: Path, after: Path) -> Path:
    """A config file whose stage fails as soon as the file `after` exists."""
    path = folder / "bad.py"
    path.write_text(
        "import pathlib, time\n"
        f"while not pathlib.Path({str(after)!r}).exists():\n"
        "    time.sleep(0.05)\n"
        "raise SystemExit(3)\n"
    )
    return path


def _alive(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    # An ended process may remain as a zombie ("Z") until its parent waits for it.
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


def _within(seconds: float, condition):
    until = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < until, f"not within {seconds} s"
        time.sleep(0.1)
    return value
