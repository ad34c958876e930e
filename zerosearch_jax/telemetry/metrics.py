"""The glossary: every figure that a run may write, with what exactly it is and its unit.

The recorder refuses a name that is not here, so a curve without a meaning cannot be drawn.
"Policy tokens" are those that the policy sampled; prompts and documents never count.
"""

EPISODE_METRICS: dict[str, str] = {
    "em": "share of episodes whose last answer equals a golden answer after normalisation, 0–1",
    "f1": "mean token F1 of the last answer against the best golden answer, 0–1",
    "cover_em": "share of episodes whose last answer contains a golden answer, 0–1",
    "searches_per_episode": "mean number of searches an episode made",
    "finish_ratio": "share of episodes that ended with an answer, 0–1",
    "invalid_ratio": "share of policy turns without a valid action, 0–1",
    "truncated_ratio": "share of episodes that ended because an observation did not fit, 0–1",
    "failed_search_ratio": "share of searches that failed after their retries, 0–1",
    "policy_tokens_per_episode": "mean number of policy tokens of an episode",
    "tokens_per_episode": "mean number of tokens of an episode, prompt and documents included",
}

RL_METRICS: dict[str, str] = {
    "reward": "mean reward of the step's episodes, as the config's reward function gives it",
    "p_noisy": "probability that the curriculum makes a search of this step noisy, 0–1",
    "noisy_ratio": "share of this step's searches that were noisy, 0–1",
    "zero_variance_groups": (
        "share of groups whose episodes all got one reward: no signal; always 1 of single "
        "episodes, 0–1"
    ),
    "sampling_rounds": "rounds of questions that the step played (dynamic sampling)",
    "kl": (
        "mean over policy tokens of the estimate of KL(policy ‖ reference), k3 unless the config "
        "says otherwise, nats; not written where its coefficient is 0"
    ),
    "kl_coef": "weight of the KL term in the loss or in the reward",
    "entropy": "mean entropy of the policy at its tokens, at the sampling temperature, nats",
    "clip_fraction": "share of policy tokens whose probability ratio was clipped, 0–1",
    "importance_capped": (
        "share of policy tokens whose sampler–learner importance weight was cut to its cap, 0–1; "
        "only with importance_cap"
    ),
    "grad_norm": "global norm of the gradient before clipping",
    "learning_rate": "the policy's learning rate at this step",
    "skipped_updates": "updates of this step skipped because loss or gradient was not finite",
    "loss/total": "what the optimizer minimises: the RL terms, or SFT's cross-entropy",
    "loss/policy": "the surrogate's term of the loss",
    "loss/llds": "likelihood-preserving term before its weight; only with llds",
    "sampler_logprob_diff_mean": (
        "mean over policy tokens of |log p sampler − log p learner| before the first update, nats"
    ),
    "sampler_logprob_diff_max": "largest such difference, nats",
    "correct_loglik": (
        "mean log-probability of a policy token in correct episodes (em = 1), nats; its fall "
        "while reward rises is the first sign of a collapse; not written without such an episode"
    ),
}

CRITIC_METRICS: dict[str, str] = {
    "loss/value": "the critic's term of the loss before its weight",
    "critic/value": "mean over policy tokens of the critic's value, in units of reward",
    "critic/clip_fraction": "share of policy tokens whose new value was clipped, 0–1",
    "critic/grad_norm": "global norm of the critic's gradient before clipping",
    "critic/learning_rate": "the critic's learning rate at this step",
}

COLLAPSE_METRICS: dict[str, str] = {
    "collapse/correct_loglik_falls": (
        "1 when correct episodes became less likely although the reward held; windows and "
        "thresholds of this and the next: telemetry/collapse.py"
    ),
    "collapse/entropy_accelerates": "1 when the entropy rises faster and faster",
    "collapse/grad_norm_surges": "1 when the gradient's norm has grown to a multiple",
    "collapse/reward_drops": "1 when the reward fell far below its best",
    "collapse/signals": "how many of the four hold; an alarm is logged at two",
}

SFT_METRICS: dict[str, str] = {
    "sft/heldout_loss": "mean cross-entropy of a target token of the held-out examples, nats",
}

SPEED_METRICS: dict[str, str] = {
    "host_share": "share of the step in which the devices had no work and waited for the host, 0–1",
    "tokens_per_sec": "policy tokens of the step's episodes per second of the whole step",
    "seconds/weights": "seconds of moving the policy's weights to its generator",
    "weights_bytes": "bytes of the weights that a process's generator is given, over its devices",
    "seconds/rollout": "seconds of generating the step's episodes, searches not included",
    "seconds/search": "seconds spent waiting for the search engine",
    "seconds/learner": "seconds of the learner's update, first compilation included",
    "seconds/eval": "seconds of evaluation",
    "seconds/checkpoint": "seconds of saving the checkpoint of the step before",
    "seconds/step": "seconds of the whole step",
}

METRICS: dict[str, str] = {
    **EPISODE_METRICS,
    **{f"eval/{name}": f"at evaluation: {text}" for name, text in EPISODE_METRICS.items()},
    **RL_METRICS,
    **CRITIC_METRICS,
    **COLLAPSE_METRICS,
    **SFT_METRICS,
    **SPEED_METRICS,
}
