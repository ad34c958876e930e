"""Benchmarks on this machine: medians, and ratios to peers measured in the same run.

  python -m zerosearch_jax.main --config=configs/bench.py:rollout   # against a lockstep loop
  python -m zerosearch_jax.main --config=configs/bench.py:decode    # against other libraries
  python -m zerosearch_jax.main --config=configs/bench.py:learner   # against other libraries
  python -m zerosearch_jax.main --config=configs/bench.py:decode-gpu --config.peak_gb_per_s=3350
  python -m zerosearch_jax.main --config=configs/bench.py:learner-gpu --config.peak_tflops=989

`decode` and `learner` read models/smollm2-135m (`make smollm2`) and need torch. All peers except
transformers run in separate environments: set `peers.tunix_python`, `peers.llamacpp_python` and
`peers.trl_python` to their interpreters. The scripts in zerosearch_jax/benchmarks/peers/ describe
these environments. A peer without an interpreter is reported as not run. `learner` takes about an
hour; `parts` selects parts of it. `decode-gpu` and `learner-gpu` need a GPU of 80 GB. Set its
memory bandwidth or its dense bfloat16 peak, as above. `--config.int8_weights=True` decodes with
int8 weights. Results: docs/speed.md.
"""

from ml_collections import ConfigDict

from zerosearch_jax import config_flags


def rollout() -> ConfigDict:
    generator = dict(
        slots=160, lockstep_slots=320, prefill_rows=16, decode_rows=(16,), chunk_tokens=32
    )
    return ConfigDict(
        dict(
            job="bench",
            suite="rollout",
            repeats=5,
            mixes=("embedded", "long", "service"),
            variants=(
                "lockstep",
                "without keep_cache",
                "without share_prompts",
                "without refill",
                "without return_early",
                "without compact",
                "without overlap",
            ),
            questions=64,
            group_size=5,
            policy=generator
            | dict(
                model="zerosearch_jax/assets/policy",
                max_tokens=640,
                prefill_buckets=(64, 128, 192),
                window_tokens=320,
            ),
            simulator=generator
            | dict(
                model="zerosearch_jax/assets/simulator",
                temperature=0.8,
                max_new_tokens=168,
                max_tokens=352,
                prefill_buckets=(128, 192),
                window_tokens=352,
            ),
            limits=dict(max_turns=3, response_tokens=64, observation_tokens=192),
            long=dict(
                questions=16,
                prompt_words=(20, 130),
                document_words=(90, 280),
                max_tokens=3840,
                limits=dict(max_turns=5, response_tokens=64, observation_tokens=600),
            ),
            service=dict(seconds=(0.3, 1.5), concurrent=8),
        )
    ).lock()


def decode() -> ConfigDict:
    return ConfigDict(
        dict(
            job="bench",
            suite="decode",
            repeats=5,
            model="models/smollm2-135m",
            slots=(1, 8, 32),
            prompt_tokens=32,
            new_tokens=24,
            prefill_tokens=512,
            threads=2,
            peers=dict(tunix_python="", llamacpp_python=""),
        )
    ).lock()


OPTIMIZER = dict(
    learning_rate=1e-6,
    warmup_steps=0,
    schedule_steps=0,
    final_fraction=1.0,
    beta1=0.9,
    beta2=0.999,
    weight_decay=0.01,
    clip_norm=1.0,
    moment_dtype="float32",
)


def learner() -> ConfigDict:
    return ConfigDict(
        dict(
            job="bench",
            suite="learner",
            parts=("update", "step", "packing", "memory"),
            repeats=5,
            threads=2,
            model="models/smollm2-135m",
            optimizer=OPTIMIZER,
            learner=dict(remat="full", logprob_chunk=128),
            batch=dict(
                rows=8,
                tokens=512,
                prompt_tokens=1,  # both sides then need the logits of all tokens
                dtypes=("float32", "bfloat16"),
                micro_rows=(1, 2, 4),
            ),
            step=dict(
                questions=4,
                group_size=4,
                prompt_tokens=128,
                new_tokens=128,
                micro_rows=dict(ours=4, TRL=16, Tunix=4),
            ),
            packing=dict(
                model="zerosearch_jax/assets/policy",
                episodes=120,
                row_tokens=640,
                rows=4,
                topk=2,
                behaviours=dict(
                    guess=0.25,
                    vague=0.7,
                    wrong_attribute=0.0,
                    stop_early=0.7,
                    misread=0.05,
                    malformed=0.0,
                    retry=0.3,
                ),
            ),
            memory=dict(
                tokens=1024,
                logprob_chunk=128,
                model=dict(
                    model_type="llama",
                    vocab_size=151_936,
                    hidden_size=64,
                    intermediate_size=128,
                    num_hidden_layers=1,
                    num_attention_heads=2,
                    num_key_value_heads=1,
                    head_dim=32,
                    rope_theta=10_000.0,
                    rms_norm_eps=1e-6,
                    tie_word_embeddings=True,
                    max_position_embeddings=2048,
                ),
            ),
            peers=dict(trl_python="", tunix_python=""),
        )
    ).lock()


# The sizes of Qwen2.5-0.5B and Qwen2.5-3B; the weights are random.
QWEN = dict(
    model_type="qwen2",
    vocab_size=151_936,
    num_key_value_heads=2,
    rope_theta=1e6,
    rms_norm_eps=1e-6,
    tie_word_embeddings=True,
    max_position_embeddings=32_768,
)
GPU_MODELS = dict(
    qwen_500m=QWEN
    | dict(hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14),
    qwen_3b=QWEN
    | dict(
        hidden_size=2048, intermediate_size=11_008, num_hidden_layers=36, num_attention_heads=16
    ),
)


def decode_gpu() -> ConfigDict:
    return ConfigDict(
        dict(
            job="bench",
            suite="bandwidth",
            repeats=5,
            peak_gb_per_s=0.0,
            slots=(1, 32, 256),
            prompt_tokens=128,
            new_tokens=64,
            dtype="bfloat16",
            int8_weights=False,
            torch_device="cuda",
            models=GPU_MODELS,
        )
    ).lock()


def learner_gpu() -> ConfigDict:
    return ConfigDict(
        dict(
            job="bench",
            suite="mfu",
            repeats=5,
            peak_tflops=0.0,
            optimizer=OPTIMIZER | dict(moment_dtype="bfloat16"),
            learner=dict(remat="full", logprob_chunk=512),
            batch=dict(rows=1, tokens=4096, prompt_tokens=1),
            models=GPU_MODELS,
        )
    ).lock()


PRESETS = {
    "": rollout,
    "rollout": rollout,
    "decode": decode,
    "learner": learner,
    "decode-gpu": decode_gpu,
    "learner-gpu": learner_gpu,
}


def get_config(preset: str = "") -> ConfigDict:
    """Returns the config of one of `PRESETS`."""
    return config_flags.choose(PRESETS, preset, __file__)()
