"""Resumes a training state from its newest checkpoint, and exports its policy."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from zerosearch_jax.checkpoints import Checkpoints
from zerosearch_jax.errors import named_disk_errors
from zerosearch_jax.models.lora import save_adapters
from zerosearch_jax.models.weights import save_params
from zerosearch_jax.rl.learner import Learner, TrainState


def resume(
    checkpoints: Checkpoints, learner: Learner, state: TrainState, metadata: Mapping[str, Any]
) -> tuple[TrainState, int, Mapping[str, Any]]:
    """Restores the newest undamaged checkpoint, if there is a checkpoint.

    Args:
      state, metadata: returned unchanged without a checkpoint.

    Returns:
      The state, the number of finished steps, and the checkpoint's metadata.
    """
    if checkpoints.latest_step() is None:
        return state, 0, metadata
    state, metadata = checkpoints.restore(None, learner.abstract_state())
    first = checkpoints.latest_step()  # a damaged checkpoint was renamed
    print(f"resuming after step {first}")
    return state, first, metadata


def export(
    directory: Path, learner: Learner, state: TrainState, tokenizer, base_model: str
) -> nnx.State:
    """Writes the policy as a model directory, with any adapters merged; returns its parameters.

    Under LoRA the adapters go to the directory `adapters` next to it.

    Args:
      base_model: name or path of the model that the adapters adapt.
    """
    if learner.lora is not None:
        adapters, folder = state.params["policy"], directory.parent / "adapters"
        save_adapters(folder, adapters, learner.lora, learner.config, base_model)
    params = learner.policy(state)
    save_params(directory, params, learner.config, eos_token_id=tokenizer.eos_token_id)
    if jax.process_index() == 0:
        with named_disk_errors(directory):
            tokenizer.save_pretrained(directory)
    return params
