"""Resumes a training state from its newest checkpoint, and exports policies."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from zerosearch_jax.checkpoints import Checkpoints
from zerosearch_jax.errors import UserError, named_disk_errors
from zerosearch_jax.models.lora import save_adapters
from zerosearch_jax.models.weights import save_params
from zerosearch_jax.rl.learner import Learner
from zerosearch_jax.rl.train_state import TrainState


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


def kept_step(directory: Path, which: str) -> int:
    """Returns the step of a kept checkpoint.

    Args:
      directory: the checkpoints of a run, which may be in progress.
      which: a step, "latest", or "best": the first step with the highest `eval/em`. `main` has
        checked it.

    Raises:
      UserError: there is no such checkpoint.
    """
    if not directory.is_dir():
        raise UserError(
            f"there is no directory {directory}; first run the same command without --export"
        )
    if which.isdecimal():
        return int(which)
    with Checkpoints(directory, read_only=True) as checkpoints:
        step = checkpoints.best_step() if which == "best" else checkpoints.latest_step()
    if step is None:
        raise UserError(
            f"--export={which}: {directory} has no such checkpoint yet; let the run continue"
        )
    return step


def restore_kept(
    directory: Path, step: int, abstract: Any, metadata: Mapping[str, Any]
) -> tuple[Any, Mapping[str, Any]]:
    """Returns the state and metadata of a checkpoint without changing its directory.

    Args:
      metadata: shape of the metadata.

    Raises as `Checkpoints.restore`.
    """
    with Checkpoints(directory, metadata, read_only=True) as checkpoints:
        return checkpoints.restore(step, abstract)


def roll_back(checkpoints: Checkpoints, learner: Learner) -> TrainState:
    """Restores the state with the best score, or the newest one if none has a score."""
    step = checkpoints.best_step()
    state, _ = checkpoints.restore(step, learner.abstract_state())
    step = checkpoints.latest_step() if step is None else step  # a damaged one was renamed
    print(f"rolled back to the checkpoint of step {step}", flush=True)
    return state


def export(
    directory: Path,
    learner: Learner,
    state: TrainState,
    tokenizer,
    base_model: str,
    generation: Mapping[str, Any],
) -> nnx.State:
    """Writes the policy as a model directory, with any adapters merged; returns its parameters.

    Under LoRA the adapters go to the directory `adapters` next to it.

    Args:
      base_model: name or path of the model that the adapters adapt.
      generation: content of `generation_config.json`, see `models.generation_config`.
    """
    if learner.lora is not None:
        adapters, folder = state.params["policy"], directory.parent / "adapters"
        save_adapters(folder, adapters, learner.lora, learner.config, base_model)
    params = learner.policy(state)
    save_params(directory, params, learner.config, generation=generation)
    if jax.process_index() == 0:
        with named_disk_errors(directory):
            tokenizer.save_pretrained(directory)
    return params
