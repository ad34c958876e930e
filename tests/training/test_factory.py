"""Tests that jobs refuse a model directory before they read weights or compile."""

import json
import re
import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from zerosearch_jax import config_flags
from zerosearch_jax.errors import UserError
from zerosearch_jax.jobs import collect, evaluate, rl, sft, simulator_report
from zerosearch_jax.models.directory import read_model_files
from zerosearch_jax.simulator.pairs import Pair, save_pairs
from zerosearch_jax.text.tokenizer import load_tokenizer, save_tokenizer
from zerosearch_jax.training import factory

ROOT = Path(__file__).parents[2]
POLICY = ROOT / "zerosearch_jax" / "assets" / "policy"
ROWS = json.loads((POLICY / "config.json").read_text())["vocab_size"]


@pytest.fixture
def directory(tmp_path) -> Path:
    """A copy of the embedded policy, to be spoilt."""
    return Path(shutil.copytree(POLICY, tmp_path / "model"))


def add_token(directory):
    tokenizer = load_tokenizer(directory)
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(directory)


def set_key(directory, key, value, file="config.json"):
    path = directory / file
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(content | {key: value}))


def forbidden(*args, **options):
    raise AssertionError("weights were read")


JOBS = {
    "grpo": rl.run,
    "collect": collect.run,
    "eval": evaluate.run,
    "simulator_report": simulator_report.run,
    "sft_simulator": sft.run,
}


@pytest.mark.parametrize(
    ("name", "key", "more"),
    [
        ("grpo", "policy.model", {}),
        ("grpo", "search.simulator.model", {}),
        ("collect", "policy.model", {}),
        ("collect", "labeling.model", {"labeling.kind": "reader"}),
        ("collect", "labeling.model", {"labeling.kind": "local"}),
        ("eval", "policy.model", {}),
        ("simulator_report", "reader.model", {}),
        ("simulator_report", "simulators.prompted.simulator.model", {}),
        ("sft_simulator", "init", {}),
    ],
)
def test_every_job_checks_its_models_before_it_reads_weights(
    directory, tmp_path, questions, monkeypatch, name, key, more
):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(factory, "load_params", forbidden)
    add_token(directory)
    config = config_flags.load(f"configs/{name}.py")
    if name == "collect":
        more = more | {"data.source": str(questions)}
    if name == "eval":
        more = more | {"data.sets": (str(questions),)}
    pairs = tmp_path / "pairs.jsonl"
    save_pairs(pairs, [Pair("p", "q", ("a", "b"), "Who?", ("Chad",), "useful", True)])
    if name == "simulator_report":
        more = more | {"pairs": str(pairs)}
    if name == "sft_simulator":
        more = more | {"data.examples": str(pairs), "data.validation": str(pairs)}
    config.update_from_flattened_dict(more | {key: str(directory)})
    with pytest.raises(UserError, match=rf"{directory}: .* up to {ROWS} .*<extra>.* {ROWS} rows"):
        JOBS[name](config, str(tmp_path / "run"))


def test_sft_needs_the_end_token_that_it_writes(directory, tmp_path, monkeypatch):
    """Texts end at an id of config.json, but the tokenizer has no end-of-text token to write."""
    monkeypatch.setattr(factory, "load_params", forbidden)
    settings = json.loads((directory / "tokenizer_config.json").read_text())
    settings = {key: value for key, value in settings.items() if not key.endswith("_token")}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    config = config_flags.load(str(ROOT / "configs" / "sft_simulator.py"))
    pairs = tmp_path / "pairs.jsonl"
    save_pairs(pairs, [Pair("p", "q", ("a", "b"), "Who?", ("Chad",), "useful", True)])
    config.update(dict(init=str(directory), data=dict(examples=str(pairs), validation=str(pairs))))
    assert config.data.end_of_text
    with pytest.raises(UserError, match="no eos_token, .* config.data.end_of_text"):
        sft.run(config, str(tmp_path / "run"))


def test_a_tokenizer_with_fewer_ids_than_rows_is_normal(directory):
    tokenizer = json.loads((directory / "tokenizer.json").read_text())
    piece = max(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].get)
    del tokenizer["model"]["vocab"][piece]
    merges = tokenizer["model"]["merges"]
    tokenizer["model"]["merges"] = [merge for merge in merges if "".join(merge) != piece]
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert len(read_model_files(directory).tokenizer) == ROWS - 1


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: set_key(d, "num_hidden_layers", 3), "4 layers.*num_hidden_layers=3"),
        (lambda d: set_key(d, "hidden_size", 64), r"requires \(1536, 64\)"),
        (lambda d: set_key(d, "vocab_size", ROWS + 64), r"\(1536, 128\).*\(1600, 128\)"),
        (lambda d: set_key(d, "tie_word_embeddings", False), "lacks the tensor lm_head.weight"),
        (lambda d: set_key(d, "eos_token_id", [0, ROWS]), f"the end-of-text id {ROWS} "),
        (lambda d: set_key(d, "r", 8, "adapter_config.json"), "LoRA adapters"),
    ],
)
def test_files_that_contradict_each_other_are_refused(directory, monkeypatch, spoil, message):
    monkeypatch.setattr(factory, "load_params", forbidden)
    spoil(directory)
    with pytest.raises(UserError, match=rf"^{directory}.*{message}"):
        factory.check_model(str(directory), ())


def test_a_vocabulary_that_cannot_spell_a_stop_string_is_refused(directory):
    """The tokenizer has letters and "<", but no "/"."""
    letters = sorted(set("<>answerch"))
    tokenizer = Tokenizer(models.BPE({p: i for i, p in enumerate([*letters, "<eos>"])}, []))
    tokenizer.decoder = decoders.ByteLevel()
    save_tokenizer(tokenizer, directory, eos_token="<eos>")
    factory.check_model(str(directory), ("<search>",))
    with pytest.raises(UserError, match=r"cannot spell '</search>'.*b'<'.*b'/search>'"):
        factory.check_model(str(directory), ("<search>", "</search>"))


def test_ids_that_only_the_post_processor_has_count(directory):
    content = json.loads((directory / "tokenizer.json").read_text())
    first = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [first, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [ROWS + 7], "tokens": ["<s>"]}},
    }
    (directory / "tokenizer.json").write_text(json.dumps(content))
    assert PreTrainedTokenizerFast.from_pretrained(directory)("")["input_ids"] == [ROWS + 7]
    with pytest.raises(UserError, match=f"up to {ROWS + 7} "):
        read_model_files(directory)


def test_the_files_are_read_again_only_after_a_change(directory):
    first = read_model_files(directory)
    assert read_model_files(str(directory)) is first
    set_key(directory, "eos_token_id", [1, 2])
    assert read_model_files(directory).generation["eos_token_id"] == [0, 1, 2]
    (directory / "generation_config.json").write_text('{"eos_token_id": 3}')
    assert 3 in read_model_files(directory).generation["eos_token_id"]


def test_a_simulator_whose_template_refuses_a_system_turn_is_refused(directory):
    template = "{% if messages|length > 1 %}{{ raise_exception('no') }}{% endif %}"
    (directory / "chat_template.jinja").write_text(template + "{{ messages[-1].content }}")
    factory.check_model(str(directory), ())
    with pytest.raises(UserError, match=f"{directory}: .* a system and a user turn: no"):
        factory.check_model(str(directory), (), system="")


def test_a_path_that_is_not_a_model_directory_is_refused(directory, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "broken").symlink_to("missing")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "empty").mkdir()
    (tmp_path / "pickled").mkdir()
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(directory / name, tmp_path / "pickled")
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    for name in ("file", "broken", "loop", "empty", "pickled", "missing", "x" * 300, "nul\0"):
        with pytest.raises(UserError, match=re.escape(str(tmp_path / name))):
            read_model_files(tmp_path / name)
