"""The optimizer and its learning-rate schedule, built with optax."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

UNDECAYED = ("norm", "bias")


@dataclass(frozen=True)
class OptimizerSpec:
    """Optimizer of the policy or of the critic, with the learning-rate schedule it follows."""

    optimizer: optax.GradientTransformation
    schedule: optax.Schedule


def warmup_cosine(
    peak: float, *, warmup_steps: int, total_steps: int, final_fraction: float
) -> optax.Schedule:
    """Returns a linear warm-up to `peak`, then a cosine decay to `final_fraction` of it.

    Warm-up step i, from 0, has the rate peak·(i + 1) / warmup_steps. The last warm-up step and the
    first step of the cosine both have the peak. From step `total_steps` on the rate is constant.
    With `final_fraction` 1 it is constant after the warm-up.
    """
    cosine = optax.cosine_decay_schedule(
        peak, max(total_steps - warmup_steps, 1), alpha=final_fraction
    )
    if not warmup_steps:
        return cosine
    warmup = optax.linear_schedule(peak / warmup_steps, peak, warmup_steps - 1)
    return optax.join_schedules([warmup, cosine], [warmup_steps])


def adamw(
    schedule: optax.Schedule,
    *,
    beta1: float,
    beta2: float,
    weight_decay: float,
    clip_norm: float,
    moment_dtype: Any = jnp.float32,
) -> optax.GradientTransformationExtraArgs:
    """Returns global-norm clipping followed by AdamW, without decay of norms and biases.

    Its `update` takes `rate_scale`, a factor of the learning rate. 1.0 changes no bit.

    Args:
      moment_dtype: dtype of the first moment. bfloat16 saves two bytes per parameter and also
        rounds `beta1` (0.9 to 0.898). The second moment is always float32, because bfloat16 would
        lose small differences of its square root.
    """

    def decayed(params):
        return jax.tree_util.tree_map_with_path(
            lambda path, _: not any(word in jax.tree_util.keystr(path) for word in UNDECAYED),
            params,
        )

    def scaled(rate_scale: Any) -> optax.GradientTransformation:
        return optax.chain(
            optax.clip_by_global_norm(clip_norm),
            optax.adamw(
                lambda count: rate_scale * schedule(count),
                b1=beta1,
                b2=beta2,
                weight_decay=weight_decay,
                mask=decayed,
                mu_dtype=moment_dtype,
            ),
        )

    def update(grads, state, params=None, *, rate_scale=1.0, **_):
        return scaled(rate_scale).update(grads, state, params)

    return optax.GradientTransformationExtraArgs(scaled(1.0).init, update)
