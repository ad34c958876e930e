"""Settings of the RL update: optimizer, policy loss, KL penalty, advantages and critic.

Each class is one section of an rl config. The module imports no jax, so that a config is checked
before jax is imported. Its checks raise UserError with the name of the key.
"""

from dataclasses import dataclass
from typing import Annotated

from zerosearch_jax.errors import UserError
from zerosearch_jax.ranges import (
    Choice,
    Count,
    CountOrZero,
    DecayRate,
    LearningRate,
    NonNegativeFloat,
    PositiveFloat,
    Share,
)

Dtype = Annotated[str, Choice("float32", "bfloat16")]
SURROGATES = ("clip", "sequence", "cispo")
# The next two repeat names of `rl.losses`, which imports jax; a test compares them.
AGGREGATES = ("token_mean", "sequence_mean", "fixed_length")
KL_ESTIMATORS = ("k1", "k2", "k3")
KL_PLACES = ("loss", "reward")
ESTIMATORS = ("grpo", "rloo", "reinforce", "reinforce_pp", "ppo")
BY_TOKEN = ("reinforce_pp", "ppo")
"""Estimators with one advantage per token. All other estimators have one per sequence."""
BASELINES = ("none", "batch_mean", "group_mean")
TRUNKS = ("own", "shared")


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW hyperparameters, shared with a critic except for its learning rate and warm-up."""

    learning_rate: LearningRate = 5e-4
    """Peak learning rate."""
    warmup_steps: CountOrZero = 2
    """Training steps of linear warm-up. 0 disables it."""
    schedule_steps: CountOrZero = 0
    """Training steps, warm-up included, after which the learning rate stays at its final value. 0
    uses the steps of the run; if they are raised later, the schedule stretches."""
    final_fraction: Share = 0.05
    """Final learning rate as a fraction of the peak. 1 keeps the rate constant after the
    warm-up."""
    beta1: DecayRate = 0.9
    """Decay rate of the first moment."""
    beta2: DecayRate = 0.99
    """Decay rate of the second moment."""
    weight_decay: NonNegativeFloat = 0.01
    """Decoupled weight decay. Norms and biases are not decayed."""
    clip_norm: PositiveFloat = 1.0
    """Global norm to which gradients are clipped."""
    moment_dtype: Dtype = "float32"
    """Dtype of the first moment: `float32` or `bfloat16`, which saves 2 bytes per parameter."""


@dataclass(frozen=True)
class LossConfig:
    """Policy loss: the surrogate, its aggregation over tokens, and extra terms."""

    surrogate: Annotated[str, Choice(*SURROGATES)] = "clip"
    """`clip` (PPO, GRPO), `sequence` (GSPO: one ratio per sequence) or `cispo`."""
    clip_low: Share = 0.2
    """The ratio is clipped below 1 - clip_low."""
    clip_high: NonNegativeFloat = 0.2
    """The ratio is clipped above 1 + clip_high. DAPO's clip-higher sets it above `clip_low`."""
    dual_clip: NonNegativeFloat = 0.0
    """Bound of a token's loss if its advantage is negative: dual_clip * |advantage|. Above 1, or 0
    to disable it."""
    aggregate: Annotated[str, Choice(*AGGREGATES)] = "token_mean"
    """Mean over an update: `token_mean` (over all tokens), `sequence_mean` (mean of the sequences'
    means) or `fixed_length` (mean of the sequences' sums / fixed_tokens)."""
    fixed_tokens: CountOrZero = 0
    """Divisor of `fixed_length` in tokens, such as the most tokens that a policy may write in an
    episode. Required by `fixed_length` alone."""
    entropy: NonNegativeFloat = 0.001
    """Weight of the entropy bonus. 0 disables it."""
    llds: NonNegativeFloat = 0.0
    """Weight of the likelihood-preserving term (arXiv 2512.04220). Requires several updates per
    step. 0 disables it."""
    importance_cap: NonNegativeFloat = 0.0
    """Largest weight of truncated importance sampling. Requires rl.old_logprobs=learner. 0 disables
    the weights."""

    def __post_init__(self):
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

    coef: NonNegativeFloat = 0.01
    """Weight of the KL. 0 disables it and skips the reference's log-probs."""
    estimator: Annotated[str, Choice(*KL_ESTIMATORS)] = "k3"
    """Estimate of KL(policy || reference) per token: `k1`, `k2` or `k3`."""
    apply_to: Annotated[str, Choice(*KL_PLACES)] = "loss"
    """`loss` adds the KL to the loss; `reward` subtracts it from the rewards."""
    target: NonNegativeFloat = 0.0
    """Desired KL of a step in nats per token, to which the weight adapts. Requires apply_to=reward.
    0 keeps the weight fixed."""
    horizon: Count = 10_000
    """Number of episodes in which an adapted weight changes by at most about 20%. Above a fifth of
    a step's episodes."""

    def __post_init__(self):
        if self.apply_to == "loss" and self.estimator == "k1" and self.coef:
            raise UserError(
                "kl.estimator=k1 has no effect in the loss, because its expected gradient is 0; "
                "set kl.estimator to k2 or k3, or kl.apply_to=reward"
            )
        adaptable = self.apply_to == "reward" and self.coef > 0
        if self.target and not adaptable:
            raise UserError(
                f"kl.target={self.target} adapts the weight of a KL in the reward; set "
                "kl.apply_to=reward and kl.coef and kl.target above 0, or kl.target=0"
            )


@dataclass(frozen=True)
class AdvantageConfig:
    """Advantage estimation from rewards."""

    estimator: Annotated[str, Choice(*ESTIMATORS)] = "grpo"
    """`grpo`, `rloo`, `reinforce` (reads `baseline`), `reinforce_pp` (whitened returns per token)
    or `ppo` (whitened GAE per token, with a critic)."""
    baseline: Annotated[str, Choice(*BASELINES)] = "group_mean"
    """Baseline of `reinforce`: `none`, `batch_mean` or `group_mean`."""
    normalize_std: bool = True
    """Whether `grpo` divides by the group's standard deviation. False is Dr. GRPO."""
    gamma: Share = 1.0
    """Discount per policy token. Read by `reinforce_pp` and `ppo`."""
    gae_lambda: Share = 1.0
    """λ of generalized advantage estimation. Read by `ppo`."""


@dataclass(frozen=True)
class CriticConfig:
    """Critic, which only `advantage.estimator=ppo` trains."""

    trunk: Annotated[str, Choice(*TRUNKS)] = "own"
    """`own` trains a second model. `shared` adds a value head to the policy, so that the value loss
    also trains the policy's parameters."""
    learning_rate: LearningRate = 5e-4
    """Peak learning rate of the critic."""
    warmup_steps: CountOrZero = 2
    """Training steps of linear warm-up."""
    coef: NonNegativeFloat = 0.5
    """Weight of the value loss."""
    value_clip: NonNegativeFloat = 0.2
    """Change of a value within a step, in units of reward, beyond which its loss is clipped. 0
    disables the clip."""
