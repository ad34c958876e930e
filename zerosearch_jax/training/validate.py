"""Rules between the sections of an rl config, checked before anything is built.

A rule is a function of the config that returns the reason for a refusal, or None. The checks of a
single section are in its dataclass.
"""

from zerosearch_jax.errors import UserError
from zerosearch_jax.rl.config import BY_TOKEN
from zerosearch_jax.training.config import RLConfig


def check(config: RLConfig) -> None:
    """Raises UserError for the first rule that the config breaks."""
    for rule in RULES:
        if reason := rule(config):
            raise UserError(reason)


def _engine_none(config: RLConfig) -> str | None:
    engines = (config.search.engine, config.eval.search.engine)
    if config.rollout.max_turns > 0 and "none" in engines:
        return (
            "search.engine=none and eval.search.engine=none require rollout.max_turns=0, training "
            "without search; choose an engine or set it"
        )
    return None


def _simulator_devices(config: RLConfig) -> str | None:
    simulator = config.search.simulator
    if simulator is None or simulator.devices == 0:
        return None
    if config.search.engine != "simulated" or simulator.url:
        return (
            f"search.simulator.devices={simulator.devices} requires a simulator that runs here "
            "(search.engine=simulated without simulator.url); set it to 0"
        )
    if config.rollout.concurrent_searches == 0:
        return (
            f"search.simulator.devices={simulator.devices} would leave either the policy or the "
            "simulator idle; overlap them with rollout.concurrent_searches=1 or more"
        )
    return None


def _reward_stages(config: RLConfig) -> str | None:
    if not 0 <= config.reward.stage_one_steps <= config.rl.steps:
        return (
            f"reward.stage_one_steps={config.reward.stage_one_steps} must be between 0 and "
            f"rl.steps={config.rl.steps}"
        )
    return None


def _episodes_fit_rows(config: RLConfig) -> str | None:
    row_tokens, max_tokens = config.learner.row_tokens, config.policy.generator.max_tokens
    if row_tokens < max_tokens:
        return (
            f"config.learner.row_tokens={row_tokens} cannot hold an episode of "
            f"config.policy.generator.max_tokens={max_tokens}; raise it"
        )
    return None


def _group_of_one(config: RLConfig) -> str | None:
    advantage = config.advantage
    if config.rollout.group_size > 1:
        return None
    if advantage.estimator == "rloo":
        return (
            "advantage.estimator=rloo compares an episode with the others of its group; set "
            "rollout.group_size above 1"
        )
    if advantage.estimator == "reinforce" and advantage.baseline == "group_mean":
        return (
            "advantage.baseline=group_mean with rollout.group_size=1 makes every advantage 0; "
            "raise rollout.group_size or set advantage.baseline=batch_mean"
        )
    return None


def _sequence_advantages(config: RLConfig) -> str | None:
    if config.loss.surrogate == "sequence" and config.advantage.estimator in BY_TOKEN:
        return (
            "loss.surrogate=sequence needs one advantage for a sequence, but advantage.estimator="
            f"{config.advantage.estimator} gives one per token; use grpo, rloo or reinforce"
        )
    return None


def _kl_horizon(config: RLConfig) -> str | None:
    episodes = _episodes(config)
    if config.kl.target != 0 and 5 * config.kl.horizon <= episodes:
        return (
            f"kl.horizon={config.kl.horizon} could turn the KL coefficient negative in one step; "
            f"set it above a fifth of a step's {episodes} episodes"
        )
    return None


def _importance_cap(config: RLConfig) -> str | None:
    if config.loss.importance_cap != 0 and config.rl.old_logprobs != "learner":
        return (
            "loss.importance_cap weighs the learner's log-probs against the sampler's; set "
            "rl.old_logprobs=learner"
        )
    return None


def _llds(config: RLConfig) -> str | None:
    if config.loss.llds != 0 and config.rl.epochs * config.rl.minibatches == 1:
        return (
            "loss.llds compares with the log-probs before a step's first update, so with one "
            "update per step it is always 0; raise rl.minibatches or rl.epochs"
        )
    return None


def _updates(config: RLConfig) -> str | None:
    rl, episodes = config.rl, _episodes(config)
    if rl.epochs < 1 or not 1 <= rl.minibatches <= episodes:
        return (
            f"rl.epochs={rl.epochs} and rl.minibatches={rl.minibatches} must be at least 1, "
            f"minibatches at most the {episodes} episodes of a step"
        )
    return None


def _lora_critic(config: RLConfig) -> str | None:
    ppo = config.advantage.estimator == "ppo"
    if config.lora.rank > 0 and ppo and config.critic.trunk == "own":
        return (
            "critic.trunk=own trains all parameters of a second model, which lora.rank > 0 is "
            "meant to avoid; set critic.trunk=shared"
        )
    return None


def _episodes(config: RLConfig) -> int:
    return config.rollout.questions_per_step * config.rollout.group_size


RULES = (
    _engine_none,
    _simulator_devices,
    _reward_stages,
    _episodes_fit_rows,
    _group_of_one,
    _sequence_advantages,
    _kl_horizon,
    _importance_cap,
    _updates,
    _llds,
    _lora_critic,
)
