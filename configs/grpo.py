"""GRPO against a simulated search engine.

  python -m zerosearch_jax.main --config=configs/grpo.py[:PRESET] [--workdir=runs/NAME]

| preset | policy ← simulator | hardware | time | score |
|---|---|---|---|---|
| (none) | tiny base policy ← tiny simulator (package data) | 2 CPU cores | 7 min | see README |
| smollm2-135m | warm-started SmolLM2-135M ← SmolLM2-135M | 2 CPU cores | 2 min | one step |
| qwen2.5-3b | Qwen2.5-3B ← SearchSimulation_14B | 8 × 80 GB | not run | paper 34.47 |
| qwen2.5-7b | Qwen2.5-7B ← SearchSimulation_14B | 8 × 80 GB | not run | paper 40.93 |
| llama-3.2-3b | Llama-3.2-3B ← SearchSimulation_14B | 8 × 80 GB | not run | see the paper |

The paper's scores are *its* exact match (%), the mean of seven sets judged with Google (arXiv
2505.04588, table 2; base models). Nobody has run the last three presets here: their meshes are
checked against the models' shapes (tests/test_configs.py), their memory is reckoned on paper.

smollm2-135m takes a real model, its chat template and its tokenizer through one step, which
teaches it nothing. Untuned it hardly ever searches (in 1 of 274 turns sampled at temperatures 0.3
to 1), so the policy is warm-started on transcripts. Two commands make what it reads,
models/smollm2-135m and runs/sft_smollm2/model:
  make smollm2
  make run CONFIG=configs/sft_policy.py:smollm2-135m ARGS=--workdir=runs/sft_smollm2

The paper's runs: fetch what they read, then start one process a host (`--distributed` if several).
  hf download Qwen/Qwen2.5-3B --local-dir models/Qwen2.5-3B
  hf download sunhaonlp/SearchSimulation_14B --local-dir models/SearchSimulation_14B
  hf download sunhaonlp/ZeroSearch_dataset --repo-type dataset --local-dir data/zerosearch
They train on data/zerosearch/train.parquet (NQ and HotpotQA questions). **Their evaluation is not
the paper's** unless eval.search and data.eval_source say so: by default BM25 over the embedded
world judges them on its questions. That watches a run; it cannot stand beside the paper's tables.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from zerosearch_jax import config_flags


def embedded() -> ConfigDict:
    """The default: every value there is, small enough for two CPU cores."""
    mesh = dict(data=1, fsdp=1, tensor=1)
    web = dict(provider="serper", recording="world", blocked_domains=("huggingface.co",))
    # Any server: of documents (retriever), of a search service, of a simulator.
    remote = dict(
        url="http://127.0.0.1:8000",  # of retriever
        dialect="search_r1",  # of retriever; or zerosearch
        timeout_secs=20.0,  # of one attempt
        attempts=4,
        backoff_secs=0.5,
        workers=16,  # requests under way at once
    )
    generator = dict(
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
    return ConfigDict(
        dict(
            job="rl",
            seed=0,
            mesh=mesh,
            checkpoint_every=5,
            data=dict(
                source="world",
                eval_source="world",
                train_split="train",
                eval_split="validation",
                test_split="test",
                train_limit=placeholder(int),  # None: all of them
            ),
            policy=dict(model="zerosearch_jax/assets/policy", generator=generator),
            search=dict(
                engine="simulated",
                topk=2,
                corpus="world",  # of bm25: world, made_up:COUNT:SEED or a .jsonl file
                web=web,
                remote=remote,
                simulator=dict(
                    model="zerosearch_jax/assets/simulator",
                    url="",  # of a server that speaks OpenAI's chat completions, in its place
                    gate=dict(report="", useful_min=0.0, noisy_max=1.0),
                    devices=0,  # of each process, the simulator's alone; 0: shares the policy's
                    tensor=0,  # devices of one replica of it; 0: mesh.tensor
                    form="finetuned",
                    temperature=0.4,  # the paper's 0.8 makes a tiny one miscopy the answer
                    top_k=0,
                    top_p=1.0,
                    max_new_tokens=168,
                    generator=dict(
                        slots=120,
                        max_tokens=352,
                        prefill_rows=16,
                        prefill_buckets=(128, 192),
                        decode_rows=(16,),
                        chunk_tokens=32,
                        window_tokens=352,
                        dtype="float32",
                        int8_weights=False,
                    ),
                ),
            ),
            rollout=dict(
                questions_per_step=40,
                group_size=3,  # 5 in the paper; with few episodes more questions teach more
                max_turns=3,
                response_tokens=64,
                observation_tokens=192,
                temperature=1.0,
                stop_on_failure=True,
                concurrent_searches=0,
                max_rounds=1,  # above 1: dynamic sampling
            ),
            curriculum=dict(start=0.0, end=0.5, base=4.0),
            # Rules: answer (name + format_weight · format) or those of other papers: research,
            # deepresearcher, r1_searcher (with its stage_one_steps).
            reward=dict(rule="answer", name="f1", format_weight=0.0, stage_one_steps=0),
            rl=dict(
                steps=10,
                epochs=1,
                minibatches=1,
                old_logprobs="sampler",
                overlong="keep",
                document_mask=True,
            ),
            optimizer=dict(
                learning_rate=5e-4,
                warmup_steps=2,
                schedule_steps=10,
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
            # Read by estimator=ppo alone.
            critic=dict(
                trunk="own",  # or shared: a value head on the policy
                learning_rate=5e-4,
                warmup_steps=2,
                coef=0.5,
                value_clip=0.2,
            ),
            lora=dict(
                rank=0,  # 0: all parameters are trained
                alpha=32.0,
                targets=("q", "k", "v", "o", "gate", "up", "down"),
            ),
            watch=dict(window=3, stop=False, nonfinite_limit=3),
            learner=dict(
                row_tokens=640,
                rows=4,
                compute_dtype="float32",
                remat="none",
                logprob_chunk=128,
            ),
            eval=dict(
                every=5,
                questions=120,
                test_questions=240,
                search=dict(
                    engine="bm25", topk=2, corpus="world", web=dict(web), remote=dict(remote)
                ),
            ),
        )
    ).lock()


def smollm2_135m() -> ConfigDict:
    """A real model as policy, warm-started, and as simulator: one step of 2 × 2 episodes."""
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
            learner=dict(row_tokens=480, rows=2, remat="full"),
            eval=dict(every=1, questions=2, test_questions=4),
        )
    )
    return config


def paper(model: str, fsdp: int, tensor: int) -> ConfigDict:
    """The paper's hyper-parameters (its released GRPO scripts) for a policy `model`.

    `tensor` has to divide the key-value heads of the policy and of the simulator (8).
    """
    config = embedded()
    # An episode: a start of at most 2048 tokens, then turns (500) and documents (2048) while the
    # context stays within 4096, and one last turn. What does not fit ends with finish "length".
    episode_tokens = 4608
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
                    prefill_rows=4,  # 16 need 8.8 GB a v5e chip for attention's scores
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
                        max_tokens=1408,  # prompt, question and query, then 600 written tokens
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
            critic=dict(learning_rate=1e-5, warmup_steps=3),  # 0.015 of the steps
            watch=dict(window=10),
            rl=dict(steps=203),
            optimizer=dict(
                learning_rate=1e-6,
                warmup_steps=193,
                schedule_steps=203,
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
    """The config of one of `PRESETS`; UserError names them for any other."""
    return config_flags.choose(PRESETS, preset, __file__)()
