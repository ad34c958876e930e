"""Judges a model: methods × engines × question sets, with 95% intervals.

  python -m zerosearch_jax.main --config=configs/eval.py --config.policy.model=runs/grpo/policy
  … --config.methods="('direct','cot','rag','search','search_o1')"    # evaluation/baselines.py tells them
  … --config.data.sets="('world/test','data/nq.jsonl')"               # SOURCE/SPLIT, or a file
  … --config=configs/eval.py:simulated                                # the simulator, too
  … --config=configs/eval.py:retriever --config.engines.retriever.remote.url=http://HOST:PORT
  … --config=configs/eval.py:web                                      # the key in the environment

Episodes are greedy, so the figures do not depend on a seed (a simulator's draws do). The table is
printed and written to `evaluation.json` in the workdir; what has a row there is not played again.
"""

from pathlib import Path

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from zerosearch_jax import config_flags


def get_config(preset: str = "") -> ConfigDict:
    training = config_flags.load(str(Path(__file__).with_name("grpo.py")))
    bm25 = dict(engine="bm25", topk=2, corpus="world")
    server = training.eval.search.to_dict()  # in the place of BM25, which knows the embedded world
    presets = {
        "": dict(bm25=bm25),
        "simulated": dict(bm25=bm25, simulated=training.search.to_dict()),
        "retriever": dict(retriever=server | dict(engine="retriever")),
        "web": dict(web=server | dict(engine="web")),
    }
    engines = config_flags.choose(presets, preset, __file__)
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
                limit=placeholder(int),  # of each set; None: all questions
            ),
            methods=("search",),
            engines=engines,  # name → what a training config's `search` holds
            limits=dict(max_turns=3, response_tokens=64, observation_tokens=192),
            refine=dict(max_new_tokens=96),  # of search_o1
        )
    ).lock()
