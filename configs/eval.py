"""Judges a policy with a real engine: exact match with its 95% interval, F1, searches.

  python -m zerosearch_jax.main --config=configs/eval.py --config.policy.model=runs/grpo/policy

Episodes are greedy, so the figures do not depend on a seed. The table is printed and
written to `evaluation.json` in the workdir.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config(preset: str = "") -> ConfigDict:
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
                    decode_rows=(20,),
                    burst_tokens=32,
                    window_tokens=320,
                    dtype="float32",
                    int8_weights=False,
                ),
            ),
            data=dict(
                source="world",
                splits=("test", "compositions", "validation"),
                limit=placeholder(int),  # None: all questions
            ),
            search=dict(engine="bm25", topk=2),
            limits=dict(max_turns=3, response_tokens=64, observation_tokens=192),
            forbid_search=False,
        )
    ).lock()
