"""Compiles an rl config's programs for a TPU topology without a TPU: do they fit, what limits them?

  pip install -r requirements-tpu-aot.txt
  python -m zerosearch_jax.main --config=configs/compile.py --config.preset=qwen2.5-7b \
    --config.topology=v5e:8x8 --workdir=runs/compile-7b-v5e-64

Hardware: 2 CPU cores. Time: one to ten minutes per program of a 7B model. Results: compile.json and
compile.md in the workdir, docs/scaling.md. The job reads no weights. `models` has the sizes of
the models.
"""

from ml_collections import ConfigDict

# From the public config.json of each model, with Hugging Face's keys. `name` is the value of
# policy.model or search.simulator.model in the rl config.
_QWEN = dict(
    model_type="qwen2",
    rms_norm_eps=1e-6,
    rope_theta=1_000_000.0,
    max_position_embeddings=32768,
)
MODELS = dict(
    qwen_3b=_QWEN
    | dict(
        name="models/Qwen2.5-3B",
        vocab_size=151936,
        hidden_size=2048,
        intermediate_size=11008,
        num_hidden_layers=36,
        num_attention_heads=16,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    ),
    qwen_7b=_QWEN
    | dict(
        name="models/Qwen2.5-7B",
        vocab_size=152064,
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        tie_word_embeddings=False,
    ),
    # A fine-tuned Qwen2.5-14B.
    simulator_14b=_QWEN
    | dict(
        name="models/SearchSimulation_14B",
        vocab_size=152064,
        hidden_size=5120,
        intermediate_size=13824,
        num_hidden_layers=48,
        num_attention_heads=40,
        num_key_value_heads=8,
        tie_word_embeddings=False,
    ),
)


def get_config() -> ConfigDict:
    chosen = dict(data=0, fsdp=0, tensor=0)
    return ConfigDict(
        dict(
            job="compile",
            recipe="configs/grpo.py",
            preset="qwen2.5-7b",
            topology="v5e:8x8",
            slices=1,
            mesh=chosen,
            simulator_mesh=dict(chosen),
            int8_simulator=False,
            rows_each=2,
            slots_each=10,
            microbatches=0,
            remat="full",
            programs=(
                "learner step",
                "reference log-probs",
                "policy weights, a layer",
                "policy prefill",
                "policy decode",
                "simulator prefill",
                "simulator decode",
            ),
            models=MODELS,
        )
    ).lock()
