"""Fingerprints follow content and not paths; a resumed run must have its first base model."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest

from zerosearch_jax.data.qa import QARow
from zerosearch_jax.errors import UserError
from zerosearch_jax.training.fingerprints import (
    check_base,
    engine_sha256,
    model_sha256,
    rows_sha256,
)
from zerosearch_jax.training.sections import SearchConfig, WebConfig


@pytest.fixture
def model(tmp_path, markov_model):
    """A model directory without weights that matter."""
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_bytes((markov_model / "config.json").read_bytes())
    for name in ("a.safetensors", "b.safetensors", "tokenizer.json", "README.md"):
        (directory / name).write_text(name)
    return directory


@pytest.mark.parametrize("name", ["b.safetensors", "tokenizer.json", "chat_template.jinja"])
def test_a_models_fingerprint_covers_weights_and_tokenizer(model, name):
    before = model_sha256(model)
    (model / "README.md").write_text("other words")
    copy = model.rename(model.parent / "moved")
    assert model_sha256(copy) == before
    (copy / name).write_text("changed")
    assert model_sha256(copy) != before


def test_content_moved_between_files_changes_the_fingerprint(model):
    before = model_sha256(model)
    texts = [(model / name).read_text() for name in ("a.safetensors", "b.safetensors")]
    (model / "a.safetensors").write_text("".join(texts))
    (model / "b.safetensors").write_text("")
    assert model_sha256(model) != before


def test_directories_and_broken_links_have_no_content(model):
    before = model_sha256(model)
    (model / "original.json").mkdir()
    (model / "gone.safetensors").symlink_to("missing")
    assert model_sha256(model) == before


def test_a_directory_without_weights_has_no_fingerprint(model):
    for path in model.glob("*.safetensors"):
        path.unlink()
    with pytest.raises(UserError, match="holds no .safetensors file"):
        model_sha256(model)


def test_every_part_of_a_question_counts():
    row = QARow("1", "Who?", ("Ada",), "file")
    changes = [dict(id="2"), dict(question="Who"), dict(golden_answers=("Ada", "A."))]
    found = {rows_sha256([row]), *(rows_sha256([replace(row, **change)]) for change in changes)}
    assert len(found | {rows_sha256([row, row]), rows_sha256([])}) == 6


def test_an_engines_fingerprint_is_the_content_of_its_file(tmp_path):
    path = tmp_path / "passages.jsonl"
    path.write_text("one")
    web = WebConfig(provider="serper", recording=str(path), blocked_domains=())
    engines = [
        SearchConfig(engine="bm25", topk=1, corpus=str(path)),
        SearchConfig(engine="noisy_bm25", topk=1, corpus=str(path), noise=0.5),
        SearchConfig(engine="recorded_web", topk=1, web=web),
    ]
    before = [engine_sha256(engine) for engine in engines]
    path.write_text("two")
    assert all(b != engine_sha256(e) for b, e in zip(before, engines, strict=True))
    assert engine_sha256(replace(engines[0], corpus="world")) == ""


def test_a_run_with_checkpoints_keeps_its_base_model_and_adapter_scale(model, tmp_path):
    def config(name: str, rank: int = 0, alpha: float = 32.0):
        lora = SimpleNamespace(rank=rank, alpha=alpha)
        return SimpleNamespace(policy=SimpleNamespace(model=name), lora=lora)

    sha256 = model_sha256(model)
    before = {"policy": {"model": "models/first"}, "contents": {"policy.model": sha256}}
    before |= {"lora": {"rank": 0, "alpha": 32}}
    workdir = tmp_path / "run"
    check_base(workdir, None, config("a"), sha256)  # a new run
    check_base(workdir, before, config("a"), "other")  # nothing is trained yet
    (workdir / "checkpoints" / "5").mkdir(parents=True)
    check_base(workdir, json.loads(json.dumps(before)), config("moved"), sha256)
    with pytest.raises(UserError, match="models/first .* another --workdir"):
        check_base(workdir, before, config("a"), "other")
    check_base(workdir, before, config("a", alpha=8.0), sha256)  # no adapters
    check_base(workdir, before, config("a", rank=2), sha256)
    with pytest.raises(UserError, match="lora.alpha=32, .* 8.0"):
        check_base(workdir, before, config("a", rank=2, alpha=8.0), sha256)
