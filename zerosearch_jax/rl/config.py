"""Settings of the RL update: policy loss, KL penalty, advantages and critic.

Each class is one section of an rl config. Its checks raise UserError with the name of the key.
"""

from dataclasses import dataclass

from zerosearch_jax.errors import UserError, check_choice
from zerosearch_jax.rl.losses import AGGREGATES, KL_ESTIMATORS

SURROGATES = ("clip", "sequence", "cispo")
KL_PLACES = ("loss", "reward")
ESTIMATORS = ("grpo", "rloo", "reinforce", "reinforce_pp", "ppo")
BY_TOKEN = ("reinforce_pp", "ppo")
"""Estimators with one advantage per token. All other estimators have one per sequence."""
BASELINES = ("none", "batch_mean", "group_mean")
TRUNKS = ("own", "shared")


@dataclass(frozen=True)
class LossConfig:
    """Policy loss: the surrogate, its aggregation over tokens, and extra terms."""

    surrogate: str = "clip"
    """`clip` (PPO, GRPO), `sequence` (GSPO: one ratio per sequence) or `cispo`."""
    clip_low: float = 0.2
    """The ratio is clipped below 1 - clip_low."""
    clip_high: float = 0.2
    """The ratio is clipped above 1 + clip_high. DAPO's clip-higher sets it above `clip_low`."""
    dual_clip: float = 0.0
    """Bound of a token's loss if its advantage is negative: dual_clip * |advantage|. Above 1, or 0
    to disable it."""
    aggregate: str = "token_mean"
    """Mean over an update: `token_mean` (over all tokens), `sequence_mean` (mean of the sequences'
    means) or `fixed_length` (mean of the sequences' sums / fixed_tokens)."""
    fixed_tokens: int = 0
    """Divisor of `fixed_length` in tokens, such as the most tokens that a policy may write in an
    episode. Required by `fixed_length` alone."""
    entropy: float = 0.001
    """Weight of the entropy bonus. 0 disables it."""
    llds: float = 0.0
    """Weight of the likelihood-preserving term (arXiv 2512.04220). Requires several updates per
    step. 0 disables it."""
    importance_cap: float = 0.0
    """Largest weight of truncated importance sampling. Requires rl.old_logprobs=learner. 0 disables
    the weights."""

    def __post_init__(self):
        check_choice("loss.surrogate", self.surrogate, SURROGATES)
        check_choice("loss.aggregate", self.aggregate, AGGREGATES)
        if self.surrogate == "sequence" and self.aggregate != "sequence_mean":
            raise UserError(
                "loss.surrogate=sequence (GSPO) has one ratio and one loss per sequence; "
                "set loss.aggregate=sequence_mean"
            )
        if self.dual_clip and self.surrogate != "clip":
            raise UserError(
                f"loss.dual_clip={self.dual_clip} requires loss.surrogate=clip, not "
                f"{self.surrogate}; set loss.dual_clip=0"
            )
        if self.dual_clip and self.dual_clip <= 1:
            raise UserError(
                f"loss.dual_clip={self.dual_clip} would clip unchanged tokens; set it above 1, or "
                "to 0 to disable it"
            )
        if self.aggregate == "fixed_length" and self.fixed_tokens < 1:
            raise UserError(
                f"loss.aggregate=fixed_length divides by loss.fixed_tokens={self.fixed_tokens}; "
                "set it to the most tokens that a policy may write in an episode"
            )


@dataclass(frozen=True)
class KLConfig:
    """KL penalty that keeps the policy near the frozen reference policy."""

    coef: float = 0.01
    """Weight of the KL. 0 disables it and skips the reference's log-probs."""
    estimator: str = "k3"
    """Estimate of KL(policy || reference) per token: `k1`, `k2` or `k3`."""
    apply_to: str = "loss"
    """`loss` adds the KL to the loss; `reward` subtracts it from the rewards."""
    target: float = 0.0
    """Desired KL of a step in nats per token, to which the weight adapts. Requires apply_to=reward.
    0 keeps the weight fixed."""
    horizon: int = 10_000
    """Number of episodes in which an adapted weight changes by at most about 20%. Above a fifth of
    a step's episodes."""

    def __post_init__(self):
        check_choice("kl.estimator", self.estimator, tuple(KL_ESTIMATORS))
        check_choice("kl.apply_to", self.apply_to, KL_PLACES)
        if self.apply_to == "loss" and self.estimator == "k1" and self.coef:
            raise UserError(
                "kl.estimator=k1 has no effect in the loss, because its expected gradient is 0; "
                "set kl.estimator to k2 or k3, or kl.apply_to=reward"
            )
        adaptable = self.apply_to == "reward" and self.coef > 0
        if self.target < 0 or (self.target > 0 and not adaptable):
            raise UserError(
                f"kl.target={self.target} adapts the weight of a KL in the reward; set "
                "kl.apply_to=reward and kl.coef and kl.target above 0, or kl.target=0"
            )


@dataclass(frozen=True)
class AdvantageConfig:
    """Advantage estimation from rewards."""

    estimator: str = "grpo"
    """`grpo`, `rloo`, `reinforce` (reads `baseline`), `reinforce_pp` (whitened returns per token)
    or `ppo` (whitened GAE per token, with a critic)."""
    baseline: str = "group_mean"
    """Baseline of `reinforce`: `none`, `batch_mean` or `group_mean`."""
    normalize_std: bool = True
    """Whether `grpo` divides by the group's standard deviation. False is Dr. GRPO."""
    gamma: float = 1.0
    """Discount per policy token, in [0, 1]. Read by `reinforce_pp` and `ppo`."""
    gae_lambda: float = 1.0
    """λ of generalized advantage estimation, in [0, 1]. Read by `ppo`."""

    def __post_init__(self):
        check_choice("advantage.estimator", self.estimator, ESTIMATORS)
        check_choice("advantage.baseline", self.baseline, BASELINES)


@dataclass(frozen=True)
class CriticConfig:
    """Critic, which only `advantage.estimator=ppo` trains."""

    trunk: str = "own"
    """`own` trains a second model. `shared` adds a value head to the policy, so that the value loss
    also trains the policy's parameters."""
    learning_rate: float = 5e-4
    """Peak learning rate of the critic."""
    warmup_steps: int = 2
    """Training steps of linear warm-up."""
    coef: float = 0.5
    """Weight of the value loss."""
    value_clip: float = 0.2
    """Change of a value within a step, in units of reward, beyond which its loss is clipped. 0
    disables the clip."""

    def __post_init__(self):
        check_choice("critic.trunk", self.trunk, TRUNKS)
