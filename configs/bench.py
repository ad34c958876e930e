"""Benchmarks on this machine; every figure is a median, every row a ratio of one run.

  python -m zerosearch_jax.main --config=configs/bench.py:rollout   # against a lockstep loop
  python -m zerosearch_jax.main --config=configs/bench.py:decode    # against other libraries

`decode` reads models/smollm2-135m (`make smollm2`) and needs torch; the other peers live in
environments of their own, named by `peers.tunix_python` and `peers.llamacpp_python` (how to make
them: zerosearch_jax/jobs/peers/). A peer whose interpreter is not given is reported as not run.
"""

from ml_collections import ConfigDict

from zerosearch_jax.errors import UserError


def rollout() -> ConfigDict:
    generator = dict(
        slots=160, lockstep_slots=320, prefill_rows=16, decode_rows=(20, 60), burst_tokens=32
    )
    return ConfigDict(
        dict(
            job="bench",
            suite="rollout",
            repeats=5,
            mixes=("embedded", "long"),
            variants=(
                "lockstep",
                "without keep_cache",
                "without share_prompts",
                "without refill",
                "without return_early",
                "without compact",
            ),
            questions=64,
            group_size=5,
            policy=generator
            | dict(
                model="zerosearch_jax/assets/policy",
                max_tokens=640,
                prefill_buckets=(64, 128, 256),
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


PRESETS = {"": rollout, "rollout": rollout, "decode": decode}


def get_config(preset: str = "") -> ConfigDict:
    """The config of one of `PRESETS`."""
    if preset not in PRESETS:
        raise UserError(
            f"configs/bench.py has no preset {preset!r}; "
            f"the presets are {', '.join(filter(None, PRESETS))}"
        )
    return PRESETS[preset]()
