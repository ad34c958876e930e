"""Makes the tiny simulator of the embedded world, from the base policy's weights.

  python -m zerosearch_jax.main --config=configs/sft_simulator.py --workdir=runs/sft_simulator

It learns to write the documents of a search engine, useful or noisy as it is asked, from (query,
documents) pairs of the real one (BM25) over the train entities (paper §3.2). The prompt carries
the gold answer. It starts from the base policy, which can already copy and knows the language,
as the paper's simulators start from a general model; so make that first (configs/sft_policy.py).
`runs/sft_simulator/model` is committed as `zerosearch_jax/assets/simulator`.
"""

from ml_collections import ConfigDict


def get_config(preset: str = "") -> ConfigDict:
    return ConfigDict(
        dict(
            job="sft",
            seed=0,
            init="zerosearch_jax/assets/policy",
            mesh=dict(data=1, fsdp=1, tensor=1),
            data=dict(
                examples="simulator_pairs",
                topk=2,
                inserted_weight=0.0,
                end_of_text=True,
                validation_examples=100,
            ),
            optimizer=dict(
                learning_rate=2e-3,
                warmup_steps=30,
                schedule_steps=450,
                final_fraction=0.05,
                beta1=0.9,
                beta2=0.98,
                weight_decay=0.01,
                clip_norm=1.0,
            ),
            learner=dict(
                row_tokens=512,
                rows=4,
                microbatches=12,
                compute_dtype="float32",
                remat="none",
                logprob_chunk=128,
            ),
            sft=dict(
                steps=450,
                examples_per_step=48,
                eval_every=50,
                checkpoint_every=150,
            ),
        )
    ).lock()
