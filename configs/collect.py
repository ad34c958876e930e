"""Collects (query, documents) pairs for the simulator from a real search engine (paper §3.2).

  python -m zerosearch_jax.main --config=configs/collect.py[:PRESET] [--workdir=runs/collect]

| preset | agent → engine | hardware | reads |
|---|---|---|---|
| (none) | tiny reader → BM25 with noise, a made-up world | 2 CPU cores | package data |
| smollm2-135m-wikipedia | warm SmolLM2-135M → BM25 with noise | 2 CPU cores | data/wikipedia |

Three stages: episodes are collected, each search is labelled useful or noisy, pairs are extracted.
The workdir gets episodes.jsonl, labels.jsonl, pairs.jsonl, heldout.jsonl and summary.json. Stop it
at any moment; the same command goes on. With a higher data.limit or collect.samples it adds to
what is there; other changes of the agent or the engine want another workdir.

The paper's rule calls all searches of a right episode useful, of a wrong one noisy. A judge has a
second opinion; how far they agree is printed, and extract.label_by says whose labels count: of an
episode's last search the label that both give, of earlier ones the rule's. Here the judge is the
reader, which answers from the documents. A language model can be asked instead:
  --config.judge.kind=local --config.judge.model=DIRECTORY, or
  --config.judge.kind=server --config.judge.url=http://HOST:PORT --config.judge.model=NAME
"""

from pathlib import Path

from ml_collections import ConfigDict

from zerosearch_jax import config_flags


def embedded() -> ConfigDict:
    """The default: every value there is, small enough for two CPU cores."""
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
            # Or bm25, retriever, web. BM25 finds too well here: with good queries wrong answers
            # would be rare, as they are not on the web, and what noisy documents are for such a
            # query could not be learned.
            search=engines | dict(engine="noisy_bm25", noise=0.4, topk=2, corpus="made_up:1200:7"),
            data=dict(source="made_up:1200:7", split="train", limit=12000),
            limits=dict(max_turns=3, response_tokens=64, observation_tokens=192),
            rollout=dict(stop_on_failure=True, concurrent_searches=0),
            collect=dict(
                samples=1,  # episodes a question
                temperature=0.7,
                batch_questions=300,  # at most these are lost by a kill
            ),
            judge=dict(
                kind="reader",  # or local (a model asked yes or no), server or none
                model="zerosearch_jax/assets/reader",  # or the name that the server knows
                url="",
                response_tokens=64,  # at most; 8 do for yes or no
                observation_tokens=192,  # of reader
                batch=240,  # searches between two writes
                server=dict(
                    key_variable="",  # of the environment, with the API key; "": none
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
                label_by="both",  # or rule, or judge
                last_only=False,
                balance=True,
                heldout_share=0.1,  # of the gold answers
            ),
        )
    ).lock()


def smollm2_135m_wikipedia() -> ConfigDict:
    """A real model with its chat template searches real passages: one search an episode."""
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
            # 192 of the prompt, two turns and one observation are 768.
            limits=dict(max_turns=1, response_tokens=96, observation_tokens=384),
            collect=dict(batch_questions=20),
            judge=dict(
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
    """The config of one of `PRESETS`; UserError names them for any other."""
    return config_flags.choose(PRESETS, preset, __file__)()
