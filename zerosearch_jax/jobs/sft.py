"""Supervised fine-tuning: makes the tiny base policy and the tiny simulator of the embedded world.

The loop: draw examples keyed by (seed, step) → pack → one jitted step; validation loss and a
checkpoint now and then; at the end a Hugging Face directory that every other job can load.
"""

from contextlib import closing
from pathlib import Path

import jax
from ml_collections import ConfigDict

from zerosearch_jax.checkpoints import Checkpoints
from zerosearch_jax.data import sft_data
from zerosearch_jax.data.transcripts import Habits, Segment
from zerosearch_jax.errors import UserError
from zerosearch_jax.jobs import build
from zerosearch_jax.jobs.epochs import Epochs
from zerosearch_jax.jobs.guard import NonFiniteGuard
from zerosearch_jax.jobs.improve import combine
from zerosearch_jax.models.config import from_hf
from zerosearch_jax.models.transformer import init_params
from zerosearch_jax.models.weights import save_params
from zerosearch_jax.parallel.mesh import make_mesh
from zerosearch_jax.rollout.packing import TokenSequence, pack
from zerosearch_jax.telemetry.progress import Progress
from zerosearch_jax.telemetry.recorder import Recorder
from zerosearch_jax.text.tokenizer import load_tokenizer, train_tokenizer


def run(config: ConfigDict, workdir: str) -> None:
    """Trains from `config.init` or from scratch, exports `workdir/model`; resumes if it can."""
    workdir = Path(workdir)
    examples = load_examples(config)
    tokenizer = make_tokenizer(config, examples, workdir)
    sequences = [
        sft_data.tokenise(
            example,
            tokenizer,
            # As the simulated engine sends it; policies have no system turn.
            system="" if config.data.examples == "simulator_pairs" else None,
            inserted_weight=config.data.inserted_weight,
            end_of_text=config.data.end_of_text,
        )
        for example in examples
    ]
    fitting = [s for s in sequences if len(s.tokens) <= config.learner.row_tokens]
    print(f"{len(fitting)} examples; {len(sequences) - len(fitting)} too long for a row left out")
    train, validation = split(fitting, config.data.validation_examples)
    epochs = Epochs(
        train, config.sft.examples_per_step, config.seed, "config.sft.examples_per_step"
    )
    mesh = make_mesh(**config.mesh)
    model_config, params = initial_model(config, tokenizer, mesh)
    learner = build.make_learner(
        model_config, mesh, config.optimizer, config.learner, lora=config.lora
    )
    state = learner.init(params, config.seed)
    checkpoints = Checkpoints(workdir / "checkpoints")
    first = checkpoints.latest_step() or 0
    kept = {"skipped_in_a_row": 0}
    if first:
        state, kept = checkpoints.restore(first, learner.abstract_state())
    guard = NonFiniteGuard(workdir, config.sft.nonfinite_limit, kept["skipped_in_a_row"])

    held_out = learner.put(batch_of(validation, config, None))
    with (
        closing(Recorder(workdir, first_step=first + 1)) as recorder,
        closing(Progress(config.sft.steps, first)) as progress,
    ):
        for step in range(first, config.sft.steps):
            # A row for each example would fit: one shape for all steps.
            batch = batch_of(
                epochs.draw(step), config, -(-config.sft.examples_per_step // config.learner.rows)
            )
            state, metrics = learner.sft_step(state, learner.put(batch))
            done = step + 1
            figures = combine([{name: float(value) for name, value in metrics.items()}])
            guard.saw(step, 0, figures["skipped_updates"] > 0, batch)
            if done % config.sft.eval_every == 0 or done == config.sft.steps:
                figures["sft/heldout_loss"] = float(learner.sft_loss(state, held_out))
            recorder.scalars(done, figures)
            progress.update(done, figures)
            last = done == config.sft.steps or guard.exhausted
            if done % config.sft.checkpoint_every == 0 or last:
                checkpoints.save(done, state, {"skipped_in_a_row": guard.in_a_row})
            if guard.exhausted:
                guard.stop(step)
    trained = learner.policy(state)
    save_params(workdir / "model", trained, model_config, eos_token_id=tokenizer.eos_token_id)
    tokenizer.save_pretrained(workdir / "model")
    print(f"model written to {workdir / 'model'}")


def load_examples(config: ConfigDict) -> list[list[Segment]]:
    """The examples that `config.data.examples` names."""
    sizes = dict(
        worlds=config.data.worlds,
        entities_per_world=config.data.entities_per_world,
        questions_per_world=config.data.questions_per_world,
        topk=config.data.topk,
        seed=config.seed,
    )
    if config.data.examples == "policy_transcripts":
        return sft_data.policy_transcripts(habits=Habits(**config.data.habits), **sizes)
    if config.data.examples == "simulator_pairs":
        return sft_data.simulator_examples(**sizes)
    raise UserError(
        f"config.data.examples is {config.data.examples!r}; "
        "choose policy_transcripts or simulator_pairs"
    )


def make_tokenizer(config: ConfigDict, examples: list[list[Segment]], workdir: Path):
    """The tokenizer of `config.init`, or one trained on the examples when that is empty."""
    if config.init:
        return load_tokenizer(config.init)
    texts = (segment.text for example in examples for segment in example)
    return train_tokenizer(texts, config.vocab_size, workdir / "model")


def initial_model(config: ConfigDict, tokenizer, mesh: jax.sharding.Mesh):
    """Sizes and parameters to start from: those at `config.init`, or random ones when empty."""
    if config.init:
        model = build.load_model(config.init, mesh, "float32")
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
