"""Settings of the RL update: policy loss, KL penalty, advantages and critic.

Each class is one section of an rl config. Its checks raise UserError and name the section's key.
"""

from dataclasses import dataclass

from zerosearch_jax.errors import UserError
from zerosearch_jax.rl.losses import AGGREGATES, KL_ESTIMATORS

SURROGATES = ("clip", "sequence", "cispo")
KL_PLACES = ("loss", "reward")
ESTIMATORS = ("grpo", "rloo", "reinforce", "reinforce_pp", "ppo")
BY_TOKEN = ("reinforce_pp", "ppo")
"""Estimators that give each token its own advantage; the others give one per sequence."""
BASELINES = ("none", "batch_mean", "group_mean")
TRUNKS = ("own", "shared")


def check_choice(key: str, value: str, known: tuple[str, ...]) -> None:
    """Raises UserError if `value` is not one of `known`."""
    if value not in known:
        raise UserError(f"{key} is {value!r}; choose one of {', '.join(known)}")


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
    """With a negative advantage, the loss is at most dual_clip * |advantage|. 0 disables it."""
    aggregate: str = "token_mean"
    """Mean over the batch: `token_mean`, `sequence_mean` or `fixed_length`."""
    fixed_tokens: int = 0
    """Tokens by which `fixed_length` divides each sequence's sum."""
    entropy: float = 0.001
    """Weight of the entropy bonus."""
    llds: float = 0.0
    """Weight of the likelihood-preserving term (arXiv 2512.04220). 0 disables it."""
    importance_cap: float = 0.0
    """Largest weight of truncated importance sampling. 0 disables the weights."""

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
                f"loss.dual_clip={self.dual_clip} would clip every loss; set it above 1, or to 0 "
                "to disable it"
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
    """Weight of the KL. 0 disables it, and the reference's log-probs are not computed."""
    estimator: str = "k3"
    """Estimate of KL(policy || reference) per token: `k1`, `k2` or `k3`."""
    apply_to: str = "loss"
    """`loss` adds the KL to the loss; `reward` subtracts it from the rewards."""
    target: float = 0.0
    """Adapt `coef` to keep the KL of a step near this many nats per token. 0 keeps it fixed."""
    horizon: int = 10_000
    """Episodes within which an adapted coefficient changes by at most about 20%."""

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
    """`grpo`, `rloo`, `reinforce` (reads `baseline`), `reinforce_pp` (whitened returns of each
    token) or `ppo` (whitened GAE of each token, with a critic)."""
    baseline: str = "group_mean"
    """Baseline of `reinforce`: `none`, `batch_mean` or `group_mean`."""
    normalize_std: bool = True
    """`grpo` divides by the group's standard deviation. False is Dr. GRPO."""
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
    """`own` trains a second model; `shared` trains a value head on the policy's hidden states."""
    learning_rate: float = 5e-4
    """Peak learning rate of the critic."""
    warmup_steps: int = 2
    """Training steps of linear warm-up."""
    coef: float = 0.5
    """Weight of the value loss."""
    value_clip: float = 0.2
    """Largest change of a value per step before its loss is clipped. 0 disables the clip."""

    def __post_init__(self):
        check_choice("critic.trunk", self.trunk, TRUNKS)
