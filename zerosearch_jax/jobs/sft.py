"""Supervised fine-tuning of policies and simulators.

The loop: draw examples keyed by (seed, step) → pack → one jitted step; validation loss and a
checkpoint now and then; with patience the run stops when that loss does not fall any more. At the
end a Hugging Face directory that every other job can load.
"""

import hashlib
import math
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from zerosearch_jax.checkpoints import Checkpoints
from zerosearch_jax.data import sft_data
from zerosearch_jax.data.embedded.scripted_agent import Behaviours, Segment
from zerosearch_jax.data.packing import TokenSequence, pack
from zerosearch_jax.data.qa import load_qa
from zerosearch_jax.errors import UserError
from zerosearch_jax.models.config import from_hf
from zerosearch_jax.models.lora import save_adapters
from zerosearch_jax.models.transformer import init_params
from zerosearch_jax.models.weights import save_params
from zerosearch_jax.parallel.mesh import make_mesh
from zerosearch_jax.rl.learner import Learner, TrainState
from zerosearch_jax.simulator.pairs import load_pairs, pair_segments
from zerosearch_jax.telemetry.progress import Progress
from zerosearch_jax.telemetry.recorder import Recorder
from zerosearch_jax.text.tokenizer import load_tokenizer, train_tokenizer
from zerosearch_jax.training import factory
from zerosearch_jax.training.nonfinite import NonFiniteCounter
from zerosearch_jax.training.policy_update import combine
from zerosearch_jax.training.row_sampler import RowSampler


def run(config: ConfigDict, workdir: str) -> None:
    """Trains from `config.init` or from scratch, exports `workdir/model`; resumes if it can."""
    workdir = Path(workdir)
    examples = load_examples(config)
    tokenizer = make_tokenizer(config, examples, workdir)
    fitting = fitting_sequences(examples, tokenizer, config)
    if config.data.validation:
        held_out = pair_segments(load_pairs(config.data.validation), config.data.topk)
        train, validation = fitting, fitting_sequences(held_out, tokenizer, config)
    else:
        train, validation = split(fitting, config.data.validation_examples)
    epochs = RowSampler(
        train, config.sft.examples_per_step, config.seed, "config.sft.examples_per_step"
    )
    mesh = make_mesh(**config.mesh)
    model_config, params = initial_model(config, tokenizer, mesh)
    learner = factory.make_learner(
        model_config, mesh, config.optimizer, config.learner, lora=config.lora
    )
    state = learner.init(params, config.seed)
    checkpoints = Checkpoints(workdir / "checkpoints")
    first = checkpoints.latest_step() or 0
    kept = {"skipped_in_a_row": 0}
    data = digest(train)
    if first:
        state, kept = checkpoints.restore(first, learner.abstract_state())
        if kept["examples"] != data:
            raise UserError(
                f"{workdir} was begun with other training examples than config.data now gives; "
                "give another --workdir, or remove it to begin anew"
            )
        print(f"resuming after step {first}")
    nonfinite = NonFiniteCounter(workdir, config.sft.nonfinite_limit, kept["skipped_in_a_row"])
    best = None
    if config.sft.patience:
        best = Best(workdir / "best", learner, config.sft.patience * config.sft.eval_every)

    validation = learner.put(batch_of(validation, config, None))
    with (
        closing(Recorder(workdir, first_step=first + 1)) as recorder,
        closing(Progress(config.sft.steps, first)) as progress,
    ):
        for step in range(first, config.sft.steps):
            if best and best.is_old(step):
                print(f"the held-out loss of step {best.step} was the lowest; stopped at {step}")
                break
            # A row for each example would fit: one shape for all steps.
            batch = batch_of(
                epochs.draw(step), config, -(-config.sft.examples_per_step // config.learner.rows)
            )
            state, metrics = learner.sft_step(state, learner.put(batch))
            done = step + 1
            figures = combine([{name: float(value) for name, value in metrics.items()}])
            nonfinite.record(step, 0, figures["skipped_updates"] > 0, batch)
            if done % config.sft.eval_every == 0 or done == config.sft.steps:
                loss = figures["sft/heldout_loss"] = float(learner.sft_loss(state, validation))
                if best:
                    best.update(done, loss, state)
            recorder.scalars(done, figures)
            progress.update(done, figures)
            last = (
                done == config.sft.steps or nonfinite.limit_reached or (best and best.is_old(done))
            )
            if done % config.sft.checkpoint_every == 0 or last:
                kept = {"skipped_in_a_row": nonfinite.in_a_row, "examples": data}
                checkpoints.save(done, state, kept)
            if nonfinite.limit_reached:
                nonfinite.raise_error(step)
    if best:
        state = best.state(state)
    if learner.lora is not None:
        save_adapters(
            workdir / "adapters", state.params["policy"], learner.lora, model_config, config.init
        )
    trained = learner.policy(state)
    save_params(workdir / "model", trained, model_config, eos_token_id=tokenizer.eos_token_id)
    tokenizer.save_pretrained(workdir / "model")
    print(f"model written to {workdir / 'model'}")


def digest(sequences: Sequence[TokenSequence]) -> str:
    """Tells training sets apart: a hash of all tokens and their weights, in order."""
    found = hashlib.blake2b(digest_size=16)
    for sequence in sequences:
        found.update(np.array([sequence.tokens, sequence.mask], np.float64).tobytes())
    return found.hexdigest()


class Best:
    """The parameters with the lowest held-out loss so far, in `directory`.

    It is written as soon as there is one, so it may be ahead of the checkpoint that a killed run
    goes on from; the steps that are then repeated do not change it.

    Attributes:
      step, loss: where and how low; 0 and infinity before the first.
    """

    def __init__(self, directory: Path, learner: Learner, patience_steps: int):
        self._checkpoints = Checkpoints(directory)
        self._patience_steps = patience_steps
        self._like = learner.abstract_state().params
        self.step = self._checkpoints.latest_step() or 0
        self.loss = math.inf
        if self.step:
            self.loss = self._checkpoints.restore(self.step, self._like)[1]["heldout_loss"]

    def update(self, step: int, loss: float, state: TrainState) -> None:
        """Keeps the state's parameters if their loss is lower."""
        if step > self.step and loss < self.loss:
            self._checkpoints.save(step, state.params, {"heldout_loss": loss})
            self.step, self.loss = step, loss

    def is_old(self, step: int) -> bool:
        """Whether there has been nothing better for so many steps that it is time to stop."""
        return step - self.step >= self._patience_steps

    def state(self, state: TrainState) -> TrainState:
        """`state` with the best parameters in the place of its own."""
        return replace(state, params=self._checkpoints.restore(self.step, self._like)[0])


def load_examples(config: ConfigDict) -> list[list[Segment]]:
    """The examples that `config.data.examples` names: a kind, or a file of pairs."""
    if is_path(config.data.examples):
        return pair_segments(load_pairs(config.data.examples), config.data.topk)
    if config.data.examples == "answers":
        return sft_data.answer_examples(load_qa(config.data.source, config.data.split))
    if config.data.examples == "policy_transcripts":
        return sft_data.policy_transcripts(
            worlds=config.data.worlds,
            entities_per_world=config.data.entities_per_world,
            questions_per_world=config.data.questions_per_world,
            behaviours=Behaviours(**config.data.behaviours),
            topk=config.data.topk,
            seed=config.seed,
        )
    raise UserError(
        f"config.data.examples is {config.data.examples!r}; choose policy_transcripts or answers, "
        "or give a .jsonl, .json or .parquet file of pairs"
    )


def is_path(examples: str) -> bool:
    """Whether `config.data.examples` is a file of pairs."""
    return Path(examples).suffix in (".jsonl", ".json", ".parquet")


def fitting_sequences(
    examples: list[list[Segment]], tokenizer, config: ConfigDict
) -> list[TokenSequence]:
    """The examples as tokens, without those that are too long for a row."""
    sequences = [
        sft_data.tokenise(
            example,
            tokenizer,
            # As the simulated engine sends it; policies have no system turn.
            system="" if is_path(config.data.examples) else None,
            inserted_weight=config.data.inserted_weight,
            end_of_text=config.data.end_of_text,
        )
        for example in examples
    ]
    fitting = [s for s in sequences if len(s.tokens) <= config.learner.row_tokens]
    print(f"{len(fitting)} examples; {len(sequences) - len(fitting)} too long for a row left out")
    if not fitting:
        raise UserError(
            f"no example fits config.learner.row_tokens={config.learner.row_tokens}; raise it"
        )
    return fitting


def make_tokenizer(config: ConfigDict, examples: list[list[Segment]], workdir: Path):
    """The tokenizer of `config.init`, or one trained on the examples when that is empty."""
    if config.init:
        return load_tokenizer(config.init)
    texts = (segment.text for example in examples for segment in example)
    return train_tokenizer(texts, config.vocab_size, workdir / "model")


def initial_model(config: ConfigDict, tokenizer, mesh: jax.sharding.Mesh):
    """Sizes and parameters to start from: those at `config.init`, or random ones when empty."""
    if config.init:
        model = factory.load_model(config.init, mesh, "float32")
        return model.config, model.params
    model_config = from_hf(dict(config.model) | {"vocab_size": len(tokenizer)})
    return model_config, init_params(model_config, config.seed)


def split(
    sequences: list[TokenSequence], validation_examples: int
) -> tuple[list[TokenSequence], list[TokenSequence]]:
    """The last examples are for validation; both parts must hold some."""
    if not 0 < validation_examples < len(sequences):
        raise UserError(
            f"config.data.validation_examples={validation_examples} does not leave both parts "
            f"something of {len(sequences)} examples"
        )
    return sequences[:-validation_examples], sequences[-validation_examples:]


def batch_of(sequences: list[TokenSequence], config: ConfigDict, microbatches: int | None):
    return pack(
        sequences,
        row_tokens=config.learner.row_tokens,
        rows=config.learner.rows,
        microbatches=microbatches,
    )
