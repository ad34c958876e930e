"""Reports the quality of a simulator before RL: can a fixed reader answer from its documents?

  python -m zerosearch_jax.main --config=configs/simulator_report.py \
      --config.simulators.finetuned.simulator.model=runs/sft_simulator/model

| preset | hardware | time | reads | score |
|---|---|---|---|---|
| (none) | 1 CPU core | 3 min | runs/collect | docs/miniature/simulator.md |
| smollm2-135m-wikipedia | 2 CPU cores | 20 min | runs/wikipedia | docs/wikipedia_simulator.md |

The job reads the held-out pairs of configs/collect.py and writes report.md and report.json. It
reports the fine-tuned simulator, and the model from which it was fine-tuned with the prompt for
untuned models. To make RL refuse a simulator that fails the gate, set
`--config.search.simulator.gate.report=runs/simulator_report/report.json` and the gate's
`useful_min` and `noisy_max`.

SmolLM2-135M on Wikipedia (the reader is the agent that collected the episodes):

  make run CONFIG=configs/simulator_report.py:smollm2-135m-wikipedia \
      ARGS=--workdir=runs/wikipedia/report
"""

from pathlib import Path

from ml_collections import ConfigDict

from zerosearch_jax import config_flags

READER = "zerosearch_jax/assets/reader"


def embedded() -> ConfigDict:
    """The default: sets every key, small enough for two CPU cores."""
    training = config_flags.load(str(Path(__file__).with_name("grpo.py")))
    finetuned = training.search.to_dict()
    prompted = training.search.copy_and_resolve_references()
    prompted.simulator.update(
        dict(
            model=READER,
            form="prompted",
            # The prompt is longer, because it contains an example.
            generator=dict(max_tokens=832, window_tokens=832, prefill_buckets=(640,)),
        )
    )
    return ConfigDict(
        dict(
            job="simulator_report",
            seed=0,
            mesh=dict(data=1, fsdp=1, tensor=1),
            pairs="runs/collect/heldout.jsonl",
            limit=150,
            reader=dict(
                model=READER,
                generator=training.policy.generator.to_dict(),
                response_tokens=64,
                observation_tokens=192,
            ),
            simulators=dict(finetuned=finetuned, prompted=prompted.to_dict()),
        )
    ).lock()


def smollm2_135m_wikipedia() -> ConfigDict:
    """Three documents per search, up to 400 tokens together."""
    config = embedded()

    def generator(prompt_tokens: int, new_tokens: int) -> dict:
        size = prompt_tokens + new_tokens
        return dict(
            slots=32,
            max_tokens=size,
            window_tokens=size,
            prefill_rows=4,
            prefill_buckets=(prompt_tokens,),
            decode_rows=(),
        )

    def simulated(model: str, prompt_tokens: int) -> dict:
        sizes = dict(max_new_tokens=400, generator=generator(prompt_tokens, 400))
        return dict(topk=3, simulator=dict(model=model, **sizes))

    config.update(
        dict(
            pairs="runs/wikipedia/collect/heldout.jsonl",
            limit=16,
            reader=dict(
                model="runs/sft_smollm2/model",
                observation_tokens=384,
                generator=generator(640, 64),
            ),
            simulators=dict(
                finetuned=simulated("runs/wikipedia/simulator/model", 192),
                prompted=simulated("models/smollm2-135m", 448),
            ),
        )
    )
    return config


PRESETS = {"": embedded, "smollm2-135m-wikipedia": smollm2_135m_wikipedia}


def get_config(preset: str = "") -> ConfigDict:
    """Returns the config of one of `PRESETS`."""
    return config_flags.choose(PRESETS, preset, __file__)()
