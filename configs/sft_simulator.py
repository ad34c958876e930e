"""Makes the tiny simulator of the embedded world, from the tiny reader's weights.

  python -m zerosearch_jax.main --config=configs/sft_simulator.py --workdir=runs/sft_simulator

It learns to write the documents of a search engine, useful or noisy as it is asked, from (query,
documents) pairs of the real one (BM25) over the train entities (paper §3.2) and, for three worlds
in four, over made-up ones: the prompt carries the gold answer, and of what does not exist nothing
can be recited, so copying it is what pays. It starts from the first stage of configs/sft_policy.py,
which can already copy and knows the language, as the paper's simulators start from a general
model: make `runs/sft_reader` first. About 23,000 pairs, written in 12 seconds of one core.
`runs/sft_simulator/model` is committed as `zerosearch_jax/assets/simulator`.
"""

from ml_collections import ConfigDict


def get_config(preset: str = "") -> ConfigDict:
    return ConfigDict(
        dict(
            job="sft",
            seed=0,
            init="runs/sft_reader/model",
            mesh=dict(data=1, fsdp=1, tensor=1),
            data=dict(
                examples="simulator_pairs",  # or a file of pairs (configs/collect.py)
                validation="",  # such a file; "": the last validation_examples
                worlds=12,
                entities_per_world=120,
                questions_per_world=330,
                topk=2,
                inserted_weight=0.0,
                end_of_text=True,
                validation_examples=100,
            ),
            optimizer=dict(
                learning_rate=2e-3,
                warmup_steps=30,
                schedule_steps=360,
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
                steps=360,
                examples_per_step=48,
                eval_every=50,
                checkpoint_every=120,
                patience=3,  # evaluations without a lower loss that end it; 0: off
                nonfinite_limit=3,
            ),
        )
    ).lock()
