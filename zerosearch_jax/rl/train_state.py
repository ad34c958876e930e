"""The training state of a learner."""

from dataclasses import dataclass
from typing import Any

import jax
from flax import nnx


@dataclass(frozen=True)
class TrainState:
    """Trainable parameters and optimizer states.

    Attributes:
      params: "policy" holds the float32 parameters, with layers stacked on the first axis, or only
        the adapters under LoRA.
        "critic", if there is one, holds the value head and, with `critic_trunk="own"`, a model.
      opt_state: optimizer state under the same names.
      step: `[]` int32, number of optimizer updates; skipped updates do not count.
      reference: parameters of the reference policy if it moves, else None.
    """

    params: dict[str, Any]
    opt_state: dict[str, Any]
    step: jax.Array
    reference: nnx.State | None = None


jax.tree_util.register_dataclass(TrainState)
