"""Fine-tunes a simulator on the pairs of configs/collect.py (paper §3.2).

  python -m zerosearch_jax.main --config=configs/sft_simulator.py --workdir=runs/sft_simulator

| preset | starts from | hardware | time | reads |
|---|---|---|---|---|
| (none) | tiny reader | 1 CPU core | 44 min | runs/collect |
| smollm2-135m-wikipedia | SmolLM2-135M-Instruct | 2 CPU cores | 14 min | runs/wikipedia/collect |

The simulator learns to write the documents of a search engine, useful or noisy as the prompt
requests. The tiny simulator starts from the tiny reader, which knows the language and can copy. The
paper's simulators start from a general model. The pairs are from a synthetic world, whose facts the
model cannot know, so it learns to copy the answer from the prompt. The package holds
`runs/sft_simulator/model` as `zerosearch_jax/assets/simulator`. Score: docs/miniature/simulator.md.

One epoch of SmolLM2-135M over the Wikipedia pairs (score: docs/wikipedia_simulator.md):

  make run CONFIG=configs/sft_simulator.py:smollm2-135m-wikipedia \
      ARGS=--workdir=runs/wikipedia/simulator

Another model: --config.init=DIR. LoRA: --config.lora.rank=16.
"""

from ml_collections import ConfigDict

from zerosearch_jax import config_flags


def embedded() -> ConfigDict:
    """The default: sets every key, small enough for two CPU cores."""
    return ConfigDict(
        dict(
            job="sft",
            seed=0,
            init="zerosearch_jax/assets/reader",
            mesh=dict(data=1, fsdp=1, tensor=1),
            data=dict(
                examples="runs/collect/pairs.jsonl",
                validation="runs/collect/heldout.jsonl",
                validation_examples=100,
                topk=2,
                inserted_weight=0.0,
                end_of_text=True,
            ),
            optimizer=dict(
                learning_rate=1.5e-3,
                warmup_steps=30,
                schedule_steps=0,  # as many as sft.steps
                final_fraction=0.05,
                beta1=0.9,
                beta2=0.98,
                weight_decay=0.01,
                clip_norm=1.0,
                moment_dtype="float32",
            ),
            lora=dict(rank=0, alpha=32.0, targets=("q", "k", "v", "o", "gate", "up", "down")),
            learner=dict(
                row_tokens=512,
                rows=4,
                compute_dtype="float32",
                remat="none",
                logprob_chunk=128,
            ),
            sft=dict(
                steps=1500,
                examples_per_step=20,
                eval_every=300,
                checkpoint_every=150,
                patience=3,
                nonfinite_limit=3,
            ),
        )
    ).lock()


def smollm2_135m_wikipedia() -> ConfigDict:
    """A real model and real passages; three passages take 230 to 390 tokens of an example."""
    config = embedded()
    steps = 16
    config.update(
        dict(
            init="models/smollm2-135m",
            data=dict(
                examples="runs/wikipedia/collect/pairs.jsonl",
                validation="runs/wikipedia/collect/heldout.jsonl",
                topk=3,
            ),
            optimizer=dict(learning_rate=2e-4, warmup_steps=2),
            learner=dict(rows=1, remat="full"),
            sft=dict(steps=steps, examples_per_step=8, eval_every=steps, checkpoint_every=steps),
        )
    )
    return config


PRESETS = {"": embedded, "smollm2-135m-wikipedia": smollm2_135m_wikipedia}


def get_config(preset: str = "") -> ConfigDict:
    """Returns the config of one of `PRESETS`."""
    return config_flags.choose(PRESETS, preset, __file__)()
