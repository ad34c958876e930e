"""Reports what a simulator is worth, before RL: can a fixed reader answer from its documents?

  python -m zerosearch_jax.main --config=configs/simulator_report.py \
      --config.simulators.finetuned.simulator.model=runs/sft_simulator/model

It reads the held-out pairs of configs/collect.py and writes report.md and report.json. With
`--config.search.simulator.gate.report=runs/simulator_report/report.json` and the gate's
`useful_min` and `noisy_max`, training refuses a simulator that does not reach them.
Beside the fine-tuned simulator stands what it was made from, asked with the prompt for untuned
models.
"""

from pathlib import Path

from ml_collections import ConfigDict

from zerosearch_jax import config_check

READER = "zerosearch_jax/assets/reader"


def get_config(preset: str = "") -> ConfigDict:
    training = config_check.load(str(Path(__file__).with_name("grpo.py")))
    finetuned = training.search.to_dict()
    prompted = training.search.copy_and_resolve_references()
    prompted.simulator.update(
        dict(
            model=READER,
            form="prompted",
            # The worked example makes the prompt longer.
            generator=dict(max_tokens=832, window_tokens=832, prefill_buckets=(640,)),
        )
    )
    return ConfigDict(
        dict(
            job="simulator_report",
            seed=0,
            mesh=dict(data=1, fsdp=1, tensor=1),
            pairs="runs/collect/heldout.jsonl",
            limit=150,  # pairs of either label; of more, as many are drawn
            reader=dict(
                model=READER,
                generator=training.policy.generator.to_dict(),
                response_tokens=64,
                observation_tokens=192,
            ),
            simulators=dict(finetuned=finetuned, prompted=prompted.to_dict()),
        )
    ).lock()
