"""Compiles an rl config's programs for a TPU topology, without a TPU: do they fit, what binds them?

  pip install -r requirements-tpu-aot.txt
  python -m zerosearch_jax.main --config=configs/compile.py --config.preset=qwen2.5-7b \
    --config.topology=v5e:8x8 --workdir=runs/compile-7b-v5e-64

It reads no weights: the models' sizes stand below. Results: compile.json and compile.md in the
workdir. On two CPU cores a program of a 7B model takes one to ten minutes.
"""

from ml_collections import ConfigDict

# From the public config.json of each model; the keys are Hugging Face's. The name is the one that
# the rl config gives the model.
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
    # Qwen2.5-14B, fine-tuned.
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
    chosen = dict(data=0, fsdp=0, tensor=0)  # 0: the job chooses, and prints what
    return ConfigDict(
        dict(
            job="compile",
            recipe="configs/grpo.py",
            preset="qwen2.5-7b",
            topology="v5e:8x8",  # of each slice
            slices=1,  # what they send each other is counted as if it went over the chips' links
            mesh=chosen,
            simulator_mesh=dict(chosen),  # of its tensor: search.simulator.tensor in a run
            int8_simulator=False,  # search.simulator.generator.int8_weights in a run
            # In proportion to the mesh: rows and slots of each data × fsdp part.
            rows_each=2,
            slots_each=10,
            microbatches=0,  # 0: as many as the preset's episodes can need
            remat="full",
            programs=(
                "learner step",
                "reference log-probs",
                "policy weights, a layer",  # to the generator, after every step
                "policy prefill",
                "policy decode",
                "simulator prefill",
                "simulator decode",
            ),
            models=MODELS,
        )
    ).lock()
