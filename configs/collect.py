"""Collects (query, documents) pairs for the simulator from a real search engine (paper §3.2).

  python -m zerosearch_jax.main --config=configs/collect.py[:PRESET] [--workdir=runs/collect]

| preset | agent | passages | hardware | time |
|---|---|---|---|---|
| (none) | tiny reader | a synthetic world | 1 CPU core | 29 min |
| smollm2-135m-wikipedia | warm-started SmolLM2-135M | data/wikipedia | 2 CPU cores | 24 min |

The engine is BM25 with noise. docs/pipeline.md has the agreement and the number of pairs of the
Wikipedia preset.

Three stages: an agent collects episodes, each search gets a label (useful or noisy), and pairs are
extracted. The workdir gets episodes.jsonl, labels.jsonl, pairs.jsonl, heldout.jsonl and
summary.json. A stopped run resumes with the same command. A higher data.limit or collect.samples
adds to the files. Any other change of the agent or the engine needs a new workdir.

The paper's rule labels all searches of a correct episode useful and all others noisy. The labeler
gives a second label, and its agreement with the rule is printed. extract.label_by is `both` by
default: an episode's last search needs the same label from both, earlier searches get the rule's.
The default labeler is the reader, which answers from the documents. For a language model, use
  --config.labeling.kind=local --config.labeling.model=DIRECTORY, or
  --config.labeling.kind=server --config.labeling.url=http://HOST:PORT --config.labeling.model=NAME
"""

from pathlib import Path

from ml_collections import ConfigDict

from zerosearch_jax import config_flags


def embedded() -> ConfigDict:
    """The default: sets every key, small enough for two CPU cores."""
    engines = config_flags.load(str(Path(__file__).with_name("grpo.py"))).eval.search.to_dict()
    return ConfigDict(
        dict(
            job="collect",
            seed=0,
            mesh=dict(data=1, fsdp=1, tensor=1),
            policy=dict(
                model="zerosearch_jax/assets/reader",
                generator=dict(
                    slots=120,
                    max_tokens=640,
                    prefill_rows=16,
                    prefill_buckets=(64, 128, 192),
                    decode_rows=(16,),
                    chunk_tokens=32,
                    window_tokens=320,
                    dtype="float32",
                    int8_weights=False,
                ),
            ),
            # Noise, because BM25 alone answers nearly every good query here, unlike the web. The
            # simulator could then not learn noisy documents for a good query.
            search=engines
            | dict(engine="noisy_bm25", noise=0.4, topk=2, corpus="synthetic:1200:7"),
            data=dict(source="synthetic:1200:7", split="train", limit=12000, overlong="error"),
            limits=dict(max_turns=3, response_tokens=64, observation_tokens=192),
            rollout=dict(stop_on_failure=True, concurrent_searches=0),
            collect=dict(
                samples=1,
                temperature=0.7,
                batch_questions=300,
            ),
            labeling=dict(
                kind="reader",
                model="zerosearch_jax/assets/reader",
                url="",
                response_tokens=64,
                observation_tokens=192,
                batch=240,
                server=dict(
                    key_variable="",
                    timeout_secs=60.0,
                    attempts=5,
                    backoff_secs=1.0,
                    workers=16,
                ),
                generator=dict(
                    slots=120,
                    max_tokens=512,
                    prefill_rows=16,
                    prefill_buckets=(256, 384),
                    decode_rows=(16,),
                    chunk_tokens=16,
                    window_tokens=512,
                    dtype="float32",
                    int8_weights=False,
                ),
            ),
            extract=dict(
                label_by="both",
                last_only=False,
                balance=True,
                heldout_share=0.1,
            ),
        )
    ).lock()


def smollm2_135m_wikipedia() -> ConfigDict:
    """A real model with its chat template and real passages; one search per episode."""
    config = embedded()
    generator = dict(
        slots=20,
        max_tokens=768,
        prefill_rows=4,
        prefill_buckets=(192, 384),
        decode_rows=(),
        window_tokens=768,
    )
    agent = "runs/sft_smollm2/model"
    config.update(
        dict(
            policy=dict(model=agent, generator=generator),
            search=dict(noise=0.4, topk=3, corpus="data/wikipedia/passages.jsonl"),
            data=dict(source="data/wikipedia/questions.jsonl", limit=200),
            # 192 tokens of prompt, two turns and one observation: 768.
            limits=dict(max_turns=1, response_tokens=96, observation_tokens=384),
            collect=dict(batch_questions=20),
            labeling=dict(
                model=agent,
                observation_tokens=384,
                batch=40,
                generator=generator | dict(prefill_buckets=(640,)),
            ),
            extract=dict(heldout_share=0.25),
        )
    )
    return config


PRESETS = {"": embedded, "smollm2-135m-wikipedia": smollm2_135m_wikipedia}


def get_config(preset: str = "") -> ConfigDict:
    """Returns the config of one of `PRESETS`."""
    return config_flags.choose(PRESETS, preset, __file__)()
