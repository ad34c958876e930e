"""Fine-tunes the policies that RL starts from: the embedded world's tiny policy and SmolLM2-135M.

| preset | makes | hardware | time |
|---|---|---|---|
| (none) | the tiny reader, from random weights | 2 CPU cores | not recorded |
| behaviours | the tiny base policy, from the reader | 2 CPU cores | not recorded |
| smollm2-135m | a warm-started SmolLM2-135M-Instruct | 2 CPU cores | 6 min |

The tiny policy takes two stages:

  python -m zerosearch_jax.main --config=configs/sft_policy.py --workdir=runs/sft_reader
  python -m zerosearch_jax.main --config=configs/sft_policy.py:behaviours --workdir=runs/sft_policy

The first stage teaches the format of an episode and reading, on transcripts of a scripted agent
over synthetic worlds. The second stage continues from `runs/sft_reader/model` with poor search
behaviours: the agent guesses, searches for bare names and stops after one hop. RL starts from
`runs/sft_policy/model`, which the package holds as `zerosearch_jax/assets/policy`.

Without tuning, SmolLM2-135M-Instruct hardly ever searches. Ten steps on transcripts without poor
behaviours teach it the format; configs/grpo.py:smollm2-135m starts from `runs/sft_smollm2/model`.
`make smollm2` makes the model that this preset reads:

  make run CONFIG=configs/sft_policy.py:smollm2-135m ARGS=--workdir=runs/sft_smollm2

With its tokenizer and chat template, a transcript with two documents per search has 290 to 900
tokens (median 475). Rows of 640 tokens drop about a sixth of the transcripts, namely those with
three or more searches. The checkpoint (parameters and Adam's moments) takes 1.6 GB.
"""

from ml_collections import ConfigDict

from zerosearch_jax import config_flags


def get_config(preset: str = "") -> ConfigDict:
    """Returns the config of one of `PRESETS`."""
    return config_flags.choose(PRESETS, preset, __file__)(reader()).lock()


def reader() -> ConfigDict:
    """The default: a new tiny model on transcripts with mild behaviours."""
    return ConfigDict(
        dict(
            job="sft",
            seed=0,
            init="",
            vocab_size=1536,
            mesh=dict(data=1, fsdp=1, tensor=1),
            model=dict(
                model_type="qwen3",
                hidden_size=128,
                intermediate_size=384,
                num_hidden_layers=4,
                num_attention_heads=4,
                num_key_value_heads=2,
                head_dim=32,
                rope_theta=10_000.0,
                rms_norm_eps=1e-6,
                tie_word_embeddings=True,
                max_position_embeddings=2048,
            ),
            data=dict(
                examples="policy_transcripts",
                worlds=40,
                entities_per_world=120,
                questions_per_world=1000,
                topk=2,
                inserted_weight=0.05,
                end_of_text=False,
                validation="",
                validation_examples=60,
                behaviours=dict(
                    guess=0.05,
                    vague=0.35,
                    wrong_attribute=0.1,
                    stop_early=0.1,
                    misread=0.0,
                    malformed=0.05,
                    retry=0.5,
                ),
            ),
            optimizer=dict(
                learning_rate=3e-3,
                warmup_steps=100,
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
                row_tokens=640,
                rows=4,
                compute_dtype="float32",
                remat="none",
                logprob_chunk=128,
            ),
            sft=dict(
                steps=1400,
                examples_per_step=32,
                eval_every=100,
                checkpoint_every=100,
                patience=0,
                nonfinite_limit=3,
            ),
        )
    )


def behaviours(config: ConfigDict) -> ConfigDict:
    """Continues from the reader with poor search behaviours."""
    config.seed = 1
    config.init = "runs/sft_reader/model"
    config.data.worlds = 14
    config.data.behaviours.update(
        dict(guess=0.25, vague=0.7, stop_early=0.7, misread=0.05, retry=0.3)
    )
    config.optimizer.update(dict(learning_rate=1e-3, warmup_steps=30))
    config.sft.steps = 250
    return config


def smollm2_135m(config: ConfigDict) -> ConfigDict:
    """Warm-starts SmolLM2-135M-Instruct on transcripts without poor behaviours."""
    config.update(
        dict(
            init="models/smollm2-135m",
            data=dict(
                worlds=4,
                questions_per_world=80,
                inserted_weight=0.0,
                validation_examples=16,
                behaviours=dict(
                    guess=0.0,
                    vague=0.0,
                    wrong_attribute=0.0,
                    stop_early=0.0,
                    misread=0.0,
                    malformed=0.0,
                    retry=1.0,
                ),
            ),
            optimizer=dict(learning_rate=1e-4, warmup_steps=2),
            learner=dict(rows=1, remat="full"),
            sft=dict(steps=10, examples_per_step=8, eval_every=10, checkpoint_every=10),
        )
    )
    return config


PRESETS = {"": lambda config: config, "behaviours": behaviours, "smollm2-135m": smollm2_135m}
