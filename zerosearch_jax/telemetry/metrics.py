"""Glossary of all metrics that a run may write: name → definition and unit.

The recorder refuses names that are not listed here. "Policy tokens" are tokens that the policy
sampled; prompts and documents never count.
"""

EPISODE_METRICS: dict[str, str] = {
    "em": "share of episodes whose last answer equals a gold answer after normalisation, 0–1",
    "f1": "mean token F1 of the last answer against the best-matching gold answer, 0–1",
    "cover_em": "share of episodes whose last answer contains a gold answer, 0–1",
    "searches_per_episode": "mean number of searches per episode",
    "finish_ratio": "share of episodes that ended with an answer, 0–1",
    "invalid_ratio": "share of policy turns without a valid action, 0–1",
    "truncated_ratio": (
        "share of truncated episodes: the last turn was cut or an observation did not fit, 0–1"
    ),
    "failed_search_ratio": (
        "share of searches that failed after their retries, or whose query was too long for the "
        "engine, 0–1"
    ),
    "policy_tokens_per_episode": "mean number of policy tokens per episode",
    "tokens_per_episode": "mean number of tokens per episode, including prompt and documents",
}

FAILURE_METRICS: dict[str, str] = {
    "failed_searches/timeout": "searches without a complete reply within the deadline",
    "failed_searches/connection": "searches whose connection failed, or whose reply is not HTTP",
    "failed_searches/http_3xx": "searches that were redirected; redirects are not followed",
    "failed_searches/http_4xx": "searches refused with an HTTP status 4xx other than 429",
    "failed_searches/http_429": "searches refused with HTTP 429, too many requests",
    "failed_searches/http_5xx": "searches whose server failed with an HTTP status 5xx",
    "failed_searches/too_large": "searches whose reply had too many bytes or values",
    "failed_searches/not_json": "searches whose reply could not be decompressed or is not JSON",
    "failed_searches/wrong_shape": "searches whose JSON reply is not in the server's format",
    "failed_searches/too_long": "searches whose query was too long for the engine",
    "failed_searches/other": "searches that failed for another reason",
}

RL_METRICS: dict[str, str] = {
    "reward": "mean reward of the step's episodes under the configured reward function",
    "p_noisy": "probability that the curriculum makes a search of this step noisy, 0–1",
    "noisy_ratio": (
        "share of this step's searches that the curriculum drew as noisy, 0–1; only the engine "
        "`simulated` reads the draw"
    ),
    "zero_variance_groups": (
        "share of groups whose episodes all got the same reward, 0–1; under GRPO and RLOO they "
        "give no policy gradient; always 1 for groups of one episode"
    ),
    "sampling_rounds": "rounds of questions that the step sampled (dynamic sampling)",
    "kl": (
        "mean over policy tokens of the estimate of KL(policy ‖ reference) by `kl.estimator`, "
        "nats; written only if the KL coefficient is not 0"
    ),
    "kl_coef": "weight of the KL term in the loss or in the reward",
    "entropy": "mean entropy of the policy at policy tokens, at the sampling temperature, nats",
    "clip_fraction": "share of policy tokens whose probability ratio was clipped, 0–1",
    "importance_capped": (
        "share of policy tokens whose sampler–learner importance weight was capped, 0–1; written "
        "only with `loss.importance_cap`"
    ),
    "grad_norm": "global norm of the policy's gradient before clipping",
    "learning_rate": "the policy's learning rate at this step",
    "skipped_updates": "updates of this step skipped because the loss or gradient was not finite",
    "loss/total": "loss that the optimizer minimises: the sum of RL terms, or SFT's cross-entropy",
    "loss/policy": "surrogate term of the loss",
    "loss/llds": "likelihood-preserving term before its weight; written only with `loss.llds`",
    "sampler_logprob_diff_mean": (
        "mean over policy tokens of |log p sampler − log p learner| before the first update, nats"
    ),
    "sampler_logprob_diff_max": (
        "maximum over policy tokens of |log p sampler − log p learner| before the first update, "
        "nats"
    ),
    "correct_loglik": (
        "mean log-probability of a policy token in correct episodes (em = 1), nats; a fall while "
        "the reward rises is the first sign of a collapse; not written without correct episodes"
    ),
}

CRITIC_METRICS: dict[str, str] = {
    "loss/value": "value term of the loss before its weight",
    "critic/value": "mean over policy tokens of the critic's value, in units of reward",
    "critic/clip_fraction": "share of policy tokens whose new value was clipped, 0–1",
    "critic/grad_norm": "global norm of the critic's gradient before clipping",
    "critic/learning_rate": "the critic's learning rate at this step",
}

COLLAPSE_METRICS: dict[str, str] = {
    "collapse/correct_loglik_falls": (
        "1 if correct episodes became less likely although the reward held, else 0; "
        "telemetry/collapse.py defines windows and thresholds"
    ),
    "collapse/entropy_accelerates": "1 if the entropy rises at a growing rate, else 0",
    "collapse/grad_norm_surges": "1 if the gradient norm is a multiple of its past level, else 0",
    "collapse/reward_drops": "1 if the reward fell far below its best window, else 0",
    "rollbacks": "number of rollbacks to the best checkpoint so far, this step included",
    "collapse/signals": (
        "number of collapse signals that hold, 0–4; two or more, one of them new, give a warning"
    ),
}

SFT_METRICS: dict[str, str] = {
    "sft/heldout_loss": "mean cross-entropy per target token on held-out examples, nats",
}

SPEED_METRICS: dict[str, str] = {
    "host_share": "share of the step in which the devices waited for the host, 0–1; a lower bound",
    "tokens_per_sec": "policy tokens of the step's episodes per second of the whole step",
    "seconds/weights": "time to move the policy's weights to its generator, seconds",
    "weights_bytes": "weights of one process's generator, summed over its devices, bytes",
    "seconds/rollout": "time to generate the step's episodes, without `seconds/search`, seconds",
    "seconds/search": "time in which only the search engine works, seconds",
    "seconds/learner": "time of the learner's update, including a first compilation, seconds",
    "seconds/eval": "time of evaluation, seconds",
    "seconds/checkpoint": "time to save the checkpoint of the previous step, seconds",
    "seconds/step": "time of the whole step, seconds",
}

METRICS: dict[str, str] = {
    **EPISODE_METRICS,
    **{f"eval/{name}": f"at evaluation: {text}" for name, text in EPISODE_METRICS.items()},
    **FAILURE_METRICS,
    **{f"eval/{name}": f"at evaluation: {text}" for name, text in FAILURE_METRICS.items()},
    **RL_METRICS,
    **CRITIC_METRICS,
    **COLLAPSE_METRICS,
    **SFT_METRICS,
    **SPEED_METRICS,
}
