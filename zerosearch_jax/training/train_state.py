"""Resumes a training state from its newest checkpoint, and exports its policy."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from zerosearch_jax.checkpoints import Checkpoints
from zerosearch_jax.models.lora import save_adapters
from zerosearch_jax.models.weights import save_params
from zerosearch_jax.rl.learner import Learner
from zerosearch_jax.rl.train_state import TrainState


def resume(
    checkpoints: Checkpoints, learner: Learner, state: TrainState, metadata: Mapping[str, Any]
) -> tuple[TrainState, int, Mapping[str, Any]]:
    """Restores the newest checkpoint, if there is one.

    Args:
      state, metadata: returned unchanged without a checkpoint.

    Returns:
      The state, the number of finished steps, and the checkpoint's metadata.
    """
    first = checkpoints.latest_step() or 0
    if first:
        state, metadata = checkpoints.restore(first, learner.abstract_state())
        print(f"resuming after step {first}")
    return state, first, metadata


def roll_back(checkpoints: Checkpoints, learner: Learner) -> TrainState:
    """Restores the state with the best score, or the newest one if none has a score."""
    best = checkpoints.best_step()
    state, _ = checkpoints.restore(best, learner.abstract_state())
    print(f"rolled back to the checkpoint of step {best}", flush=True)
    return state


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
        tokenizer.save_pretrained(directory)
    return params
