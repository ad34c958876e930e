"""Fine-tunes a simulator on the pairs of configs/collect.py (paper §3.2).

  python -m zerosearch_jax.main --config=configs/sft_simulator.py --workdir=runs/sft_simulator

It learns to write the documents of a search engine, useful or noisy as it is asked. The tiny one
starts from the tiny reader, which can copy and knows the language, as the paper's simulators start
from a general model. Its pairs are of a made-up world, of which nothing can be recited: copying
the answer from the prompt is what pays. `runs/sft_simulator/model` is committed as
`zerosearch_jax/assets/simulator`.

Another model: --config.init=DIR; LoRA: --config.lora.rank=16.
"""

from ml_collections import ConfigDict


def get_config(preset: str = "") -> ConfigDict:
    return ConfigDict(
        dict(
            job="sft",
            seed=0,
            init="zerosearch_jax/assets/reader",
            mesh=dict(data=1, fsdp=1, tensor=1),
            data=dict(
                examples="runs/collect/pairs.jsonl",  # a file of pairs, ours or released ones
                validation="runs/collect/heldout.jsonl",  # "": the last validation_examples
                validation_examples=100,
                topk=2,
                inserted_weight=0.0,
                end_of_text=True,
            ),
            optimizer=dict(
                learning_rate=1.5e-3,
                warmup_steps=30,
                schedule_steps=1500,
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
                patience=3,  # evaluations without a lower loss that end it; 0: off
                nonfinite_limit=3,
            ),
        )
    ).lock()
