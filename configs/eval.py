"""Evaluates a model: methods × engines × question sets, with 95% intervals.

  python -m zerosearch_jax.main --config=configs/eval.py --config.policy.model=runs/grpo/policy
  … --config.methods="('direct','cot','rag','search','search_o1')"  # see evaluation/baselines.py
  … --config.data.sets="('world/test','data/nq.jsonl')"             # SOURCE/SPLIT, or a file
  … --config=configs/eval.py:simulated                              # BM25 and the simulator
  … --config=configs/eval.py:retriever --config.engines.retriever.remote.url=http://HOST:PORT
  … --config=configs/eval.py:web                                    # API key in the environment

Hardware: 1 CPU core. Time: 2 minutes for five methods on 240 questions. Scores: README and
docs/miniature/report.md. Episodes are greedy, so the seed matters only for the draws of `simulated`
and `noisy_bm25`. The table is printed and written to the workdir. A combination of method, engine
and set with a row in evaluation.json runs again only if something has changed: the config, the
model, the questions or the engine's files. A row with too many failed searches is not written.
"""

from collections.abc import Callable
from pathlib import Path

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from zerosearch_jax import config_flags

BM25 = dict(engine="bm25", topk=2, corpus="world")
PRESETS: dict[str, Callable[[ConfigDict], dict]] = {
    "": lambda training: dict(bm25=BM25),
    "simulated": lambda training: dict(bm25=BM25, simulated=training.search.to_dict()),
    # Without BM25, which indexes the embedded world only.
    "retriever": lambda training: dict(retriever=_server(training, "retriever")),
    "web": lambda training: dict(web=_server(training, "web")),
}
"""Preset: its engines, made from the training config."""


def _server(training: ConfigDict, engine: str) -> dict:
    return training.eval.search.to_dict() | dict(engine=engine)


def get_config(preset: str = "") -> ConfigDict:
    training = config_flags.load(str(Path(__file__).with_name("grpo.py")))
    return ConfigDict(
        dict(
            job="evaluate",
            seed=0,
            mesh=dict(data=1, fsdp=1, tensor=1),
            policy=dict(
                model="zerosearch_jax/assets/policy",
                generator=dict(
                    slots=80,
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
            data=dict(
                sets=("world/test", "world/compositions", "world/validation"),
                limit=placeholder(int),  # None
                overlong="error",
            ),
            methods=("search",),
            engines=config_flags.choose(PRESETS, preset, __file__)(training),
            max_failed_searches=0.01,
            limits=dict(max_turns=3, response_tokens=64, observation_tokens=192),
            refine=dict(max_new_tokens=96),
        )
    ).lock()
