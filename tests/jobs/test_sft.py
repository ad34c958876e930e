"""The sft job end to end, tiny, and what a config may leave out."""

import json
from pathlib import Path

import numpy as np
import pytest

from zerosearch_jax import config_check
from zerosearch_jax.data import sft_data
from zerosearch_jax.data.transcripts import Segment
from zerosearch_jax.errors import UserError
from zerosearch_jax.jobs import sft
from zerosearch_jax.models.config import read_config
from zerosearch_jax.telemetry.metrics import METRICS
from zerosearch_jax.text.tokenizer import encode, load_tokenizer

ROOT = Path(__file__).parents[2]
EXAMPLES = [
    [Segment(f"Query: capital of land {i}\nUseful Output:", False), Segment(f" Doc 1: {i}.", True)]
    for i in range(40)
]


@pytest.fixture
def config(monkeypatch, markov_model):
    """configs/sft_simulator.py with sizes for seconds and examples given here."""
    asked = {}

    def examples(**arguments):
        asked.update(arguments)
        return EXAMPLES

    monkeypatch.setattr(sft_data, "simulator_examples", examples)
    config = config_check.load(str(ROOT / "configs" / "sft_simulator.py"))
    config.update(
        dict(
            init=str(markov_model),
            data=dict(validation_examples=8),
            optimizer=dict(warmup_steps=2),
            learner=dict(row_tokens=128, rows=2),
            sft=dict(steps=6, examples_per_step=8, eval_every=3, checkpoint_every=3),
        )
    )
    yield config
    sizes = {"worlds": 12, "entities_per_world": 120, "questions_per_world": 330}
    assert asked in ({}, sizes | {"topk": 2, "seed": 0})


def test_a_run_learns_writes_its_figures_and_a_model_and_goes_on(config, tmp_path):
    sft.run(config, str(tmp_path))
    path = tmp_path / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert all(row.keys() - {"step"} <= METRICS.keys() for row in rows)
    assert rows[-1]["loss/total"] < rows[0]["loss/total"]
    assert all(np.isfinite(value) for row in rows for value in row.values())
    assert rows[5]["sft/heldout_loss"] < rows[2]["sft/heldout_loss"]
    tokenizer = load_tokenizer(tmp_path / "model")
    assert read_config(tmp_path / "model").vocab_size == len(tokenizer)

    # The same command on the same directory has nothing left to do and changes nothing.
    weights = (tmp_path / "model" / "model.safetensors").read_bytes()
    sft.run(config, str(tmp_path))
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == weights
    assert [json.loads(line) for line in path.read_text().splitlines()] == rows


def test_the_loss_falls_on_what_the_model_is_to_write_and_on_the_end(markov_model):
    tokenizer = load_tokenizer(markov_model)
    sequence = sft_data.tokenise(
        EXAMPLES[7], tokenizer, system="", inserted_weight=0.0, end_of_text=True
    )
    documents = [*encode(tokenizer, " Doc 1: 7."), tokenizer.eos_token_id]
    mask = np.asarray(sequence.mask)
    assert [t for t, m in zip(sequence.tokens, mask, strict=True) if m] == documents
    assert mask[-len(documents) :].all() and mask.sum() == len(documents)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (dict(data=dict(examples="poems")), "choose policy_transcripts or simulator_pairs"),
        (dict(data=dict(validation_examples=40)), "config.data.validation_examples=40"),
        (dict(init="no/such/place"), "no/such/place"),
        (
            dict(sft=dict(examples_per_step=33)),
            "config.sft.examples_per_step=33 is more than the 32",
        ),
    ],
)
def test_a_wrong_setting_is_refused(config, tmp_path, change, told):
    config.update(change)
    with pytest.raises(UserError, match=told):
        sft.run(config, str(tmp_path))
    assert not (tmp_path / "metrics.jsonl").exists()
