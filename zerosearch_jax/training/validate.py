"""Refuses RL settings that contradict each other, with the reason, before anything is built."""

from ml_collections import ConfigDict

from zerosearch_jax.errors import UserError
from zerosearch_jax.rl.config import BY_TOKEN
from zerosearch_jax.rl.rewards import RULES
from zerosearch_jax.training.policy_update import objective_of

CHOICES = {
    "old_logprobs": ("sampler", "learner"),
    "overlong": ("keep", "mask"),
}


def check(config: ConfigDict) -> None:
    """Raises UserError for the first contradiction in an rl job's config."""
    rl, rollout = config.rl, config.rollout
    advantage, loss, kl = config.advantage, config.loss, config.kl
    for key, known in CHOICES.items():
        if rl[key] not in known:
            raise UserError(f"rl.{key} is {rl[key]!r}; choose one of {', '.join(known)}")
    if loss.aggregate not in AGGREGATES:
        raise UserError(
            f"loss.aggregate is {loss.aggregate!r}; choose one of {', '.join(AGGREGATES)}"
        )
    estimator_of(config), objective_of(config)  # each refuses names that it does not know
    if config.critic.trunk not in TRUNKS:
        known = " or ".join(TRUNKS)
        raise UserError(f"critic.trunk is {config.critic.trunk!r}; choose {known}")
    reward = config.reward
    if reward.rule not in RULES:
        raise UserError(f"reward.rule is {reward.rule!r}; choose one of {', '.join(RULES)}")
    alone = rollout.group_size == 1
    simulator = config.search.simulator
    updates = rl.epochs * rl.minibatches
    episodes = rollout.questions_per_step * rollout.group_size
    refused = (
        (
            rollout.temperature <= 0,
            "config.rollout.temperature must be above 0: episodes must differ to compare them",
        ),
        (
            rollout.max_turns < 0,
            f"rollout.max_turns={rollout.max_turns} must be at least 0, which leaves one turn",
        ),
        (
            rollout.max_turns > 0 and "none" in (config.search.engine, config.eval.search.engine),
            "search.engine=none and eval.search.engine=none belong to rollout.max_turns=0, "
            "training without search; name an engine or set it",
        ),
        (
            config.eval.search.engine == "simulated",
            "eval.search.engine=simulated: what a policy learned from a simulator is judged with a "
            "real engine; choose another",
        ),
        (
            simulator.devices != 0 and (config.search.engine != "simulated" or simulator.url),
            "search.simulator.devices sets devices apart for a simulator that runs here "
            "(search.engine=simulated without simulator.url); set it to 0",
        ),
        (
            simulator.devices != 0 and rollout.concurrent_searches == 0,
            f"search.simulator.devices={simulator.devices} would leave policy and simulator idle "
            "in turns; let them overlap by rollout.concurrent_searches=1 or more",
        ),
        (
            reward.rule != "answer" and (reward.name != "f1" or reward.format_weight != 0),
            f"reward.name and reward.format_weight belong to reward.rule=answer; {reward.rule} "
            "has a score and a format of its own: leave them f1 and 0",
        ),
        (
            reward.rule != "r1_searcher" and reward.stage_one_steps != 0,
            f"reward.stage_one_steps belongs to reward.rule=r1_searcher, not to {reward.rule}; "
            "set it to 0",
        ),
        (
            not 0 <= reward.stage_one_steps <= rl.steps,
            f"reward.stage_one_steps={reward.stage_one_steps} must lie between 0 and "
            f"rl.steps={rl.steps}",
        ),
        (
            config.learner.row_tokens < config.policy.generator.max_tokens,
            f"config.learner.row_tokens={config.learner.row_tokens} cannot hold an episode of "
            f"config.policy.generator.max_tokens={config.policy.generator.max_tokens}; raise it",
        ),
        (
            alone and advantage.estimator == "rloo",
            "advantage.estimator=rloo compares an episode with the others of its group; raise "
            "rollout.group_size above 1",
        ),
        (
            alone and advantage.estimator == "reinforce" and advantage.baseline == "group_mean",
            "advantage.baseline=group_mean of a group of one leaves every advantage 0; raise "
            "rollout.group_size or take advantage.baseline=batch_mean",
        ),
        (
            alone and rollout.max_rounds > 1,
            "rollout.max_rounds > 1 looks for groups whose rewards differ; raise "
            "rollout.group_size above 1",
        ),
        (
            loss.surrogate == "sequence" and loss.aggregate != "sequence_mean",
            "loss.surrogate=sequence (GSPO) gives a sequence one ratio and one loss; take "
            "loss.aggregate=sequence_mean",
        ),
        (
            loss.surrogate == "sequence" and advantage.estimator in BY_TOKEN,
            f"loss.surrogate=sequence needs one advantage for a sequence, advantage.estimator="
            f"{advantage.estimator} gives one for each token; take grpo, rloo or reinforce",
        ),
        (
            loss.dual_clip != 0 and loss.surrogate != "clip",
            f"loss.dual_clip belongs to loss.surrogate=clip, not to {loss.surrogate}; set it to 0",
        ),
        (
            loss.dual_clip != 0 and loss.dual_clip <= 1,
            "loss.dual_clip must be above 1, or 0 to leave it out: at 1 it would cut every loss",
        ),
        (
            kl.apply_to == "loss" and kl.estimator == "k1" and kl.coef != 0,
            "kl.estimator=k1 in the loss pulls nowhere: its gradient is 0 in expectation; "
            "take k2 or k3, or kl.apply_to=reward",
        ),
        (
            kl.target < 0 or (kl.target > 0 and not (kl.apply_to == "reward" and kl.coef > 0)),
            "kl.target steers the weight of a KL in the reward; set kl.apply_to=reward and "
            "kl.coef and kl.target above 0, or kl.target=0",
        ),
        (
            kl.target != 0 and 5 * kl.horizon <= episodes,
            f"kl.horizon={kl.horizon} could turn the KL's weight negative in one step; "
            f"take more than a fifth of a step's {episodes} episodes",
        ),
        (
            loss.aggregate == "fixed_length" and loss.fixed_tokens < 1,
            "loss.aggregate=fixed_length divides by loss.fixed_tokens; set it, say to the most "
            "tokens that a policy may write in an episode",
        ),
        (
            loss.importance_cap != 0 and rl.old_logprobs != "learner",
            "loss.importance_cap weighs the learner's log-probs against the sampler's; set "
            "rl.old_logprobs=learner",
        ),
        (
            not rl.document_mask and rl.old_logprobs != "learner",
            "rl.document_mask=False trains on tokens that no policy sampled; only the learner can "
            "say how likely they were: set rl.old_logprobs=learner",
        ),
        (
            loss.llds != 0 and updates == 1,
            "loss.llds compares with the log-probs before a step's first update, so with one "
            "update a step it is always 0; raise rl.minibatches or rl.epochs",
        ),
        (
            rl.epochs < 1 or not 1 <= rl.minibatches <= episodes,
            f"rl.epochs={rl.epochs} and rl.minibatches={rl.minibatches} must be at least 1, the "
            f"latter at most the {episodes} episodes of a step",
        ),
        (
            config.lora.rank > 0 and advantage.estimator == "ppo" and config.critic.trunk == "own",
            "critic.trunk=own trains a whole second model, which lora is there to avoid; take "
            "critic.trunk=shared",
        ),
    )
    for contradiction, reason in refused:
        if contradiction:
            raise UserError(reason)
