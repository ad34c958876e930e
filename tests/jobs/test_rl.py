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
from ml_collections import ConfigDict
from safetensors.numpy import load_file

from zerosearch_jax import config_flags
from zerosearch_jax.data.qa import QARow
from zerosearch_jax.errors import UserError
from zerosearch_jax.jobs import rl
from zerosearch_jax.parallel.mesh import make_mesh
from zerosearch_jax.rollout.trajectory import Episode, Trajectory, Turn
from zerosearch_jax.telemetry.collapse import CollapseWatch
from zerosearch_jax.telemetry.metrics import CRITIC_METRICS, METRICS, SFT_METRICS
from zerosearch_jax.telemetry.progress import Progress
from zerosearch_jax.text.actions import Action
from zerosearch_jax.training import factory
from zerosearch_jax.training.row_sampler import RowSampler

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("compiled_once")
CLOCKS = ("seconds/", "tokens_per_sec", "host_share")


def _rows(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def _without_clocks(row: dict) -> dict:
    return {name: value for name, value in row.items() if not name.startswith(CLOCKS)}


@pytest.fixture(scope="module")
def finished(rl_config, tmp_path_factory, compiled_once):
    """A whole run: its workdir, and the compilations up to each step's end."""
    workdir = tmp_path_factory.mktemp("whole")
    return workdir, run_and_count(config_flags.load(str(rl_config)), workdir)


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
    """Other contexts, numbers of running rows and searches in each; never another program."""
    config = config_flags.load(str(rl_config))
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
    assert "another config" not in resumed.stdout
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
        (dict(loss=dict(surrogate="spo")), "loss.surrogate is 'spo'; choose one of clip, sequence"),
        (dict(advantage=dict(baseline="mean")), "advantage.baseline is 'mean'; choose one of none"),
        (dict(rl=dict(overlong="cut")), "rl.overlong is 'cut'; choose one of keep, mask"),
        (dict(critic=dict(trunk="twin")), "critic.trunk is 'twin'"),
        (dict(advantage=dict(estimator="rloo"), rollout=dict(group_size=1)), "others of its group"),
        (
            dict(advantage=dict(estimator="reinforce"), rollout=dict(group_size=1)),
            "every advantage 0",
        ),
        (dict(rollout=dict(max_rounds=2, group_size=1)), "rollout.max_rounds"),
        (dict(loss=dict(surrogate="sequence")), "take loss.aggregate=sequence_mean"),
        (
            dict(
                loss=dict(surrogate="sequence", aggregate="sequence_mean"),
                advantage=dict(estimator="reinforce_pp"),
            ),
            "one advantage for a sequence",
        ),
        (dict(loss=dict(surrogate="cispo", dual_clip=3.0)), "loss.dual_clip belongs to"),
        (dict(loss=dict(dual_clip=0.5)), "loss.dual_clip must be above 1"),
        (dict(kl=dict(estimator="k1")), "its gradient is 0 in expectation"),
        (dict(kl=dict(target=0.1)), "set kl.apply_to=reward"),
        (dict(kl=dict(target=-0.1, apply_to="reward")), "kl.coef and kl.target above 0"),
        (
            dict(kl=dict(target=0.1, apply_to="reward", horizon=1)),
            "kl.horizon=1 could turn",
        ),
        (dict(loss=dict(aggregate="fixed_length")), "divides by loss.fixed_tokens"),
        (dict(loss=dict(importance_cap=2.0)), "set rl.old_logprobs=learner"),
        (dict(loss=dict(llds=0.1)), "raise rl.minibatches or rl.epochs"),
        (dict(rl=dict(minibatches=9)), "at most the 8 episodes"),
        (dict(rl=dict(epochs=0)), "rl.epochs=0"),
        (dict(advantage=dict(estimator="ppo"), lora=dict(rank=4)), "critic.trunk=shared"),
        (dict(rollout=dict(max_turns=-1)), "rollout.max_turns=-1 must be at least 0"),
        (dict(search=dict(engine="none")), "search.engine=none .* belong to rollout.max_turns=0"),
        (dict(eval=dict(search=dict(engine="none"))), "name an engine or set it"),
        (dict(reward=dict(rule="rouge")), "reward.rule is 'rouge'; choose one of answer, research"),
        (dict(reward=dict(rule="research", name="em")), "reward.name and reward.format_weight"),
        (dict(reward=dict(rule="research", format_weight=0.1)), "leave them f1 and 0"),
        (dict(reward=dict(stage_one_steps=1)), "reward.stage_one_steps belongs to"),
        (
            dict(reward=dict(rule="r1_searcher", stage_one_steps=4)),
            "reward.stage_one_steps=4 must lie between 0 and rl.steps=3",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused(rl_config, change, told):
    config = config_flags.load(str(rl_config))
    config.update(change)
    with pytest.raises(UserError, match=told):
        rl.check(config)


def test_more_questions_a_step_than_there_are_is_refused(rl_config, tmp_path):
    config = config_flags.load(str(rl_config))
    config.update(dict(rollout=dict(questions_per_step=13), learner=dict(rows=13)))
    with pytest.raises(UserError, match="config.rollout.questions_per_step=13 is more than the 12"):
        rl.run(config, str(tmp_path))
    assert not (tmp_path / "metrics.jsonl").exists()


# Name → what differs from `rl_config`, whose steps have 2 × 4 episodes.
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
        rl=dict(minibatches=2, overlong="mask"),
        kl=dict(coef=0.0),
    ),
    "gspo": dict(
        loss=dict(surrogate="sequence", aggregate="sequence_mean", clip_low=3e-4, clip_high=4e-4),
        rl=dict(minibatches=2),
    ),
    "lora": dict(lora=LORA),
    # Adaptive KL, and most of what there is at once.
    "everything": dict(
        lora=LORA,
        critic=dict(trunk="shared"),
        rollout=dict(max_rounds=2),
        advantage=dict(estimator="ppo"),
        loss=dict(surrogate="cispo", importance_cap=2.0, llds=0.1),
        kl=dict(target=0.01, horizon=16, **KL_IN_REWARD),
        rl=dict(old_logprobs="learner", minibatches=2, epochs=2),
    ),
}


def _cases(*names: str):
    """ "everything" is always tested, the others, each of one algorithm, are slow."""
    slow = pytest.mark.slow
    return [name if name == "everything" else pytest.param(name, marks=slow) for name in names]


def _two_steps(rl_config, name: str):
    config = config_flags.load(str(rl_config))
    config.update(ALGORITHMS[name])
    config.rl.steps = 2
    return config


@pytest.fixture(scope="module")
def run_of(rl_config, tmp_path_factory, compiled_once):
    """Runs an algorithm's case for two steps, once: its workdir and its compilations."""
    runs = {}

    def run(name: str):
        if name not in runs:
            workdir = tmp_path_factory.mktemp(name)
            runs[name] = workdir, run_and_count(_two_steps(rl_config, name), workdir)
        return runs[name]

    return run


@pytest.mark.parametrize("name", _cases(*ALGORITHMS))
def test_every_algorithm_writes_its_figures_and_compiles_in_the_first_step_alone(run_of, name):
    workdir, counts = run_of(name)
    assert len(counts) == 2 and counts[1] == counts[0] > 0
    # Where an episode is correct; of the step before.
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
def test_a_critic_starts_at_nothing_and_learns(run_of, name):
    rows = _rows(run_of(name)[0])
    assert rows[0]["critic/value"] == 0.0 and rows[0]["loss/value"] > 0
    assert rows[1]["critic/value"] != 0.0
    rates = [row["critic/learning_rate"] for row in rows]
    assert rates == [pytest.approx(2.5e-4), pytest.approx(5e-4)]  # a warm-up of 2 steps
    assert all(row["critic/grad_norm"] > 0 for row in rows)
    assert all(row["clip_fraction"] == 0.0 for row in rows)  # one update: every ratio is 1


@pytest.mark.slow
def test_updates_after_a_steps_first_move_the_ratio(run_of):
    assert any(row["clip_fraction"] > 0 for row in _rows(run_of("gspo")[0]))


def test_schedules_are_in_steps_whatever_the_updates_of_a_step(run_of):
    rows = _rows(run_of("everything")[0])
    # A warm-up of 2 steps, that is of 8 updates; a row has the mean of its 4.
    rates = [5e-4 * (1 + 2 + 3 + 4) / 4 / 8, 5e-4 * (5 + 6 + 7 + 8) / 4 / 8]
    assert [row["critic/learning_rate"] for row in rows] == [pytest.approx(r) for r in rates]
    assert all(row["loss/llds"] > 0 for row in rows)  # later updates have moved


@pytest.mark.parametrize("name", _cases("dapo", "everything"))
def test_dynamic_sampling_plays_on_and_counts_what_it_played(run_of, name):
    rows = _rows(run_of(name)[0])
    assert {row["sampling_rounds"] for row in rows} == {2.0}
    for row in rows:  # of two groups a round
        assert 4 * row["zero_variance_groups"] in (0, 1, 2, 3, 4)
        assert row["reward"] * 16 == pytest.approx(round(row["reward"] * 16))


@pytest.mark.parametrize("name", _cases("lora", "everything"))
def test_lora_exports_adapters_and_the_policy_that_they_make_of_the_base(
    run_of, markov_model, name
):
    workdir, _ = run_of(name)
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


def test_the_kl_weight_is_steered_by_the_kl_of_the_step_before(run_of):
    first, second = _rows(run_of("everything")[0])
    assert first["kl_coef"] == 0.001
    # 8 episodes a step, a horizon of 16: an error of at most 20 % counts half.
    error = min(max(first["kl"] / 0.01 - 1, -0.2), 0.2)
    assert second["kl_coef"] == pytest.approx(0.001 * (1 + 0.5 * error))
    assert second["kl_coef"] != first["kl_coef"]


def test_an_interrupted_run_goes_on_with_its_kl_weight_and_its_place_in_the_data(
    run_of, rl_config, tmp_path, monkeypatch
):
    whole, _ = run_of("everything")
    config = _two_steps(rl_config, "everything")

    class Interrupted(Progress):
        def update(self, done, figures):
            super().update(done, figures)
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(rl, "Progress", Interrupted)
        with pytest.raises(KeyboardInterrupt):
            rl.run(config, str(tmp_path))
    assert len(_rows(tmp_path)) == 1
    rl.run(config, str(tmp_path))
    assert [_without_clocks(r) for r in _rows(tmp_path)] == [
        _without_clocks(r) for r in _rows(whole)
    ]
    policy = Path("policy", "model.safetensors")
    assert (tmp_path / policy).read_bytes() == (whole / policy).read_bytes()


def test_an_alarm_stops_a_run_that_asks_for_it(rl_config, tmp_path, monkeypatch, capsys):
    config = config_flags.load(str(rl_config))
    config.update(dict(watch=dict(stop=True), eval=dict(every=3)))
    config.checkpoint_every = 3
    seen = []

    class Alarming(CollapseWatch):
        def update(self, figures):
            seen.append(figures)
            return super().update(figures)

        def alarm(self):
            return "WARNING: made up" if len(seen) == 2 else None

    monkeypatch.setattr(rl, "CollapseWatch", Alarming)
    with pytest.raises(UserError, match="stopped after step 2 by config.watch.stop.*stop=False"):
        rl.run(config, str(tmp_path))
    assert "step 2: WARNING: made up" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["2"]
    rows = _rows(tmp_path)
    assert [row["step"] for row in rows] == [1, 2]
    assert not (tmp_path / "summary.json").exists()

    config.watch.stop = False
    seen.clear()
    rl.run(config, str(tmp_path))
    assert seen[:2] == rows and len(seen) == 3  # the watch has seen the steps before
    assert [row["step"] for row in _rows(tmp_path)] == [1, 2, 3]
    assert _rows(tmp_path)[:2] == rows
    assert (tmp_path / "summary.json").exists()


def _answered(number: int, answer: str) -> Trajectory:
    trajectory = Trajectory(Episode(number, f"question {number // 2}", ("Chad",)))
    trajectory.turns.append(Turn(f"<answer>{answer}</answer>", Action("answer", answer)))
    return trajectory


def _round(first: int, *groups: tuple[int, int]) -> list[Trajectory]:
    """Episodes with the rewards of `groups`, numbered from `first`."""
    rewards = [reward for group in groups for reward in group]
    return [_answered(first + i, "Chad" if right else "Peru") for i, right in enumerate(rewards)]


@pytest.fixture
def sampling_config():
    """Two questions a step, two episodes each, at most three rounds."""
    config = config_flags.load(str(ROOT / "configs" / "grpo.py"))
    config.rollout.update(dict(questions_per_step=2, group_size=2, max_rounds=3))
    return config


def _play(config, *rounds) -> tuple[rl.Played, int]:
    """Gives the rounds until there is enough; how many that took."""
    played, given = rl.Played(config, 0), 0
    epochs = RowSampler(_rows_of_questions(12), 2, 0, "size")
    while not played.enough:
        played.next_round(epochs)
        played.add(_round(4 * given, *rounds[given]))
        given += 1
    return played, given


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
def test_groups_that_differ_are_taken_first(sampling_config, rounds, taken, groups):
    played, given = _play(sampling_config, *rounds)
    assert given == taken
    trajectories, rewards = played.chosen()
    every = [group for one in rounds[:taken] for group in one]
    np.testing.assert_array_equal(rewards, [every[group] for group in groups])
    assert rewards.dtype == np.float32 and rewards.shape == (2, 2)
    numbers = [2 * group + member for group in groups for member in range(2)]
    assert [t.episode.number for t in trajectories] == numbers
    figures = played.figures()  # of all that were played
    assert figures["reward"] == pytest.approx(np.mean(every))
    assert figures["zero_variance_groups"] == pytest.approx(np.mean([a == b for a, b in every]))
    assert (figures["sampling_rounds"], figures["noisy_ratio"]) == (taken, 0.0)
    assert len(played.trajectories) == 4 * taken


def test_without_dynamic_sampling_there_is_one_round_whatever_it_gives(sampling_config):
    sampling_config.rollout.max_rounds = 1
    played, given = _play(sampling_config, ((1, 1), (0, 0)))
    trajectories, rewards = played.chosen()
    assert given == 1 and [t.episode.number for t in trajectories] == [0, 1, 2, 3]
    np.testing.assert_array_equal(rewards, [[1, 1], [0, 0]])


def test_a_steps_rewards_are_those_of_its_stage(sampling_config):
    sampling_config.rollout.max_rounds = 1
    sampling_config.reward.update(dict(rule="r1_searcher", stage_one_steps=2))
    for step, expected in ((1, [[0.5, 0], [0, 0]]), (2, [[-1, -2], [-1, -1]])):
        played = rl.Played(sampling_config, step)
        played.next_round(RowSampler(_rows_of_questions(12), 2, 0, "size"))
        trajectories = _round(0, (1, 0), (1, 1))  # they do not think: not in the format
        trajectories[0].searches.append((None, None))
        played.add(trajectories)
        np.testing.assert_array_equal(played.chosen()[1], expected)


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

    def fail(*_, **__):
        raise AssertionError("an engine was built")

    monkeypatch.setattr(factory, "make_engine", fail)
    rl.run(config, str(tmp_path))
    (row,) = _rows(tmp_path)
    assert row["searches_per_episode"] == row["eval/searches_per_episode"] == 0
    assert 0 < row["finish_ratio"] < 1  # some searched, and that was their end
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["engine"] == "none"
    assert all(
        summary[name]["searches_per_episode"] == 0 for name in ("base", "trained", "no_search")
    )


def test_every_round_of_every_step_has_its_own_place_in_the_data(sampling_config):
    epochs = RowSampler(_rows_of_questions(24), 2, 0, "size")
    questions, numbers = [], []
    for step in range(4):  # 4 steps of 3 rounds of 2 questions: an epoch
        played = rl.Played(sampling_config, step)
        for _ in range(3):
            episodes = played.next_round(epochs)
            questions += [episode.question for episode in episodes[::2]]
            numbers += [episode.number for episode in episodes]
            assert [e.question for e in episodes[::2]] == [e.question for e in episodes[1::2]]
            assert not played.enough or len(numbers) % 12 == 0
            played.add(_round(episodes[0].number, (1, 1), (0, 0)))
        assert played.enough
    assert sorted(questions) == sorted(f"question {i}" for i in range(24))
    assert numbers == list(range(48))


def test_a_simulator_without_its_report_is_refused_before_anything_is_built():
    config = config_flags.load(str(ROOT / "configs" / "grpo.py"))
    config.search.simulator.gate.report = "no/report.json"
    config.search.engine = "bm25"
    rl.check_simulator(config)  # it is not used
    config.search.engine = "simulated"
    with pytest.raises(UserError, match="no/report.json: cannot be read"):
        rl.check_simulator(config)


def test_a_kept_config_tells_what_has_changed_since(tmp_path, capsys):
    config = ConfigDict(dict(kl=dict(coef=0.01), rl=dict(sizes=(1, 2)), seed=0))
    path = tmp_path / "config.json"
    rl.keep_config(config, path)
    rl.keep_config(config, path)
    assert capsys.readouterr().out == ""
    config.kl.coef = 0.1
    config.rl.steps = 3
    del config["seed"]
    rl.keep_config(config, path)
    told = capsys.readouterr().out.splitlines()
    assert [
        line.removeprefix("this directory was begun with another config.") for line in told
    ] == [
        "kl.coef: 0.01 → 0.1",
        "seed: 0 → 'absent'",
        "rl.steps: 'absent' → 3",
    ]
    rl.keep_config(config, path)
    assert capsys.readouterr().out == ""
