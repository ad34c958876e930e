"""Rules between the sections of an rl config, checked before anything is built.

A rule is a pair: whether the config breaks it, and the reason for the refusal. The checks of a
single section are in its dataclass.
"""

from zerosearch_jax.errors import UserError
from zerosearch_jax.rl.config import BY_TOKEN
from zerosearch_jax.training.config import RLConfig

Rule = tuple[bool, str]


def check(config: RLConfig) -> None:
    """Raises UserError for the first rule that the config breaks."""
    for broken, reason in (*_rollout_rules(config), *_update_rules(config)):
        if broken:
            raise UserError(reason)


def _rollout_rules(config: RLConfig) -> tuple[Rule, ...]:
    """Rules on engines, rewards and groups of episodes."""
    search, rollout, reward = config.search, config.rollout, config.reward
    advantage, max_tokens = config.advantage, config.policy.generator.max_tokens
    devices = search.simulator.devices if search.simulator else 0
    return (
        (
            rollout.max_turns > 0 and "none" in (search.engine, config.eval.search.engine),
            "search.engine=none and eval.search.engine=none require rollout.max_turns=0, training "
            "without search; choose an engine or set it",
        ),
        (
            devices != 0 and (search.engine != "simulated" or bool(search.simulator.url)),
            f"search.simulator.devices={devices} requires a simulator that runs here "
            "(search.engine=simulated without simulator.url); set it to 0",
        ),
        (
            devices != 0 and rollout.concurrent_searches == 0,
            f"search.simulator.devices={devices} would leave either the policy or the "
            "simulator idle; overlap them with rollout.concurrent_searches=1 or more",
        ),
        (
            not 0 <= reward.stage_one_steps <= config.rl.steps,
            f"reward.stage_one_steps={reward.stage_one_steps} must be between 0 and "
            f"rl.steps={config.rl.steps}",
        ),
        (
            config.learner.row_tokens < max_tokens,
            f"config.learner.row_tokens={config.learner.row_tokens} cannot hold an episode of "
            f"config.policy.generator.max_tokens={max_tokens}; raise it",
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
    episodes = config.rollout.questions_per_step * config.rollout.group_size
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
            f"set it above a fifth of a step's {episodes} episodes",
        ),
        (
            loss.importance_cap != 0 and rl.old_logprobs != "learner",
            "loss.importance_cap weighs the learner's log-probs against the sampler's; set "
            "rl.old_logprobs=learner",
        ),
        (
            rl.epochs < 1 or not 1 <= rl.minibatches <= episodes,
            f"rl.epochs={rl.epochs} and rl.minibatches={rl.minibatches} must be at least 1, "
            f"minibatches at most the {episodes} episodes of a step",
        ),
        (
            loss.llds != 0 and rl.epochs * rl.minibatches == 1,
            "loss.llds compares with the log-probs before a step's first update, so with one "
            "update per step it is always 0; raise rl.minibatches or rl.epochs",
        ),
        (
            config.lora.rank > 0 and estimator == "ppo" and config.critic.trunk == "own",
            "critic.trunk=own trains all parameters of a second model, which lora.rank > 0 is "
            "meant to avoid; set critic.trunk=shared",
        ),
    )
