"""Supervised fine-tuning of policies and simulators.

Each step draws examples by (seed, step), packs them and runs one jitted update. At intervals the
job computes the held-out loss and saves a checkpoint. With patience, it stops once that loss no
longer falls. The result is a Hugging Face directory that every other job can load.
"""

import hashlib
import math
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from zerosearch_jax import config_flags
from zerosearch_jax.checkpoints import Checkpoints
from zerosearch_jax.data import sft_data
from zerosearch_jax.data.embedded.scripted_agent import Segment
from zerosearch_jax.data.packing import PackedBatch, TokenSequence, pack
from zerosearch_jax.data.qa import load_qa
from zerosearch_jax.errors import Terminated, UserError
from zerosearch_jax.models.config import ModelConfig, from_hf
from zerosearch_jax.models.directory import read_model_files
from zerosearch_jax.models.transformer import init_params
from zerosearch_jax.parallel.mesh import make_mesh
from zerosearch_jax.parallel.stop_request import StopRequest
from zerosearch_jax.rl.learner import Learner
from zerosearch_jax.rl.train_state import TrainState
from zerosearch_jax.simulator.pairs import load_pairs, pair_segments
from zerosearch_jax.telemetry.profiler import Profiler
from zerosearch_jax.telemetry.progress import Progress
from zerosearch_jax.telemetry.recorder import Recorder, earlier_rows
from zerosearch_jax.text.tokenizer import load_tokenizer, train_tokenizer
from zerosearch_jax.training import factory
from zerosearch_jax.training.fingerprints import model_sha256
from zerosearch_jax.training.inputs import check_job
from zerosearch_jax.training.job_configs import SFTConfig, is_path
from zerosearch_jax.training.nonfinite import NonFiniteCounter
from zerosearch_jax.training.policy_update import combine
from zerosearch_jax.training.row_sampler import RowSampler
from zerosearch_jax.training.train_state import export, kept_step, restore_kept, resume

INPUTS = {"config.data?": str, "config.init": str, "config.lora.alpha": float}
METADATA = {"skipped_in_a_row": int, "inputs": INPUTS}
BEST_METADATA = {"heldout_loss": float, "inputs": INPUTS}
"""The shapes of the metadata of checkpoints; see `files`."""


def run(config: ConfigDict, workdir: str, profile_steps: tuple[int, ...] = ()) -> None:
    """Trains from `config.init` or from scratch and exports `workdir/model`; resumes if possible.

    Args:
      profile_steps: steps, counted from 1, whose profiler traces go to `workdir/profile`.
    """
    config = config_flags.typed(SFTConfig, config)
    workdir = Path(workdir)
    check_job(config)
    earlier_rows(workdir / "metrics.jsonl", 0)  # a damaged file is refused before any work
    tokenizer, train, validation = load_data(config)
    sampler = RowSampler(
        train, config.sft.examples_per_step, config.seed, "config.sft.examples_per_step"
    )
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    model_config, params, generation = initial_model(config, tokenizer, mesh)
    check_positions(model_config, [*train, *validation])
    learner = make_learner(config, model_config, mesh)
    checkpoints = Checkpoints(workdir / "checkpoints", METADATA)
    inputs = {"config.data": digest(train)} | start_of(config)
    kept = {"skipped_in_a_row": 0, "inputs": inputs}
    state, first, kept = resume(checkpoints, learner, learner.init(params, config.seed), kept)
    check_same_run(workdir, kept["inputs"], inputs)
    if not config.init:  # --export needs the new tokenizer before the run ends
        tokenizer.save_pretrained(workdir / "model")
    nonfinite = NonFiniteCounter(workdir, config.sft.nonfinite_limit, kept["skipped_in_a_row"])
    best = None
    if config.sft.patience:
        patience_steps = config.sft.patience * config.sft.eval_every
        best = BestCheckpoint(workdir / "best", learner, patience_steps, inputs)
    validation_batch = learner.put(batch_of(validation, config, None))
    # Enough microbatches for one example per row, so that all steps have one shape.
    microbatches = -(-config.sft.examples_per_step // config.learner.rows)
    profiler = Profiler(profile_steps, workdir / "profile")

    with (
        closing(Recorder(workdir, first_step=first + 1)) as recorder,
        closing(Progress(config.sft.steps, first)) as progress,
        StopRequest() as stop,
    ):
        for step in range(first, config.sft.steps):
            if best and best.patience_exceeded(step):
                print(f"stopped at step {step}; the held-out loss was lowest at step {best.step}")
                break
            done = step + 1
            with profiler.step(done):
                batch = batch_of(sampler.draw(step), config, microbatches)
                state, metrics = learner.sft_step(state, learner.put(batch))
                metrics = combine(
                    [{name: float(value) for name, value in metrics.items()}], [batch]
                )
                nonfinite.record(step, 0, metrics["skipped_updates"] > 0, batch)
                if done % config.sft.eval_every == 0 or done == config.sft.steps:
                    loss = float(learner.sft_loss(state, validation_batch))
                    metrics["sft/heldout_loss"] = loss
                    if best:
                        best.update(done, loss, state)
                recorder.scalars(done, metrics)
                progress.update(done, metrics)
                stopping = nonfinite.limit_reached or (best and best.patience_exceeded(done))
                last, terminated = done == config.sft.steps or stopping, stop.received
                if done % config.sft.checkpoint_every == 0 or last or terminated:
                    kept = {"skipped_in_a_row": nonfinite.in_a_row, "inputs": inputs}
                    checkpoints.save(done, state, kept)
            if nonfinite.limit_reached and done < config.sft.steps:
                nonfinite.raise_error(step)
            if terminated:
                raise Terminated
    if best:
        state = best.restore_into(state)
    export(workdir / "model", learner, state, tokenizer, config.init, generation)
    print(f"model written to {workdir / 'model'}")


def export_checkpoint(config: ConfigDict, workdir: str, which: str) -> None:
    """Exports the model of a kept checkpoint to `workdir/exports/STEP/model`.

    Args:
      which: a step, "latest", or "best": the lowest held-out loss, kept if `sft.patience` is set.

    Raises:
      UserError: there is no such checkpoint, or the run has another start or adapter scale.
    """
    config = config_flags.typed(SFTConfig, config)
    is_best, directory = which == "best", Path(workdir)
    checkpoints = directory / ("best" if is_best else "checkpoints")
    step = kept_step(checkpoints, "latest" if is_best else which)
    if config.init:
        tokenizer = read_model_files(config.init).tokenizer
    else:
        tokenizer = load_tokenizer(directory / "model")
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    model_config, params, generation = initial_model(config, tokenizer, mesh)
    learner = make_learner(config, model_config, mesh)
    if learner.lora is not None:
        learner.init(params, config.seed)  # sets the base that the adapters adapt
    state = learner.abstract_state()
    if is_best:  # these checkpoints have only parameters
        params, kept = restore_kept(checkpoints, step, state.params, BEST_METADATA)
        state = replace(state, params=params)
    else:
        state, kept = restore_kept(checkpoints, step, state, METADATA)
    check_same_run(directory, kept["inputs"], start_of(config))
    path = directory / "exports" / str(step) / "model"
    export(path, learner, state, tokenizer, config.init, generation)
    print(f"model of step {step} written to {path}")


def load_data(config: SFTConfig) -> tuple[object, list[TokenSequence], list[TokenSequence]]:
    """Loads the tokenizer and the training and held-out sequences.

    The tokenizer is that of `config.init`, or trained on the examples if that is empty. Held-out
    sequences come from `config.data.validation` or, if that is empty, are the last training
    examples.

    Raises:
      UserError: the files of `config.init` contradict each other, or its tokenizer lacks the
        end-of-text token that `config.data.end_of_text` writes; or, without a validation file, the
        training or the held-out part would be empty.
    """
    tokenizer = read_model_files(config.init).tokenizer if config.init else None
    if tokenizer is not None and config.data.end_of_text and tokenizer.eos_token_id is None:
        raise UserError(
            f"{config.init}: the tokenizer has no eos_token, which config.data.end_of_text=True "
            "writes; set it in tokenizer_config.json"
        )
    examples = load_examples(config)
    if tokenizer is None:
        texts = (segment.text for example in examples for segment in example)
        with tempfile.TemporaryDirectory() as directory:  # the run's end writes it to the workdir
            tokenizer = train_tokenizer(texts, config.vocab_size, directory)
    sequences = fitting_sequences(examples, tokenizer, config)
    if config.data.validation:
        held_out = pair_segments(load_pairs(config.data.validation), config.data.topk)
        return tokenizer, sequences, fitting_sequences(held_out, tokenizer, config)
    count = config.data.validation_examples
    if count >= len(sequences):
        raise UserError(
            f"config.data.validation_examples={count} must be below the number of examples, "
            f"{len(sequences)}"
        )
    return tokenizer, sequences[:-count], sequences[-count:]


def start_of(config: SFTConfig) -> dict[str, Any]:
    """Returns the inputs that a checkpoint is restored on, for `check_same_run`."""
    return {
        "config.init": model_sha256(config.init) if config.init else "",
        "config.lora.alpha": config.lora.alpha if config.lora.rank else 0.0,
    }


def check_same_run(workdir: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises UserError if the run in `workdir` had other examples, base model or adapter scale.

    Adapters of another base model or scale have the same shapes, so nothing else would notice.

    Args:
      before: the run's inputs by config key: a fingerprint of the content, or the value.
      now: the inputs of this call.
    """
    for key, value in now.items():
        if before[key] != value:
            raise UserError(
                f"{workdir} was trained with another value or content of {key}; give another "
                "--workdir, or remove it to start over"
            )


def digest(sequences: Sequence[TokenSequence]) -> str:
    """Returns a hash of all tokens and their weights, in order; it identifies a training set."""
    blake2b = hashlib.blake2b(digest_size=16)
    for sequence in sequences:
        blake2b.update(np.array([sequence.tokens, sequence.mask], np.float64).tobytes())
    return blake2b.hexdigest()


class BestCheckpoint:
    """Parameters with the lowest held-out loss so far, stored in `directory`.

    A better checkpoint is written at once, so it may be ahead of the checkpoint from which a killed
    run resumes. The repeated steps do not change it.

    Args:
      patience_steps: steps without a lower loss after which training should stop.
      inputs: the run's inputs, see `check_same_run`; saved with the parameters.

    Attributes:
      step: step of the lowest loss; 0 before the first evaluation.
      loss: the lowest loss; infinity before the first evaluation.
    """

    def __init__(
        self, directory: Path, learner: Learner, patience_steps: int, inputs: Mapping[str, Any]
    ):
        self._inputs = inputs
        self._checkpoints = Checkpoints(directory, BEST_METADATA)
        self._patience_steps = patience_steps
        self._abstract_params = learner.abstract_state().params
        self.step = self._checkpoints.latest_step() or 0
        self.loss = math.inf
        if self.step:
            _, kept = self._checkpoints.restore(self.step, self._abstract_params)
            self.loss = kept["heldout_loss"]

    def update(self, step: int, loss: float, state: TrainState) -> None:
        """Saves the state's parameters if their loss is lower."""
        if step > self.step and loss < self.loss:
            kept = {"heldout_loss": loss, "inputs": self._inputs}
            self._checkpoints.save(step, state.params, kept)
            self.step, self.loss = step, loss

    def patience_exceeded(self, step: int) -> bool:
        """Whether the lowest loss is at least `patience_steps` steps old."""
        return step - self.step >= self._patience_steps

    def restore_into(self, state: TrainState) -> TrainState:
        """Returns `state` with the best parameters."""
        params, _ = self._checkpoints.restore(self.step, self._abstract_params)
        return replace(state, params=params)


def load_examples(config: SFTConfig) -> list[list[Segment]]:
    """Loads the examples that `config.data.examples` names: a kind, or a file of pairs."""
    if is_path(config.data.examples):
        return pair_segments(load_pairs(config.data.examples), config.data.topk)
    if config.data.examples == "answers":
        return sft_data.answer_examples(load_qa(config.data.source, config.data.split))
    return sft_data.policy_transcripts(
        worlds=config.data.worlds,
        entities_per_world=config.data.entities_per_world,
        questions_per_world=config.data.questions_per_world,
        behaviours=config.data.behaviours,
        topk=config.data.topk,
        seed=config.seed,
    )


def fitting_sequences(
    examples: list[list[Segment]], tokenizer, config: SFTConfig
) -> list[TokenSequence]:
    """Tokenises the examples and drops those too long for a row.

    Raises:
      UserError: no example fits.
    """
    sequences = [
        sft_data.tokenise(
            example,
            tokenizer,
            # The simulated engine sends an empty system turn; policies have none.
            system="" if is_path(config.data.examples) else None,
            inserted_weight=config.data.inserted_weight,
            end_of_text=config.data.end_of_text,
        )
        for example in examples
    ]
    fitting = [s for s in sequences if len(s.tokens) <= config.learner.row_tokens]
    print(f"{len(fitting)} examples; {len(sequences) - len(fitting)} too long for a row dropped")
    if not fitting:
        raise UserError(
            f"no example fits config.learner.row_tokens={config.learner.row_tokens}; raise it"
        )
    return fitting


def initial_model(
    config: SFTConfig, tokenizer, mesh: jax.sharding.Mesh
) -> tuple[ModelConfig, nnx.State, Mapping[str, Any]]:
    """Returns the model of `config.init`, or one with random parameters if that is empty.

    Returns:
      Sizes, parameters, and the content of the export's `generation_config.json`.
    """
    if config.init:
        model = factory.load_model(config.init, mesh, "float32")
        return model.config, model.params, model.generation
    model_config = from_hf(config.model | {"vocab_size": len(tokenizer)})
    generation = {"eos_token_id": tokenizer.eos_token_id}
    return model_config, init_params(model_config, config.seed), generation


def make_learner(config: SFTConfig, model_config: ModelConfig, mesh: jax.sharding.Mesh) -> Learner:
    """Builds the learner of a model with the sizes `model_config`."""
    return factory.make_learner(
        model_config,
        mesh,
        config.optimizer,
        config.learner,
        steps=config.sft.steps,
        lora=config.lora,
    )


def check_positions(config: ModelConfig, sequences: Sequence[TokenSequence]) -> None:
    """Raises UserError if a sequence is longer than the model's positions."""
    longest = max(len(sequence.tokens) for sequence in sequences)
    if longest > config.max_positions:
        raise UserError(
            f"the longest example has {longest} tokens, but the model has {config.max_positions} "
            f"positions (max_position_embeddings); set config.learner.row_tokens to "
            f"{config.max_positions} or less, which drops longer examples"
        )


def batch_of(
    sequences: list[TokenSequence], config: SFTConfig, microbatches: int | None
) -> PackedBatch:
    """Packs sequences into microbatches; `microbatches=None` takes as many as are needed."""
    return pack(
        sequences,
        row_tokens=config.learner.row_tokens,
        rows=config.learner.rows,
        microbatches=microbatches,
    )
