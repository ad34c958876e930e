"""Tests of the sft job end to end on a tiny model."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import load_file

from zerosearch_jax import config_flags
from zerosearch_jax.data import sft_data
from zerosearch_jax.data.embedded.scripted_agent import Segment
from zerosearch_jax.data.packing import TokenSequence
from zerosearch_jax.errors import UserError
from zerosearch_jax.jobs import sft
from zerosearch_jax.models import lora
from zerosearch_jax.models.config import to_hf
from zerosearch_jax.models.directory import read_model_files
from zerosearch_jax.simulator.pairs import Pair, save_pairs
from zerosearch_jax.telemetry.metrics import METRICS
from zerosearch_jax.text.prompts import simulator_prompt
from zerosearch_jax.text.tokenizer import encode, encode_prompt, load_tokenizer

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("compiled_once")
EXAMPLES = [
    [Segment(f"Query: capital of land {i}\nUseful Output:", False), Segment(f" Doc 1: {i}.", True)]
    for i in range(40)
]


GIVEN = "given.jsonl"  # name of an empty file of config.data.examples that loads EXAMPLES
WEIGHTS = Path("model", "model.safetensors")


def _rows(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def config(monkeypatch, markov_model, tmp_path_factory):
    """configs/sft_simulator.py for seconds, on EXAMPLES."""
    given = tmp_path_factory.mktemp("examples") / GIVEN
    given.touch()
    load_examples = sft.load_examples
    monkeypatch.setattr(
        sft,
        "load_examples",
        lambda config: EXAMPLES if config.data.examples == str(given) else load_examples(config),
    )
    config = config_flags.load(str(ROOT / "configs" / "sft_simulator.py"))
    config.update(
        dict(
            init=str(markov_model),
            data=dict(examples=str(given), validation="", validation_examples=8),
            optimizer=dict(warmup_steps=2),
            learner=dict(row_tokens=128, rows=2),
            sft=dict(steps=6, examples_per_step=8, eval_every=3, checkpoint_every=3),
        )
    )
    return config


def test_a_run_learns_and_writes_metrics_and_a_model(config, tmp_path):
    sft.run(config, str(tmp_path))
    rows = _rows(tmp_path)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert all(row.keys() - {"step"} <= METRICS.keys() for row in rows)
    assert rows[-1]["loss/total"] < rows[0]["loss/total"]
    assert all(np.isfinite(value) for row in rows for value in row.values())
    assert rows[5]["sft/heldout_loss"] < rows[2]["sft/heldout_loss"]
    exported = read_model_files(tmp_path / "model")
    assert exported.config.vocab_size == len(exported.tokenizer)
    assert exported.generation == read_model_files(config.init).generation

    # Repeating the finished command changes nothing.
    weights = (tmp_path / WEIGHTS).read_bytes()
    sft.run(config, str(tmp_path))
    assert (tmp_path / WEIGHTS).read_bytes() == weights
    assert _rows(tmp_path) == rows


def test_the_loss_covers_exactly_the_completion_and_the_end_token(markov_model):
    tokenizer = load_tokenizer(markov_model)
    sequence = sft_data.tokenise(
        EXAMPLES[7], tokenizer, system="", inserted_weight=0.0, end_of_text=True
    )
    documents = [*encode(tokenizer, " Doc 1: 7."), tokenizer.eos_token_id]
    mask = np.asarray(sequence.mask)
    assert [t for t, m in zip(sequence.tokens, mask, strict=True) if m] == documents
    assert mask[-len(documents) :].all() and mask.sum() == len(documents)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(learner=dict(row_tokens=8)), "no example fits config.learner.row_tokens=8"),
        (dict(data=dict(validation_examples=40)), "config.data.validation_examples=40"),
        (
            dict(sft=dict(examples_per_step=33)),
            "config.sft.examples_per_step=33 is more than the 32",
        ),
    ],
)
def test_a_wrong_setting_is_refused(config, tmp_path, change, message):
    config.update(change)
    with pytest.raises(UserError, match=message):
        sft.run(config, str(tmp_path / "new"))
    assert not (tmp_path / "new").exists()


def test_a_refused_resume_keeps_the_tokenizer_of_the_run(
    config, tmp_path, tiny_config, monkeypatch
):
    """A run from scratch trains its tokenizer on the examples, which are other ones now."""
    learner = SimpleNamespace(init=lambda *_: None)
    monkeypatch.setattr(sft, "initial_model", lambda *_: (tiny_config, None, {}))
    monkeypatch.setattr(sft, "make_learner", lambda *_: learner)
    other = {"config.data": "other", "config.init": "", "config.lora.alpha": 0.0}
    monkeypatch.setattr(sft, "resume", lambda *_: (None, 3, {"inputs": other}))
    (tmp_path / "model").mkdir()
    kept = tmp_path / "model" / "tokenizer.json"
    kept.write_text("of the run")
    with config.unlocked():
        config.update(dict(init="", vocab_size=300, model=to_hf(tiny_config)))
    with pytest.raises(UserError, match="content of config.data"):
        sft.run(config, str(tmp_path))
    assert kept.read_text() == "of the run"


def test_examples_longer_than_the_models_positions_are_refused(tiny_config):
    fitting = TokenSequence([0] * tiny_config.max_positions, [1.0] * tiny_config.max_positions)
    sft.check_positions(tiny_config, [fitting])
    longer = TokenSequence([*fitting.tokens, 0], [*fitting.mask, 1.0])
    with pytest.raises(UserError, match="has 1025 tokens, .* 1024 positions"):
        sft.check_positions(tiny_config, [fitting, longer])


def _pairs(path: Path, answers: list[str]) -> str:
    """Writes a file with one pair per answer; returns its path."""
    pairs = [
        Pair(
            f"p{i}", f"find {i}", (f"It is {a}.", f"Not {a}."), f"Who is {i}?", (a,), "useful", True
        )
        for i, a in enumerate(answers)
    ]
    save_pairs(path, pairs)
    return str(path)


@pytest.fixture
def overfitting(config, tmp_path):
    """A config that overfits: four pairs, a high learning rate, contradicting held-out pairs."""
    config.update(
        dict(
            data=dict(
                examples=_pairs(tmp_path / "pairs.jsonl", ["Chad"] * 4),
                validation=_pairs(tmp_path / "heldout.jsonl", ["Peru"] * 3),
            ),
            optimizer=dict(learning_rate=3e-2, warmup_steps=0, schedule_steps=40),
            learner=dict(row_tokens=384),
            sft=dict(steps=40, examples_per_step=4, eval_every=2, checkpoint_every=3, patience=2),
        )
    )
    return config


def test_patience_stops_an_overfitting_run_and_exports_the_best_weights(overfitting, tmp_path):
    sft.run(overfitting, str(tmp_path / "run"))
    rows = _rows(tmp_path / "run")
    losses = {r["step"]: r["sft/heldout_loss"] for r in rows if "sft/heldout_loss" in r}
    best = min(losses, key=losses.get)
    assert len(rows) == best + 4 < 40  # Two evaluations without a lower loss.
    assert list(losses) == list(range(2, best + 5, 2))
    assert rows[-1]["loss/total"] < rows[best - 1]["loss/total"]  # The training loss kept falling.

    exported = (tmp_path / "run" / WEIGHTS).read_bytes()
    for which, same in (("best", True), ("latest", False)):
        sft.export_checkpoint(overfitting, str(tmp_path / "run"), which)
        step = best if same else best + 4
        written = (tmp_path / "run" / "exports" / str(step) / WEIGHTS).read_bytes()
        assert (written == exported) is same
    overfitting.sft.patience = 0
    for steps, same in ((best, True), (best + 4, False)):
        overfitting.sft.steps = steps
        workdir = tmp_path / f"until{steps}"
        sft.run(overfitting, str(workdir))
        assert ((workdir / WEIGHTS).read_bytes() == exported) is same
        assert not (workdir / "best").exists()

    # Repeating the stopped command changes nothing.
    overfitting.update(dict(sft=dict(steps=40, patience=2)))
    sft.run(overfitting, str(tmp_path / "run"))
    assert _rows(tmp_path / "run") == rows
    assert (tmp_path / "run" / WEIGHTS).read_bytes() == exported


def test_resume_with_a_best_step_ahead_of_the_checkpoint_is_bit_identical(
    overfitting, tmp_path, monkeypatch
):
    overfitting.update(dict(sft=dict(steps=6, patience=1), optimizer=dict(learning_rate=1e-3)))
    sft.run(overfitting, str(tmp_path / "whole"))

    class Interrupted(sft.Progress):
        def update(self, done, metrics):
            if done == 5:
                raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sft, "Progress", Interrupted)
        with pytest.raises(KeyboardInterrupt):
            sft.run(overfitting, str(tmp_path / "cut"))
    assert (tmp_path / "cut" / "best" / "4").is_dir()
    assert not (tmp_path / "cut" / "checkpoints" / "4").exists()
    sft.run(overfitting, str(tmp_path / "cut"))
    assert _rows(tmp_path / "cut") == _rows(tmp_path / "whole")
    whole, cut = ((tmp_path / name / WEIGHTS).read_bytes() for name in ("whole", "cut"))
    assert whole == cut


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 143)]
)
def test_resume_after_a_signal_is_bit_identical(overfitting, tmp_path, number, status):
    sft.run(overfitting, str(tmp_path / "whole"))
    path = tmp_path / "config.py"
    path.write_text(
        "from ml_collections import ConfigDict\n\n\n"
        f"def get_config():\n    return ConfigDict({overfitting.to_dict()!r})\n"
    )
    workdir = tmp_path / "killed"
    command = [sys.executable, "-m", "zerosearch_jax.main", f"--config={path}"]
    command += [f"--workdir={workdir}"]
    with (tmp_path / "log").open("w") as log:
        run = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
        deadline = time.monotonic() + 300
        while not (workdir / "checkpoints" / "3").is_dir() and run.poll() is None:
            assert time.monotonic() < deadline, "no third step in five minutes"
            time.sleep(0.01)
        run.send_signal(number)
        assert run.wait() == status, (tmp_path / "log").read_text()
    again = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=300, env=os.environ
    )
    assert again.returncode == 0, again.stderr
    assert (workdir / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()
    assert _rows(workdir) == _rows(tmp_path / "whole")
    overfitting.data.examples = _pairs(tmp_path / "pairs.jsonl", ["Chad"] * 3 + ["Mali"])
    with pytest.raises(UserError, match="content of config.data"):
        sft.run(overfitting, str(workdir))


def test_pairs_have_the_prompt_of_the_simulated_engine(overfitting, markov_model):
    config, tokenizer = overfitting, load_tokenizer(markov_model)
    sequence = sft.fitting_sequences(sft.load_examples(config), tokenizer, config)[0]
    prompt = simulator_prompt("Who is 0?", "Chad", "find 0", False, "finetuned", 2)
    prompt = encode_prompt(tokenizer, prompt, system="")
    assert sequence.tokens[: len(prompt)] == prompt
    assert not any(sequence.mask[: len(prompt)]) and all(sequence.mask[len(prompt) :])
    documents = encode(tokenizer, " Doc 1: It is Chad.\nDoc 2: Not Chad.")
    assert sequence.tokens[len(prompt) :] == [*documents, tokenizer.eos_token_id]


def test_adapters_are_saved_and_merged_into_the_exported_model(config, tmp_path, markov_model):
    config.update(
        dict(
            lora=dict(rank=2, alpha=8.0, targets=("q", "down")),
            optimizer=dict(learning_rate=1e-2, warmup_steps=0),
            sft=dict(steps=2, eval_every=1, checkpoint_every=2, patience=1),
        )
    )
    sft.run(config, str(tmp_path))
    base = load_file(markov_model / "model.safetensors")
    merged = load_file(tmp_path / WEIGHTS)
    adapters = load_file(tmp_path / "adapters" / lora.ADAPTER_WEIGHTS)
    for name, weight in base.items():
        prefix = f"base_model.model.{name.removesuffix('.weight')}"
        change = np.zeros_like(weight)
        if "q_proj" in name or "down_proj" in name:
            a, b = (adapters.pop(f"{prefix}.lora_{factor}.weight") for factor in "AB")
            change = 8.0 / 2 * b @ a
            assert np.abs(change).max() > 0
        np.testing.assert_allclose(merged[name], weight + change, atol=1e-5, rtol=1e-5)
    assert not adapters
    written = json.loads((tmp_path / "adapters" / lora.ADAPTER_CONFIG).read_text())
    assert (written["r"], written["base_model_name_or_path"]) == (2, str(markov_model))
    # Adapters of another base or scale have the same shapes.
    base = shutil.copytree(markov_model, tmp_path / "base")
    (base / "vocab.txt").write_text("another content")
    for change, message in (
        (dict(lora=dict(alpha=16.0)), "config.lora.alpha"),
        (dict(init=str(base)), "content of config.init"),
    ):
        other = config.copy_and_resolve_references()
        other.update(change)
        with pytest.raises(UserError, match=message):
            sft.run(other, str(tmp_path))
        with pytest.raises(UserError, match=message):
            sft.export_checkpoint(other, str(tmp_path), "latest")


def test_profile_steps_writes_a_trace(config, tmp_path):
    config.sft.update(dict(steps=2, eval_every=2, checkpoint_every=2))
    sft.run(config, str(tmp_path), profile_steps=(2,))
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_damaged_metrics_are_refused_before_the_examples_are_loaded(config, tmp_path, monkeypatch):
    monkeypatch.setattr(sft, "load_data", lambda *_: pytest.fail("the examples were loaded"))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2, "loss": "x"}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl: row 2: loss: expected a number"):
        sft.run(config, str(tmp_path))
