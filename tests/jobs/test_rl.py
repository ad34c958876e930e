"""The rl job end to end, tiny: what it writes, what it compiles, how it resumes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from zerosearch_jax import config_check
from zerosearch_jax.data.qa import QARow
from zerosearch_jax.errors import UserError
from zerosearch_jax.jobs import rl
from zerosearch_jax.telemetry.metrics import METRICS, SFT_METRICS
from zerosearch_jax.telemetry.progress import Progress

ROOT = Path(__file__).parents[2]
CLOCKS = ("seconds/", "tokens_per_sec", "host_share")


def _rows(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def _without_clocks(row: dict) -> dict:
    return {name: value for name, value in row.items() if not name.startswith(CLOCKS)}


@pytest.fixture(scope="module")
def finished(rl_config, tmp_path_factory):
    """A whole run: its workdir, and the compilations up to each step's end."""
    workdir = tmp_path_factory.mktemp("whole")
    return workdir, run_and_count(config_check.load(str(rl_config)), workdir)


def run_and_count(config, workdir) -> list[int]:
    """Runs the job; how often anything had been compiled when each step ended."""
    compiled, counts = [], []

    def listen(event: str, secs: float, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    class Counting(Progress):
        def update(self, done, figures):
            counts.append(len(compiled))
            super().update(done, figures)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rl, "Progress", Counting)
        jax.monitoring.register_event_duration_secs_listener(listen)
        try:
            rl.run(config, str(workdir))
        finally:
            jax.monitoring.unregister_event_duration_listener(listen)
    return counts


def test_summary_holds_the_promised_keys(finished):
    workdir, _ = finished
    summary = json.loads((workdir / "summary.json").read_text())
    assert summary.keys() == {
        "base", "trained", "no_search", "steps", "seconds", "engine", "split",
    }  # fmt: skip
    for name in ("base", "trained", "no_search"):
        assert {"em", "f1"} <= summary[name].keys()
        assert 0.0 <= summary[name]["em"] <= summary[name]["f1"] <= 1.0
    assert summary["base"]["em"] > 0  # the hand-written policy guesses Chad, which is often right
    assert summary["no_search"]["searches_per_episode"] == 0
    assert (summary["steps"], summary["engine"], summary["split"]) == (3, "bm25", "test")


def test_every_step_writes_every_metric_of_the_glossary(finished):
    rows = _rows(finished[0])
    assert [row["step"] for row in rows] == [1, 2, 3]
    wanted = METRICS.keys() - SFT_METRICS.keys() | {"step"}
    for row in rows:
        assert row.keys() == wanted
        assert all(np.isfinite(value) for value in row.values())
        assert row["searches_per_episode"] > 0 and row["grad_norm"] > 0
        assert row["sampler_logprob_diff_max"] < 1e-3
    assert [row["p_noisy"] for row in rows] == sorted(row["p_noisy"] for row in rows)
    assert rows[0]["kl"] < 1e-6 < rows[2]["kl"]  # the policy starts as the reference
    assert any(0 < row["reward"] < 1 for row in rows)


def test_nothing_is_compiled_after_the_first_step(finished):
    counts = finished[1]
    assert len(counts) == 3 and counts[0] > 0
    assert counts[2] - counts[0] == 0


@pytest.mark.slow
def test_twenty_steps_compile_nothing_after_the_first(rl_config, tmp_path):
    """Other contexts, numbers of running rows and searches in each; never another program."""
    config = config_check.load(str(rl_config))
    config.rl.steps = 20
    config.eval.every = 5
    config.policy.generator.decode_rows = (2, 4)
    config.policy.generator.window_tokens = 128
    counts = run_and_count(config, tmp_path)
    assert len(counts) == 20 and counts[0] > 0
    assert counts[-1] == counts[0]


def test_the_trained_policy_is_a_model_directory_that_differs_from_the_base(finished, markov_model):
    trained = (finished[0] / "policy" / "model.safetensors").read_bytes()
    base = (markov_model / "model.safetensors").read_bytes()
    assert len(trained) == len(base) and trained != base
    assert (finished[0] / "policy" / "tokenizer.json").is_file()


@pytest.mark.slow
def test_a_run_killed_and_resumed_equals_the_uninterrupted_one(finished, rl_config, tmp_path):
    whole = finished[0]
    command = [sys.executable, "-m", "zerosearch_jax.main", f"--config={rl_config}"]
    command += [f"--workdir={tmp_path}"]
    with (tmp_path / "log").open("w") as log:
        run = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
        deadline = time.monotonic() + 300
        while not (tmp_path / "checkpoints" / "2").is_dir() and run.poll() is None:
            assert time.monotonic() < deadline, "no second step in five minutes"
            time.sleep(0.01)
        run.send_signal(signal.SIGKILL)
        assert run.wait() == -signal.SIGKILL, (tmp_path / "log").read_text()
    assert not (tmp_path / "summary.json").exists()
    resumed = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=300, env=os.environ
    )
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming after step 2" in resumed.stdout
    policy = Path("policy", "model.safetensors")
    assert (tmp_path / policy).read_bytes() == (whole / policy).read_bytes()
    assert [_without_clocks(r) for r in _rows(tmp_path)] == [
        _without_clocks(r) for r in _rows(whole)
    ]
    summaries = [json.loads((d / "summary.json").read_text()) for d in (tmp_path, whole)]
    assert len({json.dumps(s | {"seconds": 0}) for s in summaries}) == 1


def _rows_of_questions(n: int) -> list[QARow]:
    return [QARow(f"q{i}", f"question {i}", (f"a{i}",), "test") for i in range(n)]


def test_a_steps_episodes_are_groups_and_no_two_of_a_run_have_one_number():
    steps = [rl.episodes_of(_rows_of_questions(2), 4, step) for step in range(12)]
    numbers = [e.number for episodes in steps for e in episodes]
    assert numbers == list(range(12 * 8))  # no two episodes of a run draw alike
    for episodes in steps:  # a group is one question with its own gold answer
        assert [e.question for e in episodes] == [q for q in [e.question for e in episodes[::4]]
                                                  for _ in range(4)]  # fmt: skip
        assert all(e.golden_answers == (f"a{e.question.split()[1]}",) for e in episodes)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (dict(rollout=dict(temperature=0.0)), "config.rollout.temperature"),
        (dict(learner=dict(row_tokens=100)), "config.learner.row_tokens=100"),
        (dict(learner=dict(microbatches=1)), "at least the 8 episodes"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(rl_config, change, told):
    config = config_check.load(str(rl_config))
    config.update(change)
    with pytest.raises(UserError, match=told):
        rl.check(config)


def test_more_questions_a_step_than_there_are_is_refused(rl_config, tmp_path):
    config = config_check.load(str(rl_config))
    config.update(dict(rollout=dict(questions_per_step=13), learner=dict(rows=13)))
    with pytest.raises(UserError, match="config.rollout.questions_per_step=13 is more than the 12"):
        rl.run(config, str(tmp_path))
    assert not (tmp_path / "metrics.jsonl").exists()
