"""Rules between the sections of a config, checked before anything is built.

A rule is a pair: whether the config breaks it, and the reason. `check` refuses settings that cannot
work. `warnings` lists settings that have no effect. The checks of a single section are in its
dataclass.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import TypeVar

from zerosearch_jax.errors import UserError
from zerosearch_jax.rl.config import BY_TOKEN, OptimizerConfig
from zerosearch_jax.training.config import RLConfig, RolloutConfig
from zerosearch_jax.training.job_configs import CollectConfig, EvaluateConfig, SFTConfig
from zerosearch_jax.training.sections import GeneratorConfig, LimitsConfig

Rule = tuple[bool, str]
Section = TypeVar("Section")

MAX_EPISODES = 2**18
"""Largest number of episodes per step. The host holds all of them in memory until the update, at
about 100 bytes per token. Episodes of 4,000 tokens, as in the paper, then take 100 GB."""


def check(config: object) -> None:
    """Raises UserError for the first rule that the config of a job breaks."""
    rules: tuple[Rule, ...] = ()
    if isinstance(config, RLConfig):
        rules = (
            *_rollout_rules(config),
            *_update_rules(config),
            *_room_rules("rollout", config.rollout, config.policy.generator),
        )
    elif isinstance(config, CollectConfig | EvaluateConfig):
        rules = _room_rules("limits", config.limits, config.policy.generator)
    for broken, reason in rules:
        if broken:
            raise UserError(reason)


def warnings(config: object) -> list[str]:
    """Returns a line for each setting of a job's config that has no effect or defeats another."""
    rules: list[Rule] = []
    if isinstance(config, RLConfig):
        rules += _without_effect(config)
        rules += _schedule_warnings(config.optimizer, "rl.steps", config.rl.steps)
    elif isinstance(config, SFTConfig):
        rules += _schedule_warnings(config.optimizer, "sft.steps", config.sft.steps)
    for path, generator in sections(config, GeneratorConfig):
        rules += _generator_warnings(path, generator)
    return [reason for holds, reason in rules if holds]


def sections(
    config: object, cls: type[Section], path: str = "config"
) -> Iterator[tuple[str, Section]]:
    """Yields each section of type `cls` at any depth of a typed config, with its full key."""
    if isinstance(config, cls):
        yield path, config
    if dataclasses.is_dataclass(config):
        for field in dataclasses.fields(config):
            yield from sections(getattr(config, field.name), cls, f"{path}.{field.name}")
    elif isinstance(config, Mapping):
        for name, section in config.items():
            yield from sections(section, cls, f"{path}.{name}")


def _rollout_rules(config: RLConfig) -> tuple[Rule, ...]:
    """Rules on engines, rewards and groups of episodes."""
    search, rollout, reward = config.search, config.rollout, config.reward
    advantage, max_tokens = config.advantage, config.policy.generator.max_tokens
    devices = search.simulator.devices if search.simulator else 0
    episodes = rollout.questions_per_step * rollout.group_size * rollout.max_rounds
    return (
        (
            episodes > MAX_EPISODES,
            f"rollout.questions_per_step × group_size × max_rounds = {episodes} episodes per step "
            f"would exhaust the host's memory; lower one of them (at most {MAX_EPISODES})",
        ),
        (
            # The number of an episode keys its random draws.
            episodes * config.rl.steps > 2**32,
            f"rl.steps={config.rl.steps} × {episodes} episodes per step is more than the 2**32 "
            "episode numbers; lower one of them",
        ),
        (
            rollout.max_turns > 0 and "none" in (search.engine, config.eval.search.engine),
            "search.engine=none or eval.search.engine=none requires rollout.max_turns=0 (training "
            "without search); set it, or choose an engine",
        ),
        (
            devices != 0 and (search.engine != "simulated" or bool(search.simulator.url)),
            f"search.simulator.devices={devices} requires a simulator in this process "
            "(search.engine=simulated without simulator.url); set it to 0",
        ),
        (
            devices != 0 and rollout.concurrent_searches == 0,
            f"search.simulator.devices={devices} would leave either the policy or the "
            "simulator idle; overlap them with rollout.concurrent_searches=1 or more",
        ),
        (
            reward.stage_one_steps > config.rl.steps,
            f"reward.stage_one_steps={reward.stage_one_steps} must be at most "
            f"rl.steps={config.rl.steps}",
        ),
        (
            config.learner.row_tokens < max_tokens,
            f"config.learner.row_tokens={config.learner.row_tokens} cannot hold an episode of "
            f"config.policy.generator.max_tokens={max_tokens}; raise row_tokens",
        ),
        (
            rollout.group_size <= 1 and advantage.estimator == "rloo",
            "advantage.estimator=rloo compares an episode with the others of its group; set "
            "rollout.group_size above 1",
        ),
        (
            rollout.group_size <= 1
            and (advantage.estimator, advantage.baseline) == ("reinforce", "group_mean"),
            "advantage.baseline=group_mean with rollout.group_size=1 makes every advantage 0; "
            "raise rollout.group_size or set advantage.baseline=batch_mean",
        ),
    )


def _update_rules(config: RLConfig) -> tuple[Rule, ...]:
    """Rules on the loss, the KL penalty, the updates of a step and the critic."""
    rl, loss, kl, estimator = config.rl, config.loss, config.kl, config.advantage.estimator
    episodes = config.episodes_per_step
    generator = config.policy.generator
    dtypes = {config.learner.compute_dtype, generator.dtype}
    rounded = dtypes != {"float32"} or generator.int8_weights
    return (
        (
            loss.surrogate == "sequence" and estimator in BY_TOKEN,
            "loss.surrogate=sequence needs one advantage for a sequence, but advantage.estimator="
            f"{estimator} gives one per token; use grpo, rloo or reinforce",
        ),
        (
            loss.surrogate == "sequence" and rl.old_logprobs == "sampler" and rounded,
            "loss.surrogate=sequence would clip the rounding difference of generator and learner "
            "in bfloat16 or int8; set rl.old_logprobs=learner, or float32 for both dtypes",
        ),
        (
            kl.target != 0 and 5 * kl.horizon <= episodes,
            f"kl.horizon={kl.horizon} could turn the KL coefficient negative in one step; "
            f"set it above a fifth of a step's {episodes} episodes (rollout.questions_per_step × "
            "group_size)",
        ),
        (
            loss.importance_cap != 0 and rl.old_logprobs != "learner",
            "loss.importance_cap weighs the learner's log-probs against the sampler's; set "
            "rl.old_logprobs=learner",
        ),
        (
            rl.minibatch_episodes > episodes,
            f"rl.minibatch_episodes={rl.minibatch_episodes} is more than the {episodes} episodes "
            "of a step (rollout.questions_per_step × group_size); lower it, or set it to 0 for one "
            "update per pass",
        ),
        (
            loss.llds != 0 and config.updates_per_step == 1,
            "loss.llds compares with the log-probs before a step's first update, so with one "
            "update per step it is always 0; set rl.minibatch_episodes to fewer than the "
            f"{episodes} episodes of a step (rollout.questions_per_step × group_size), or raise "
            "rl.epochs",
        ),
        (
            rl.refresh_reference > 0 and (config.lora.rank > 0 or kl.coef == 0),
            f"rl.refresh_reference={rl.refresh_reference} moves the reference policy of the KL. It "
            "requires kl.coef above 0 and lora.rank=0 (under LoRA the reference is the model "
            "without adapters); change these keys or set rl.refresh_reference=0",
        ),
        (
            config.lora.rank > 0 and estimator == "ppo" and config.critic.trunk == "own",
            "critic.trunk=own trains all parameters of a second model, which lora.rank > 0 is "
            "meant to avoid; set critic.trunk=shared",
        ),
    )


def _room_rules(
    section: str, limits: RolloutConfig | LimitsConfig, generator: GeneratorConfig
) -> tuple[Rule, ...]:
    """Rules on the tokens of a turn and an observation, which share a slot with the prompt."""
    room = f"policy.generator.max_tokens={generator.max_tokens}"
    return (
        (
            limits.response_tokens >= generator.max_tokens,
            f"{section}.response_tokens={limits.response_tokens} leaves no room for a prompt in "
            f"{room}; lower the first or raise the second",
        ),
        (
            limits.max_turns > 0 and limits.observation_tokens >= generator.max_tokens,
            f"{section}.observation_tokens={limits.observation_tokens} leaves no room for a prompt "
            f"in {room}; lower the first or raise the second",
        ),
    )


def _schedule_warnings(optimizer: OptimizerConfig, key: str, steps: int) -> tuple[Rule, ...]:
    length, warmup = optimizer.schedule_steps, optimizer.warmup_steps
    return (
        (
            0 < length < steps and optimizer.final_fraction < 1,
            f"optimizer.schedule_steps={length} is below {key}={steps}: the last {steps - length} "
            f"steps have {optimizer.final_fraction} of the learning rate; set it to 0 (as many as "
            f"{key})",
        ),
        (
            warmup > min(length or steps, steps),
            f"optimizer.warmup_steps={warmup} is longer than the schedule or {key}={steps}: the "
            "learning rate never decays, or never reaches its peak; lower it",
        ),
    )


def _generator_warnings(path: str, generator: GeneratorConfig) -> tuple[Rule, ...]:
    return (
        (
            max(generator.prefill_buckets) > generator.max_tokens,
            f"{path}.prefill_buckets={generator.prefill_buckets}: lengths above "
            f"max_tokens={generator.max_tokens} are lowered to it",
        ),
        (
            max(generator.decode_rows, default=0) > generator.slots,
            f"{path}.decode_rows={generator.decode_rows}: numbers above "
            f"slots={generator.slots} are lowered to it",
        ),
    )


def _without_effect(config: RLConfig) -> tuple[Rule, ...]:
    """Settings that another setting switches off."""
    search, advantage, loss, kl = config.search, config.advantage, config.loss, config.kl
    estimator, watch, simulator = advantage.estimator, config.watch, config.search.simulator
    simulated = search.engine == "simulated" and config.rollout.max_turns > 0
    return (
        (
            config.curriculum.start + config.curriculum.end > 0 and not simulated,
            "curriculum.start and curriculum.end have no effect without simulated searches; set "
            "them to 0",
        ),
        (
            kl.coef == 0 and kl.apply_to == "reward",
            "kl.apply_to=reward has no effect with kl.coef=0",
        ),
        (
            advantage.gamma != 1 and estimator not in BY_TOKEN,
            f"advantage.gamma={advantage.gamma} has no effect with advantage.estimator={estimator}",
        ),
        (
            advantage.gae_lambda != 1 and estimator != "ppo",
            f"advantage.gae_lambda={advantage.gae_lambda} has no effect with "
            f"advantage.estimator={estimator}",
        ),
        (
            not advantage.normalize_std and estimator != "grpo",
            f"advantage.normalize_std=False has no effect with advantage.estimator={estimator}",
        ),
        (
            loss.fixed_tokens > 0 and loss.aggregate != "fixed_length",
            f"loss.fixed_tokens={loss.fixed_tokens} has no effect with "
            f"loss.aggregate={loss.aggregate}",
        ),
        (
            simulator is not None and bool(simulator.gate.report) and not simulated,
            "search.simulator.gate.report has no effect, because the run has no simulated searches",
        ),
        (
            simulator is not None and simulated and bool(simulator.url) and simulator.top_k > 0,
            f"search.simulator.top_k={simulator.top_k if simulator else 0} is not sent to the "
            "simulator's server",
        ),
        (
            watch.action != "log" and 2 * watch.window > config.rl.steps,
            f"watch.action={watch.action} has no effect: rl.steps={config.rl.steps} is less than "
            f"two windows of watch.window={watch.window} steps",
        ),
        (
            estimator == "ppo" and config.critic.warmup_steps > config.rl.steps,
            f"critic.warmup_steps={config.critic.warmup_steps} is longer than rl.steps="
            f"{config.rl.steps}: the critic never reaches its learning rate; lower it",
        ),
    )
