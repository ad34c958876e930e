"""The rl job end to end on a tiny model: its files, compilations and resuming."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from zerosearch_jax import config_flags
from zerosearch_jax.data.qa import QARow
from zerosearch_jax.errors import Terminated, UserError
from zerosearch_jax.jobs import rl
from zerosearch_jax.models.directory import read_model_files
from zerosearch_jax.parallel.mesh import make_mesh
from zerosearch_jax.parallel.stop_request import StopRequest
from zerosearch_jax.rollout.trajectory import Episode, Trajectory, Turn
from zerosearch_jax.search.engine import SearchRequest, SearchResult
from zerosearch_jax.telemetry.collapse import CollapseWatch
from zerosearch_jax.telemetry.metrics import CRITIC_METRICS, METRICS, SFT_METRICS
from zerosearch_jax.telemetry.progress import Progress
from zerosearch_jax.telemetry.step_timer import StepTimer
from zerosearch_jax.text.actions import Action
from zerosearch_jax.training import factory, run_monitor
from zerosearch_jax.training.config import RLConfig
from zerosearch_jax.training.no_signal import Notices
from zerosearch_jax.training.row_sampler import RowSampler
from zerosearch_jax.training.step_rollouts import StepRollouts, episodes_of
from zerosearch_jax.training.validate import check

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("compiled_once")
CLOCKS = ("seconds/", "tokens_per_sec", "host_share")


def _rows(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def _without_clocks(row: dict) -> dict:
    return {name: value for name, value in row.items() if not name.startswith(CLOCKS)}


@pytest.fixture(scope="module")
def finished(rl_config, tmp_path_factory, compiled_once):
    """A whole run: its workdir, and the number of compilations at the end of each step."""
    workdir = tmp_path_factory.mktemp("whole")
    return workdir, run_and_count(config_flags.load(str(rl_config)), workdir)


def run_and_count(config, workdir) -> list[int]:
    """Runs the job; returns the number of compilations at the end of each step."""
    compiled, counts = [], []

    def listen(event: str, secs: float, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    class Counting(Progress):
        def update(self, done, metrics):
            counts.append(len(compiled))
            super().update(done, metrics)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rl, "Progress", Counting)
        jax.monitoring.register_event_duration_secs_listener(listen)
        try:
            rl.run(config, str(workdir))
        finally:
            jax.monitoring.unregister_event_duration_listener(listen)
    return counts


@pytest.mark.parametrize(
    ("key", "split", "row"),
    [("source", "train", 2), ("eval_source", "eval", 3), ("eval_source", "test", 9)],
)
def test_a_long_question_of_any_split_is_found_before_compiling(
    rl_config, questions, tmp_path, key, split, row, capsys
):
    path = tmp_path / "long.jsonl"
    lines = questions.read_text().splitlines()
    lines[row - 1] = json.dumps({"question": "word " * 600, "golden_answers": ["Chad"]})
    path.write_text("\n".join(lines))
    config = config_flags.load(str(rl_config))
    config.data[key] = str(path)
    config.eval.test_questions = 12
    with pytest.raises(UserError, match=rf"long\.jsonl: row {row}: the policy's prompt .* 372 fit"):
        rl.load_questions(config_flags.typed(RLConfig, config))
    config.data.overlong = "drop"
    sampler, *evaluation = rl.load_questions(config_flags.typed(RLConfig, config))
    loaded = dict(zip(("train", "eval", "test"), (sampler.rows, *evaluation), strict=True))
    whole = {"train": 12, "eval": 4, "test": 12}[split]
    assert len(loaded[split]) == whole - 1
    assert f"1 of {whole} questions" in capsys.readouterr().out


def test_summary_holds_the_documented_keys(finished):
    workdir, _ = finished
    summary = json.loads((workdir / "summary.json").read_text())
    assert summary.keys() == {
        "base", "trained", "no_search", "steps", "training_seconds", "engine", "split",
    }  # fmt: skip
    for name in ("base", "trained", "no_search"):
        assert {"em", "f1"} <= summary[name].keys()
        assert 0.0 <= summary[name]["em"] <= summary[name]["f1"] <= 1.0
    assert summary["base"]["em"] > 0  # the Markov policy often guesses Chad, which is often right
    assert summary["no_search"]["searches_per_episode"] == 0
    assert (summary["steps"], summary["engine"], summary["split"]) == (3, "bm25", "test")


def test_every_step_writes_every_metric_of_the_glossary(finished):
    rows = _rows(finished[0])
    assert [row["step"] for row in rows] == [1, 2, 3]
    with_options = {"loss/llds", "importance_capped"}
    wanted = METRICS.keys() - SFT_METRICS.keys() - CRITIC_METRICS.keys() - with_options | {"step"}
    for row in rows:
        assert row.keys() | {"correct_loglik", "seconds/checkpoint"} == wanted
        assert ("correct_loglik" in row) == (row["em"] > 0)
        assert ("seconds/checkpoint" in row) == (row["step"] > 1)  # of the step before
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
    """Steps differ in context lengths, active rows and searches, but not in programs."""
    config = config_flags.load(str(rl_config))
    config.rl.steps = 20
    config.eval.every = 5
    config.policy.generator.decode_rows = (2, 4)
    config.policy.generator.window_tokens = 128
    counts = run_and_count(config, tmp_path)
    assert len(counts) == 20 and counts[0] > 0
    assert counts[-1] == counts[0]


def test_the_trained_policy_is_exported_and_differs_from_the_base(finished, markov_model):
    trained = (finished[0] / "policy" / "model.safetensors").read_bytes()
    base = (markov_model / "model.safetensors").read_bytes()
    assert len(trained) == len(base) and trained != base
    # Tokenizer, sizes, end-of-text ids and sampling settings are those of the base.
    exported, start = (read_model_files(d) for d in (finished[0] / "policy", markov_model))
    assert exported.tokenizer.get_vocab() == start.tokenizer.get_vocab()
    assert (exported.config, exported.generation) == (start.config, start.generation)
    assert exported.generation["top_p"] == 0.9


def _files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_kept_checkpoints_are_exported(finished, rl_config, capsys):
    workdir, _ = finished
    config = config_flags.load(str(rl_config))
    ems = [row["eval/em"] for row in _rows(workdir)]
    best = ems.index(max(ems)) + 1
    kept = {str(best), "2", "3"}
    assert {path.name for path in (workdir / "checkpoints").iterdir()} == kept
    for which, step in (("latest", 3), ("best", best), ("2", 2)):
        rl.export_checkpoint(config, str(workdir), which)
        assert f"{workdir}/exports/{step}/policy" in capsys.readouterr().out
    assert _files(workdir / "exports" / "3" / "policy") == _files(workdir / "policy")
    weights = {(workdir / "exports" / s / "policy/model.safetensors").read_bytes() for s in kept}
    assert len(weights) == len(kept)
    with pytest.raises(UserError, match="no checkpoint of step 7.*steps .*2, 3"):
        rl.export_checkpoint(config, str(workdir), "7")
    with pytest.raises(UserError, match="no directory .*without --export"):
        rl.export_checkpoint(config, str(workdir / "none"), "latest")
    assert not (workdir / "none").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 143)]
)
def test_resume_after_a_signal_is_bit_identical(finished, rl_config, tmp_path, number, status):
    whole = finished[0]
    command = [sys.executable, "-m", "zerosearch_jax.main", f"--config={rl_config}"]
    command += [f"--workdir={tmp_path}"]
    with (tmp_path / "log").open("w") as log:
        run = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
        deadline = time.monotonic() + 300
        while not (tmp_path / "checkpoints" / "2").is_dir() and run.poll() is None:
            assert time.monotonic() < deadline, "no second step in five minutes"
            time.sleep(0.01)
        run.send_signal(number)
        assert run.wait() == status, (tmp_path / "log").read_text()
    assert not (tmp_path / "summary.json").exists()
    if number == signal.SIGKILL:  # and damage of the newest checkpoint
        os.truncate(tmp_path / "checkpoints" / "2" / "metadata" / "metadata", 9)
    resumed = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=300, env=os.environ
    )
    assert resumed.returncode == 0, resumed.stderr
    assert f"resuming after step {1 if number == signal.SIGKILL else 2}" in resumed.stdout
    assert ("checkpoints/2 is damaged" in resumed.stdout) == (number == signal.SIGKILL)
    assert "another config" not in resumed.stdout
    policy = Path("policy", "model.safetensors")
    assert (tmp_path / policy).read_bytes() == (whole / policy).read_bytes()
    assert [_without_clocks(r) for r in _rows(tmp_path)] == [
        _without_clocks(r) for r in _rows(whole)
    ]
    summaries = [json.loads((d / "summary.json").read_text()) for d in (tmp_path, whole)]
    assert len({json.dumps(s | {"training_seconds": 0}) for s in summaries}) == 1


def _conclude(rl_config, workdir, monkeypatch, steps: int, failure: str = "") -> dict | None:
    """Runs `conclude` with given episodes; returns the summary."""
    episode = Trajectory(Episode(0, "Who?", ("Ada",)), finish="answer")
    request = SearchRequest(0, 0, "Ada", "Who?", ("Ada",))
    episode.searches.append((request, SearchResult(request.key, (), failure)))
    monkeypatch.setattr(rl, "evaluate", lambda *_, **__: [episode])
    monkeypatch.setattr(rl, "export", lambda *_: None)
    generator = SimpleNamespace(load=lambda params: None)
    policy = SimpleNamespace(tokenizer=None, params=None, generation={})
    parts = rl.Parts(policy, generator, None, None, None, None, Notices())
    config = config_flags.typed(RLConfig, config_flags.load(str(rl_config)))  # rl.steps=3
    rl.conclude(config, workdir, parts, None, [QARow("q", "Who?", ("Ada",), "test")], steps)
    return json.loads((workdir / "summary.json").read_text())


def test_the_summary_has_the_steps_and_seconds_of_all_calls(
    rl_config, tmp_path, monkeypatch, capsys
):
    rows = [{"step": step, "seconds/step": 2.0} for step in range(1, 9)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = _conclude(rl_config, tmp_path, monkeypatch, steps=8)
    assert (summary["steps"], summary["training_seconds"]) == (8, 16.0)
    assert "has 8 training steps; config.rl.steps=3" in capsys.readouterr().out


def test_an_evaluation_with_failed_searches_writes_no_summary(rl_config, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="base policy: 1 of 1 searches failed.*HTTP 401"):
        _conclude(rl_config, tmp_path, monkeypatch, steps=3, failure="HTTP 401")
    assert not (tmp_path / "summary.json").exists()


@pytest.mark.parametrize(
    ("result", "scored"),
    [
        (SearchResult((0, 0), ("a",)), True),
        (SearchResult((0, 0), (), "HTTP 401"), False),
        (SearchResult((0, 0), (), "too long", "too_long"), True),
    ],
)
def test_an_evaluation_with_failed_searches_has_no_scores(rl_config, monkeypatch, result, scored):
    """A server that is down must neither end a run on a plateau nor choose the best checkpoint."""
    config = config_flags.typed(RLConfig, config_flags.load(str(rl_config)))
    episode = Trajectory(Episode(0, "Who?", ("Ada",)), finish="answer")
    episode.searches.append((SearchRequest(0, 0, "Ada", "Who?", ("Ada",)), result))
    monkeypatch.setattr(rl, "run_method", lambda *_, **__: [episode])
    generator = SimpleNamespace(load=lambda params: None)
    learner = SimpleNamespace(policy=lambda state: None)
    policy = SimpleNamespace(tokenizer=None)
    parts = rl.Parts(policy, generator, learner, None, None, None, Notices())
    metrics = rl.eval_metrics(config, parts, None, [], StepTimer())
    assert [f"eval/{name}" in metrics for name in ("em", "f1", "cover_em")] == [scored] * 3
    assert metrics["eval/failed_search_ratio"] == bool(result.failure)


def test_steps_and_evaluations_without_an_answer_say_so_once(rl_config, monkeypatch, capsys):
    config = config_flags.typed(RLConfig, config_flags.load(str(rl_config)))
    silent = Trajectory(Episode(0, "Who?", ("Ada",)), finish="turns")
    silent.turns.append(Turn("hm", Action("invalid", "")))
    rollouts = SimpleNamespace(
        trajectories=[silent] * 4, selected=lambda: ([silent] * 4, np.zeros((1, 4)))
    )
    monkeypatch.setattr(rl, "run_step", lambda *_, **__: rollouts)
    monkeypatch.setattr(rl, "run_method", lambda *_, **__: [silent])
    policy = SimpleNamespace(tokenizer=None)
    generator = SimpleNamespace(load=lambda params: None)
    learner = SimpleNamespace(policy=lambda state: None)
    for _ in range(2):  # two runs
        parts = rl.Parts(policy, generator, learner, None, None, None, Notices())
        for step in range(3):
            collected = rl.collect(config, step, None, parts, None, StepTimer(), StopRequest())
            assert collected is rollouts
        (note,) = re.findall("note: (.*)", capsys.readouterr().out)
        assert note.startswith("step 1 teaches nothing: no episode has an answer; 100% of the turn")
    rl.evaluate(config, rl.Parts(policy, None, None, None, None, None, Notices()), [])
    assert "note: evaluation: no episode has an answer" in capsys.readouterr().out


@pytest.mark.parametrize("section", ["search", "eval.search"])
def test_a_dead_server_is_refused_before_a_model_is_loaded(rl_config, monkeypatch, section):
    config = config_flags.load(str(rl_config))
    config.search.engine = "bm25"
    part = config.search if section == "search" else config.eval.search
    part.engine, part.remote.url = "retriever", "http://127.0.0.1:9"
    monkeypatch.setattr(factory, "load_model", None)
    with pytest.raises(UserError, match=f"config.{section}: .*retriever .*http://127.0.0.1:9"):
        rl.build(config_flags.typed(RLConfig, config))


def test_another_base_model_is_refused_and_other_inputs_are_warned_about(
    finished, rl_config, markov_model, tmp_path
):
    workdir, other = finished[0], tmp_path / "other"
    shutil.copytree(markov_model, other)
    (other / "tokenizer.json").write_text((other / "tokenizer.json").read_text() + " ")
    config = config_flags.load(str(rl_config))
    files = {path: path.read_bytes() for path in workdir.glob("*.json*")}
    config.policy.model = str(other)
    for job in (rl.run, partial(rl.export_checkpoint, which="latest")):
        with pytest.raises(UserError, match=f"{markov_model} .*{other}.*another --workdir"):
            job(config, str(workdir))
    assert files == {path: path.read_bytes() for path in workdir.glob("*.json*")}
    kept = json.loads((workdir / "config.json").read_text())["contents"]
    assert all(kept[name] for name in ("policy.model", "search", "training questions"))


def _rows_of_questions(n: int) -> list[QARow]:
    return [QARow(f"q{i}", f"question {i}", (f"a{i}",), "test") for i in range(n)]


def test_episodes_are_groups_of_one_question_with_unique_numbers():
    steps = [episodes_of(_rows_of_questions(2), 4, step) for step in range(12)]
    numbers = [e.number for episodes in steps for e in episodes]
    assert numbers == list(range(12 * 8))  # so no two episodes share their draws
    for episodes in steps:  # a group is one question with its own gold answer
        assert [e.question for e in episodes] == [q for q in [e.question for e in episodes[::4]]
                                                  for _ in range(4)]  # fmt: skip
        assert all(e.golden_answers == (f"a{e.question.split()[1]}",) for e in episodes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(rollout=dict(temperature=0.0)), "rollout.temperature=0.0"),
        (dict(learner=dict(row_tokens=100)), "config.learner.row_tokens=100"),
        (dict(rl=dict(overlong="cut")), "rl.overlong='cut' must be one of keep, mask"),
        (dict(advantage=dict(estimator="rloo"), rollout=dict(group_size=1)), "rollout.group_size"),
        (dict(advantage=dict(estimator="reinforce"), rollout=dict(group_size=1)), "batch_mean"),
        (dict(rollout=dict(max_rounds=2, group_size=1)), "rollout.max_rounds"),
        (
            dict(
                loss=dict(surrogate="sequence", aggregate="sequence_mean"),
                advantage=dict(estimator="reinforce_pp"),
            ),
            "loss.surrogate=sequence .* advantage.estimator=reinforce_pp",
        ),
        *(
            (
                dict(loss=dict(surrogate="sequence", aggregate="sequence_mean"), **bfloat16),
                "loss.surrogate=sequence .* rl.old_logprobs=learner",
            )
            for bfloat16 in (
                dict(policy=dict(generator=dict(dtype="bfloat16"))),
                dict(policy=dict(generator=dict(int8_weights=True))),
                dict(learner=dict(compute_dtype="bfloat16")),
            )
        ),
        (dict(kl=dict(target=0.1, apply_to="reward", horizon=1)), "kl.horizon=1"),
        (dict(loss=dict(importance_cap=2.0)), "rl.old_logprobs=learner"),
        (dict(loss=dict(llds=0.1)), "loss.llds .* rl.minibatch_episodes .* rl.epochs"),
        (dict(rl=dict(minibatch_episodes=9)), "rl.minibatch_episodes=9 .* 8 episodes"),
        (dict(rl=dict(epochs=0)), "rl.epochs=0"),
        (dict(advantage=dict(estimator="ppo"), lora=dict(rank=4)), "critic.trunk=shared"),
        (dict(rl=dict(refresh_reference=1), lora=dict(rank=4)), "rl.refresh_reference=1 .* lora"),
        (dict(rl=dict(refresh_reference=1), kl=dict(coef=0.0)), "requires kl.coef above 0"),
        (dict(watch=dict(action="restart")), "watch.action='restart' must be one of log, stop"),
        (dict(rollout=dict(max_turns=-1)), "rollout.max_turns=-1 must be at least 0"),
        (dict(search=dict(engine="none")), "search.engine=none .* rollout.max_turns=0"),
        (dict(eval=dict(search=dict(engine="none"))), "eval.search.engine=none"),
        (dict(reward=dict(rule="rouge")), "reward.rule='rouge' must be one of answer, research"),
        (dict(reward=dict(rule="research", name="em")), "reward.name and reward.format_weight"),
        (dict(reward=dict(rule="research", format_weight=0.1)), "reward.format_weight"),
        (dict(reward=dict(stage_one_steps=1)), "reward.stage_one_steps"),
        (
            dict(reward=dict(rule="r1_searcher", stage_one_steps=4)),
            "reward.stage_one_steps=4 .* rl.steps=3",
        ),
    ],
)
def test_contradicting_settings_are_refused(rl_config, change, message):
    config = config_flags.load(str(rl_config))
    config.update(change)
    with pytest.raises(UserError, match=message):
        check(config_flags.typed(RLConfig, config))


def test_more_questions_per_step_than_rows_are_refused(rl_config, tmp_path):
    config = config_flags.load(str(rl_config))
    config.update(dict(rollout=dict(questions_per_step=13), learner=dict(rows=13)))
    with pytest.raises(UserError, match="config.rollout.questions_per_step=13 is more than the 12"):
        rl.run(config, str(tmp_path / "new"))
    assert not (tmp_path / "new").exists()


# Name → changes to `rl_config`, whose steps have 2 × 4 episodes.
SINGLE = dict(questions_per_step=8, group_size=1)
KL_IN_REWARD = dict(apply_to="reward", estimator="k1")
LORA = dict(rank=2, alpha=8.0, targets=("q", "o", "down"))
PPO = dict(rollout=SINGLE, advantage=dict(estimator="ppo"), kl=dict(**KL_IN_REWARD))
ALGORITHMS = {
    "ppo": PPO,
    "ppo_shared": PPO | dict(critic=dict(trunk="shared")),
    "reinforce_pp": dict(
        rollout=SINGLE, advantage=dict(estimator="reinforce_pp"), kl=dict(**KL_IN_REWARD)
    ),
    "dapo": dict(
        rollout=dict(max_rounds=2),
        loss=dict(clip_high=0.28),
        rl=dict(minibatch_episodes=4, overlong="mask"),
        kl=dict(coef=0.0),
    ),
    "gspo": dict(
        loss=dict(surrogate="sequence", aggregate="sequence_mean", clip_low=3e-4, clip_high=4e-4),
        rl=dict(minibatch_episodes=4),
    ),
    "lora": dict(lora=LORA),
    "moving_reference": dict(rl=dict(refresh_reference=1)),
    # Adaptive KL, combined with most other options.
    "everything": dict(
        lora=LORA,
        critic=dict(trunk="shared"),
        rollout=dict(max_rounds=2),
        advantage=dict(estimator="ppo"),
        loss=dict(surrogate="cispo", importance_cap=2.0, llds=0.1),
        kl=dict(target=0.01, horizon=16, **KL_IN_REWARD),
        rl=dict(old_logprobs="learner", minibatch_episodes=6, epochs=2),
    ),
}


def _cases(*names: str):
    """Marks all cases but "everything" as slow."""
    slow = pytest.mark.slow
    return [name if name == "everything" else pytest.param(name, marks=slow) for name in names]


def _two_steps(rl_config, name: str):
    config = config_flags.load(str(rl_config))
    config.update(ALGORITHMS[name])
    config.rl.steps = 2
    return config


@pytest.fixture(scope="module")
def run_of(rl_config, tmp_path_factory, compiled_once):
    """Returns a function that runs a case for two steps, once: its workdir and compilations."""
    runs = {}

    def run(name: str):
        if name not in runs:
            workdir = tmp_path_factory.mktemp(name)
            runs[name] = workdir, run_and_count(_two_steps(rl_config, name), workdir)
        return runs[name]

    return run


@pytest.mark.parametrize("name", _cases(*ALGORITHMS))
def test_every_algorithm_writes_its_metrics_and_compiles_only_in_the_first_step(run_of, name):
    workdir, counts = run_of(name)
    assert len(counts) == 2 and counts[1] == counts[0] > 0
    # If an episode is correct; written in the step after a checkpoint.
    at_times = {"correct_loglik", "seconds/checkpoint"}
    others = SFT_METRICS.keys() | at_times
    if name not in ("ppo", "ppo_shared", "everything"):
        others |= CRITIC_METRICS.keys()
    if name != "everything":
        others |= {"loss/llds", "importance_capped"}
    if name == "dapo":
        others |= {"kl"}
    wanted = METRICS.keys() - others | {"step"}
    rows = _rows(workdir)
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        assert row.keys() - at_times == wanted
        assert all(np.isfinite(value) for value in row.values())
        assert row["skipped_updates"] == 0 and row["grad_norm"] > 0
        assert row["sampler_logprob_diff_max"] < 1e-3  # before the step's first update
    assert (workdir / "policy" / "model.safetensors").is_file()


@pytest.mark.parametrize("name", _cases("ppo", "ppo_shared"))
def test_a_critic_starts_at_zero_and_learns(run_of, name):
    rows = _rows(run_of(name)[0])
    assert rows[0]["critic/value"] == 0.0 and rows[0]["loss/value"] > 0
    assert rows[1]["critic/value"] != 0.0
    rates = [row["critic/learning_rate"] for row in rows]
    assert rates == [pytest.approx(2.5e-4), pytest.approx(5e-4)]  # a warm-up of 2 steps
    assert all(row["critic/grad_norm"] > 0 for row in rows)
    assert all(row["clip_fraction"] == 0.0 for row in rows)  # one update: every ratio is 1


@pytest.mark.slow
def test_a_reference_that_moves_every_step_is_resumed_bit_identically(
    run_of, rl_config, tmp_path, monkeypatch, capsys
):
    whole, _ = run_of("moving_reference")
    assert all(row["kl"] < 1e-6 for row in _rows(whole))  # it is the policy before the update
    config = _two_steps(rl_config, "moving_reference")
    _check_resumed(whole, config, tmp_path, monkeypatch, capsys)


@pytest.mark.slow
def test_later_updates_of_a_step_move_the_ratio(run_of):
    assert any(row["clip_fraction"] > 0 for row in _rows(run_of("gspo")[0]))


def test_schedules_count_steps_and_not_updates(run_of):
    rows = _rows(run_of("everything")[0])
    # The warm-up of 2 steps has 8 updates; a row has the mean of its 4 updates.
    rates = [5e-4 * (1 + 2 + 3 + 4) / 4 / 8, 5e-4 * (5 + 6 + 7 + 8) / 4 / 8]
    assert [row["critic/learning_rate"] for row in rows] == [pytest.approx(r) for r in rates]
    assert all(row["loss/llds"] > 0 for row in rows)  # later updates have moved


@pytest.mark.parametrize("name", _cases("dapo", "everything"))
def test_dynamic_sampling_adds_rounds_and_counts_all_episodes(run_of, name):
    rows = _rows(run_of(name)[0])
    assert {row["sampling_rounds"] for row in rows} == {2.0}
    for row in rows:  # two groups per round
        assert 4 * row["zero_variance_groups"] in (0, 1, 2, 3, 4)
        assert row["reward"] * 16 == pytest.approx(round(row["reward"] * 16))


@pytest.mark.parametrize("case", _cases("lora", "everything"))
def test_lora_exports_adapters_and_the_merged_policy(run_of, rl_config, markov_model, case):
    workdir, _ = run_of(case)
    settings = json.loads((workdir / "adapters" / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"]) == (2, 8.0)
    assert settings["base_model_name_or_path"] == str(markov_model)
    assert set(settings["target_modules"]) == {"q_proj", "o_proj", "down_proj"}
    adapters = load_file(workdir / "adapters" / "adapter_model.safetensors")
    assert len(adapters) == 2 * 2 * 3  # A and B, two layers, three targets
    base = load_file(markov_model / "model.safetensors")
    policy = load_file(workdir / "policy" / "model.safetensors")
    adapted = set()
    for name in adapters:
        if name.endswith(".lora_A.weight"):
            weight = name.removeprefix("base_model.model.").replace(".lora_A", "")
            adapted.add(weight)
            b = adapters[name.replace("lora_A", "lora_B")].astype(np.float64)
            change = 8.0 / 2 * b @ adapters[name]
            assert np.abs(change).max() > 0
            np.testing.assert_allclose(policy[weight], base[weight] + change, atol=1e-6)
    assert policy.keys() == base.keys()
    for name in base.keys() - adapted:
        np.testing.assert_array_equal(policy[name], base[name])
    mesh = make_mesh(1, 1, 1)
    models = [
        factory.load_model(str(d), mesh, "float32") for d in (workdir / "policy", markov_model)
    ]
    assert models[0].config == models[1].config
    rl.export_checkpoint(_two_steps(rl_config, case), str(workdir), "latest")
    for folder in ("policy", "adapters"):
        assert _files(workdir / "exports" / "2" / folder) == _files(workdir / folder)


def test_the_kl_coefficient_adapts_to_the_kl_of_the_step_before(run_of):
    first, second = _rows(run_of("everything")[0])
    assert first["kl_coef"] == 0.001
    # With 8 episodes per step and a horizon of 16, an error of at most 20% counts half.
    error = min(max(first["kl"] / 0.01 - 1, -0.2), 0.2)
    assert second["kl_coef"] == pytest.approx(0.001 * (1 + 0.5 * error))
    assert second["kl_coef"] != first["kl_coef"]


def test_a_run_after_sigterm_keeps_its_kl_coefficient_and_its_place_in_the_data(
    run_of, rl_config, tmp_path, monkeypatch
):
    whole, _ = run_of("everything")
    config = _two_steps(rl_config, "everything")
    config.checkpoint_every = 9
    collect = rl.collect

    def terminated_in_second_step(config, step, *rest):
        if step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return collect(config, step, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(rl, "collect", terminated_in_second_step)
        patch.setattr(rl.Checkpoints, "improves", lambda *_: False)
        with pytest.raises(Terminated):
            rl.run(config, str(tmp_path))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["1"]
    assert len(_rows(tmp_path)) == 1
    rl.run(config, str(tmp_path))
    assert [_without_clocks(r) for r in _rows(tmp_path)] == [
        _without_clocks(r) for r in _rows(whole)
    ]
    policy = Path("policy", "model.safetensors")
    assert (tmp_path / policy).read_bytes() == (whole / policy).read_bytes()


def _run_until(step: int, config, workdir: Path, monkeypatch) -> None:
    """Interrupts a run after it has written the row of `step`, before it saves the checkpoint."""

    class Interrupted(Progress):
        def update(self, done, metrics):
            super().update(done, metrics)
            if done == step:
                raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(rl, "Progress", Interrupted)
        with pytest.raises(KeyboardInterrupt):
            rl.run(config, str(workdir))
    assert len(_rows(workdir)) == step


def _check_resumed(whole: Path, config, workdir: Path, monkeypatch, capsys) -> None:
    """Checks that a run of two steps, interrupted in the second, equals the run in `whole`."""
    _run_until(2, config, workdir, monkeypatch)
    rl.run(config, str(workdir))
    assert "resuming after step 1" in capsys.readouterr().out
    assert [_without_clocks(r) for r in _rows(workdir)] == [
        _without_clocks(r) for r in _rows(whole)
    ]
    policy = Path("policy", "model.safetensors")
    assert (workdir / policy).read_bytes() == (whole / policy).read_bytes()


def test_a_rollback_restores_the_best_checkpoint_and_resumes_bit_identically(
    rl_config, tmp_path, monkeypatch, capsys
):
    """Every watch alarms at its second step, so the run rolls back at step 2 and stops at 4."""
    config = config_flags.load(str(rl_config))
    config.update(dict(watch=dict(action="rollback", max_rollbacks=1), rl=dict(steps=5)))

    class Alarming(CollapseWatch):
        seen = 0

        def update(self, metrics):
            self.seen += 1
            return super().update(metrics)

        def alarm(self):
            return "WARNING: alarm" if self.seen == 2 else None

    monkeypatch.setattr(run_monitor, "CollapseWatch", Alarming)
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    with pytest.raises(UserError, match="stopped after step 4.*after 1 rollback.*action=log"):
        rl.run(config, str(whole))
    printed = capsys.readouterr().out
    assert "step 2: WARNING: alarm" in printed and not (whole / "summary.json").exists()
    best = int(re.search(r"rolled back to the checkpoint of step (\d)", printed)[1])
    rows = _rows(whole)
    assert [row["rollbacks"] for row in rows] == [0, 1, 1, 1]
    scores = [0.0, rows[0]["eval/em"]]  # of the start and of step 1
    assert best == scores.index(max(scores))
    assert rows[2]["learning_rate"] == 0.5 * rows[best]["learning_rate"]

    _run_until(3, config, resumed, monkeypatch)
    config.watch.action = "log"  # the second alarm no longer stops the run
    rl.run(config, str(resumed))
    assert [_without_clocks(r) for r in _rows(resumed)[:4]] == [_without_clocks(r) for r in rows]
    assert [row["step"] for row in _rows(resumed)] == [1, 2, 3, 4, 5]
    assert (resumed / "summary.json").exists()


def _answered(number: int, answer: str) -> Trajectory:
    trajectory = Trajectory(Episode(number, f"question {number // 2}", ("Chad",)))
    trajectory.turns.append(Turn(f"<answer>{answer}</answer>", Action("answer", answer)))
    return trajectory


def _round(first: int, *groups: tuple[int, int]) -> list[Trajectory]:
    """Returns episodes with the rewards of `groups`, numbered from `first`."""
    rewards = [reward for group in groups for reward in group]
    return [_answered(first + i, "Chad" if right else "Peru") for i, right in enumerate(rewards)]


@pytest.fixture
def sampling_config():
    """Two questions per step, two episodes each, at most three rounds."""
    config = config_flags.load(str(ROOT / "configs" / "grpo.py"))
    config.rollout.update(dict(questions_per_step=2, group_size=2, max_rounds=3))
    return config


def _rollouts(config, step: int) -> StepRollouts:
    return StepRollouts(config_flags.typed(RLConfig, config), step)


def _run_rounds(config, *rounds) -> tuple[StepRollouts, int]:
    """Adds rounds until the step is complete; returns the number of rounds, too."""
    rollouts, count = _rollouts(config, 0), 0
    sampler = RowSampler(_rows_of_questions(12), 2, 0, "size")
    while not rollouts.complete:
        rollouts.next_round(sampler)
        rollouts.add(_round(4 * count, *rounds[count]))
        count += 1
    return rollouts, count


@pytest.mark.parametrize(
    ("rounds", "taken", "groups"),
    [
        ([((1, 0), (0, 1))], 1, (0, 1)),  # the first round is enough
        ([((1, 1), (0, 1)), ((1, 0), (0, 0))], 2, (1, 2)),  # one of each
        ([((0, 0), (1, 0)), ((1, 0), (0, 1))], 2, (1, 2)),  # of three the first two
        ([((1, 1), (0, 0)), ((1, 1), (1, 1)), ((0, 1), (1, 1))], 3, (0, 4)),  # filled up
        ([((1, 1), (0, 0))] * 3, 3, (0, 1)),  # none differs
    ],
)
def test_groups_that_differ_are_selected_first(sampling_config, rounds, taken, groups):
    rollouts, count = _run_rounds(sampling_config, *rounds)
    assert count == taken
    trajectories, rewards = rollouts.selected()
    every = [group for one in rounds[:taken] for group in one]
    np.testing.assert_array_equal(rewards, [every[group] for group in groups])
    assert rewards.dtype == np.float32 and rewards.shape == (2, 2)
    numbers = [2 * group + member for group in groups for member in range(2)]
    assert [t.episode.number for t in trajectories] == numbers
    metrics = rollouts.metrics()  # of all episodes
    assert metrics["reward"] == pytest.approx(np.mean(every))
    assert metrics["zero_variance_groups"] == pytest.approx(np.mean([a == b for a, b in every]))
    assert (metrics["sampling_rounds"], metrics["noisy_ratio"]) == (taken, 0.0)
    assert len(rollouts.trajectories) == 4 * taken


def test_without_dynamic_sampling_there_is_one_round(sampling_config):
    sampling_config.rollout.max_rounds = 1
    rollouts, count = _run_rounds(sampling_config, ((1, 1), (0, 0)))
    trajectories, rewards = rollouts.selected()
    assert count == 1 and [t.episode.number for t in trajectories] == [0, 1, 2, 3]
    np.testing.assert_array_equal(rewards, [[1, 1], [0, 0]])


def test_rewards_follow_the_stage_of_the_step(sampling_config):
    sampling_config.rollout.max_rounds = 1
    sampling_config.reward.update(dict(rule="r1_searcher", stage_one_steps=2))
    for step, expected in ((1, [[0.5, 0], [0, 0]]), (2, [[-1, -2], [-1, -1]])):
        rollouts = _rollouts(sampling_config, step)
        rollouts.next_round(RowSampler(_rows_of_questions(12), 2, 0, "size"))
        trajectories = _round(0, (1, 0), (1, 1))  # they do not think, so the format is invalid
        trajectories[0].searches.append((None, None))
        rollouts.add(trajectories)
        np.testing.assert_array_equal(rollouts.selected()[1], expected)


def test_a_run_without_search_builds_no_engine(rl_config, tmp_path, monkeypatch):
    config = config_flags.load(str(rl_config))
    config.update(
        dict(
            rollout=dict(max_turns=0),
            search=dict(engine="none"),
            rl=dict(steps=1),
            eval=dict(search=dict(engine="none")),
        )
    )
    with config.unlocked():
        del config.search["simulator"]  # a section that the engine does not read may be absent

    def fail(*_, **__):
        raise AssertionError("an engine was built")

    monkeypatch.setattr(factory, "make_engine", fail)
    rl.run(config, str(tmp_path))
    (row,) = _rows(tmp_path)
    assert row["searches_per_episode"] == row["eval/searches_per_episode"] == 0
    assert 0 < row["finish_ratio"] < 1  # some ended with a search
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["engine"] == "none"
    assert all(
        summary[name]["searches_per_episode"] == 0 for name in ("base", "trained", "no_search")
    )


def test_every_round_of_every_step_draws_other_rows(sampling_config):
    sampler = RowSampler(_rows_of_questions(24), 2, 0, "size")
    questions, numbers = [], []
    for step in range(4):  # 4 steps of 3 rounds of 2 questions are an epoch
        rollouts = _rollouts(sampling_config, step)
        for _ in range(3):
            episodes = rollouts.next_round(sampler)
            questions += [episode.question for episode in episodes[::2]]
            numbers += [episode.number for episode in episodes]
            assert [e.question for e in episodes[::2]] == [e.question for e in episodes[1::2]]
            assert not rollouts.complete or len(numbers) % 12 == 0
            rollouts.add(_round(episodes[0].number, (1, 1), (0, 0)))
        assert rollouts.complete
    assert sorted(questions) == sorted(f"question {i}" for i in range(24))
    assert numbers == list(range(48))


def test_a_simulator_without_its_report_is_refused_before_anything_is_built():
    config = config_flags.load(str(ROOT / "configs" / "grpo.py"))
    config.search.simulator.gate.report = "no/report.json"
    config.search.engine = "bm25"
    rl.check_simulator(config_flags.typed(RLConfig, config))  # the simulator is not used
    config.search.engine = "simulated"
    with pytest.raises(UserError, match="no/report.json"):
        rl.check_simulator(config_flags.typed(RLConfig, config))


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("metrics.jsonl", b'{"step": 1, "seconds/step": 1.0}\n[1]\n', "row 2: expected an object"),
        ("metrics.jsonl", b'{"step": "1", "seconds/step": 1.0}\n', "step: expected a number"),
        ("metrics.jsonl", b'{"step": 1}\n', "seconds/step is missing"),
        ("metrics.jsonl", b"\0" * 512 + b"\n", "not JSON"),
        ("config.json", b"[" * 100_000, "nested too deeply"),
        ("config.json", b"[]", "expected an object"),
    ],
)
def test_a_damaged_file_is_refused_before_anything_is_built(
    rl_config, tmp_path, monkeypatch, name, content, part
):
    monkeypatch.setattr(rl, "build", lambda *_: pytest.fail("the parts were built"))
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name}.*{part}"):
        rl.run(config_flags.load(str(rl_config)), str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_bytes() == content
