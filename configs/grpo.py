"""GRPO against a simulated search engine: the paper's method (arXiv 2505.04588).

  python -m zerosearch_jax.main --config=configs/grpo.py[:PRESET] [--workdir=runs/NAME]

| preset | policy ← simulator | hardware | time | score |
|---|---|---|---|---|
| (none) | tiny base policy ← tiny simulator (package) | 2 CPU cores | 7 min | EM 0.79 (README) |
| smollm2-135m | warm-started SmolLM2-135M ← SmolLM2-135M | 2 CPU cores | 2 min | one step |
| qwen2.5-3b | Qwen2.5-3B ← SearchSimulation_14B | 8 × 80 GB | not run | paper 34.47 |
| qwen2.5-7b | Qwen2.5-7B ← SearchSimulation_14B | 8 × 80 GB | not run | paper 40.93 |
| llama-3.2-3b | Llama-3.2-3B ← SearchSimulation_14B | 8 × 80 GB | not run | see the paper |

The paper's scores are exact match (%), the mean of seven sets evaluated with Google (table 2, base
models). The last three presets have not been run: tests check their meshes against the models'
shapes (tests/test_configs.py). Their memory is computed, not measured.

smollm2-135m runs one step with a real model, its tokenizer and chat template; one step teaches the
model nothing. Without tuning, the model searches in 1 of 274 turns (temperatures 0.3 to 1), so the
policy is warm-started on transcripts. Two commands make models/smollm2-135m and
runs/sft_smollm2/model, which the preset reads:
  make smollm2
  make run CONFIG=configs/sft_policy.py:smollm2-135m ARGS=--workdir=runs/sft_smollm2

For the paper's runs, download models and questions, then start one process per host
(`--distributed` if there are several):
  hf download Qwen/Qwen2.5-3B --local-dir models/Qwen2.5-3B
  hf download sunhaonlp/SearchSimulation_14B --local-dir models/SearchSimulation_14B
  hf download sunhaonlp/ZeroSearch_dataset --repo-type dataset --local-dir data/zerosearch
These presets train on data/zerosearch/train.parquet (NQ and HotpotQA questions). By default they
are **evaluated with BM25 over the embedded world, on the embedded world's questions**. These scores
show progress but are not comparable with the paper. Set eval.search and data.eval_source for the
paper's evaluation.

`--describe` prints every key with its documentation.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from zerosearch_jax import config_flags

WEB = dict(provider="serper", recording="world", blocked_domains=("huggingface.co",))
REMOTE = dict(
    url="http://127.0.0.1:8000",
    dialect="search_r1",
    key_variable="",
    timeout_secs=20.0,
    attempts=4,
    backoff_secs=0.5,
    workers=16,
)
GENERATOR = dict(
    slots=120,
    max_tokens=640,
    prefill_rows=16,
    prefill_buckets=(64, 128, 192),
    decode_rows=(16,),
    chunk_tokens=32,
    window_tokens=320,
    dtype="float32",
    int8_weights=False,
)


def embedded() -> ConfigDict:
    """The default: sets every key, small enough for two CPU cores."""
    return ConfigDict(
        dict(
            job="rl",
            seed=0,
            mesh=dict(data=1, fsdp=1, tensor=1),
            checkpoint_every=5,
            data=dict(
                source="world",
                eval_source="world",
                train_split="train",
                eval_split="validation",
                test_split="test",
                train_limit=placeholder(int),  # None
                overlong="error",
            ),
            policy=dict(model="zerosearch_jax/assets/policy", generator=dict(GENERATOR)),
            search=_simulated_search(),
            rollout=dict(
                questions_per_step=40,
                group_size=3,  # with few episodes, more questions teach more than larger groups
                max_turns=3,
                response_tokens=64,
                observation_tokens=192,
                temperature=1.0,
                stop_on_failure=True,
                concurrent_searches=0,
                max_rounds=1,
            ),
            curriculum=dict(start=0.0, end=0.5, base=4.0),
            reward=dict(rule="answer", name="f1", format_weight=0.0, stage_one_steps=0),
            **_update(),
            eval=dict(
                every=5,
                questions=120,
                test_questions=240,
                max_failed_searches=0.01,
                search=dict(
                    engine="bm25", topk=2, corpus="world", web=dict(WEB), remote=dict(REMOTE)
                ),
            ),
        )
    ).lock()


def _simulated_search() -> dict:
    """Section `search`: the tiny simulator."""
    return dict(
        engine="simulated",
        topk=2,
        corpus="world",
        web=dict(WEB),
        remote=dict(REMOTE),
        simulator=dict(
            model="zerosearch_jax/assets/simulator",
            url="",
            gate=dict(report="", useful_min=0.0, noisy_max=1.0),
            devices=0,
            tensor=0,
            form="finetuned",
            temperature=0.4,  # at the paper's 0.8 the tiny simulator miscopies answers
            top_k=0,
            top_p=1.0,
            max_new_tokens=168,
            generator=GENERATOR
            | dict(max_tokens=352, prefill_buckets=(128, 192), window_tokens=352),
        ),
    )


def _update() -> dict:
    """Sections of the update: `rl` to `learner`."""
    return dict(
        rl=dict(
            steps=10,
            stop_when=dict(patience=0, min_gain=0.0),
            epochs=1,
            minibatch_episodes=0,
            old_logprobs="sampler",
            overlong="keep",
            refresh_reference=0,
            document_mask=True,
        ),
        optimizer=dict(
            learning_rate=5e-4,
            warmup_steps=2,
            schedule_steps=0,  # as many as rl.steps
            final_fraction=0.05,
            beta1=0.9,
            beta2=0.99,
            weight_decay=0.01,
            clip_norm=1.0,
            moment_dtype="float32",
        ),
        advantage=dict(
            estimator="grpo",
            baseline="group_mean",
            normalize_std=True,
            gamma=1.0,
            gae_lambda=1.0,
        ),
        loss=dict(
            surrogate="clip",
            clip_low=0.2,
            clip_high=0.2,
            dual_clip=0.0,
            aggregate="token_mean",
            fixed_tokens=0,
            entropy=0.001,
            llds=0.0,
            importance_cap=0.0,
        ),
        kl=dict(coef=0.01, estimator="k3", apply_to="loss", target=0.0, horizon=10_000),
        critic=dict(
            trunk="own",
            learning_rate=5e-4,
            warmup_steps=2,
            coef=0.5,
            value_clip=0.2,
        ),
        lora=dict(
            rank=0,
            alpha=32.0,
            targets=("q", "k", "v", "o", "gate", "up", "down"),
        ),
        watch=dict(
            window=3,
            action="log",
            rollback_rate_factor=0.5,
            max_rollbacks=3,
            nonfinite_limit=3,
        ),
        learner=dict(
            row_tokens=640,
            rows=4,
            compute_dtype="float32",
            remat="none",
            logprob_chunk=128,
        ),
    )


def smollm2_135m() -> ConfigDict:
    """One step of 2 × 2 episodes with a real model as policy and simulator."""
    config = embedded()
    generator = dict(
        slots=4,
        max_tokens=480,
        prefill_rows=4,
        prefill_buckets=(192,),
        decode_rows=(),
        window_tokens=480,
    )
    config.update(
        dict(
            policy=dict(model="runs/sft_smollm2/model", generator=generator),
            search=dict(
                simulator=dict(
                    model="models/smollm2-135m",
                    form="prompted",
                    temperature=0.8,
                    max_new_tokens=112,
                    generator=dict(
                        slots=4,
                        max_tokens=512,
                        prefill_rows=4,
                        prefill_buckets=(448,),
                        decode_rows=(),
                        window_tokens=512,
                    ),
                )
            ),
            rollout=dict(
                questions_per_step=2,
                group_size=2,
                max_turns=1,
                response_tokens=64,
                observation_tokens=128,
            ),
            rl=dict(steps=1),
            optimizer=dict(learning_rate=1e-6, warmup_steps=0, beta2=0.999),
            critic=dict(warmup_steps=0),
            learner=dict(row_tokens=480, rows=2, remat="full"),
            eval=dict(every=1, questions=2, test_questions=4),
        )
    )
    return config


def paper(model: str, fsdp: int, tensor: int) -> ConfigDict:
    """The hyperparameters of the paper's released GRPO scripts for the policy `model`.

    `tensor` must divide the key-value heads of the policy and of the simulator (8).
    """
    config = embedded()
    # An episode has a prompt of at most 2048 tokens, then turns (500) and documents (2048) while
    # the context stays within 4096, and one last turn. Longer episodes end with finish "length".
    episode_tokens = 4608
    steps = 203
    config.update(
        dict(
            mesh=dict(data=1, fsdp=fsdp, tensor=tensor),
            checkpoint_every=20,
            data=dict(source="data/zerosearch/train.parquet"),
            policy=dict(
                model=model,
                generator=dict(
                    slots=160,
                    max_tokens=episode_tokens,
                    prefill_rows=4,  # 16 rows need 8.8 GB per v5e chip for attention scores
                    prefill_buckets=(256, 512, 2048),
                    decode_rows=(40, 160),
                    chunk_tokens=64,
                    window_tokens=1536,
                    dtype="bfloat16",
                    int8_weights=False,
                ),
            ),
            search=dict(
                topk=5,
                simulator=dict(
                    model="models/SearchSimulation_14B",
                    temperature=0.8,
                    max_new_tokens=600,
                    generator=dict(
                        slots=160,
                        max_tokens=1408,  # prompt with question and query, then 600 sampled tokens
                        prefill_rows=16,
                        prefill_buckets=(256, 512),
                        decode_rows=(40, 160),
                        chunk_tokens=64,
                        window_tokens=1408,
                        dtype="bfloat16",
                        int8_weights=False,
                    ),
                ),
            ),
            rollout=dict(
                questions_per_step=64,
                group_size=5,
                max_turns=5,
                response_tokens=500,
                observation_tokens=2048,
            ),
            curriculum=dict(start=0.0, end=0.5, base=4.0),
            critic=dict(learning_rate=1e-5, warmup_steps=round(0.015 * steps), value_clip=0.5),
            watch=dict(window=10),
            rl=dict(steps=steps, minibatch_episodes=256),  # updates of 256 and 64 episodes
            optimizer=dict(
                learning_rate=1e-6,
                warmup_steps=round(0.95 * steps),
                final_fraction=1.0,
                beta2=0.999,
                weight_decay=0.01,
                clip_norm=1.0,
            ),
            loss=dict(clip_low=0.2, clip_high=0.2, entropy=0.001),
            kl=dict(coef=0.001),
            learner=dict(
                row_tokens=episode_tokens,
                rows=8,
                compute_dtype="bfloat16",
                remat="full",
                logprob_chunk=512,
            ),
            eval=dict(questions=200, test_questions=500, search=dict(topk=5)),
        )
    )
    return config


PRESETS = {
    "": embedded,
    "smollm2-135m": smollm2_135m,
    "qwen2.5-3b": lambda: paper("models/Qwen2.5-3B", fsdp=4, tensor=2),
    "qwen2.5-7b": lambda: paper("models/Qwen2.5-7B", fsdp=2, tensor=4),
    "llama-3.2-3b": lambda: paper("models/Llama-3.2-3B", fsdp=2, tensor=4),
}


def get_config(preset: str = "") -> ConfigDict:
    """Returns the config of one of `PRESETS`."""
    return config_flags.choose(PRESETS, preset, __file__)()
