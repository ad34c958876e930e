"""Settings that contradict each other: refused if they cannot work, else a warning."""

from pathlib import Path

import pytest

from zerosearch_jax import config_flags, main
from zerosearch_jax.errors import UserError
from zerosearch_jax.training import factory
from zerosearch_jax.training.validate import check, warnings

ROOT = Path(__file__).parents[2]


def _typed(file: str, changes: dict):
    config = config_flags.load(str(ROOT / "configs" / file))
    config.update_from_flattened_dict(changes)
    return config_flags.typed(main.config_class(config), config)


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("grpo.py", {"rollout.response_tokens": 640}, "rollout.response_tokens=640 .*max_tokens"),
        ("grpo.py", {"rollout.observation_tokens": 700}, "rollout.observation_tokens=700"),
        ("eval.py", {"limits.response_tokens": 640}, "limits.response_tokens=640"),
        ("collect.py", {"limits.observation_tokens": 640}, "limits.observation_tokens=640"),
        ("grpo.py", {"search.simulator.max_new_tokens": 352}, "simulator: max_new_tokens=352"),
        (
            "grpo.py",
            {"rollout.questions_per_step": 2**16, "rollout.group_size": 5},
            "327680 episodes per step .* memory",
        ),
        ("grpo.py", {"rl.steps": 2**30}, "episode numbers"),
    ],
)
def test_settings_that_cannot_work_are_refused(file, changes, message):
    with pytest.raises(UserError, match=message):
        check(_typed(file, changes))


@pytest.mark.parametrize(
    ("file", "changes", "key"),
    [
        ("grpo.py", {"rl.steps": 20, "optimizer.schedule_steps": 10}, "optimizer.schedule_steps"),
        ("sft_policy.py", {"optimizer.schedule_steps": 700}, "optimizer.schedule_steps"),
        ("grpo.py", {"search.engine": "bm25"}, "curriculum.start"),
        ("grpo.py", {"kl.coef": 0.0, "kl.apply_to": "reward"}, "kl.apply_to"),
        ("grpo.py", {"advantage.gamma": 0.9}, "advantage.gamma"),
        ("grpo.py", {"advantage.gae_lambda": 0.9}, "advantage.gae_lambda"),
        (
            "grpo.py",
            {"advantage.estimator": "rloo", "advantage.normalize_std": False},
            "advantage.normalize_std",
        ),
        ("grpo.py", {"loss.fixed_tokens": 5}, "loss.fixed_tokens"),
        ("search_r1.py", {"search.simulator.gate.report": "r.json"}, "search.simulator.gate"),
        (
            "grpo.py",
            {"search.simulator.url": "http://h", "search.simulator.top_k": 5},
            "search.simulator.top_k",
        ),
        ("grpo.py", {"watch.action": "stop", "watch.window": 6}, "watch.action"),
        ("grpo.py", {"optimizer.warmup_steps": 11}, "optimizer.warmup_steps"),
        ("grpo.py", {"rl.steps": 1}, "optimizer.warmup_steps"),
        ("ppo.py", {"critic.warmup_steps": 11}, "critic.warmup_steps"),
        ("sft_policy.py", {"sft.steps": 99}, "optimizer.warmup_steps"),
        (
            "grpo.py",
            {"policy.generator.prefill_buckets": (64, 641)},
            "config.policy.generator.prefill_buckets",
        ),
        (
            "collect.py",
            {"labeling.generator.decode_rows": (16, 121)},
            "config.labeling.generator.decode_rows",
        ),
    ],
)
def test_a_setting_without_effect_gets_one_line(file, changes, key):
    config = _typed(file, changes)
    check(config)
    (line,) = warnings(config)
    assert line.startswith(key) and "\n" not in line


def test_settings_that_switch_the_others_on_get_no_line():
    for changes in (
        {"optimizer.schedule_steps": 5, "optimizer.final_fraction": 1.0},
        {"advantage.estimator": "ppo", "advantage.gamma": 0.9, "advantage.gae_lambda": 0.9},
        {"watch.action": "stop"},
        {"search.simulator.gate.report": "r.json"},
    ):
        assert warnings(_typed("grpo.py", changes)) == []


@pytest.mark.parametrize(("schedule_steps", "last"), [(0, 39), (20, 19)])
def test_a_schedule_of_no_steps_has_the_steps_of_the_run(monkeypatch, schedule_steps, last):
    """The rate first reaches its final value at the schedule's end."""
    monkeypatch.setattr(factory, "Learner", lambda *_, policy, **rest: policy.schedule)
    config = _typed("grpo.py", {"rl.steps": 40, "optimizer.schedule_steps": schedule_steps})
    schedule = factory.make_learner(
        None, None, config.optimizer, config.learner, steps=config.rl.steps
    )
    final = config.optimizer.learning_rate * config.optimizer.final_fraction
    assert float(schedule(last)) > 1.01 * final
    assert float(schedule(last + 1)) == pytest.approx(final)
