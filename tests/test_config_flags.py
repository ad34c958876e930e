"""Typed config sections: conversion, refusals with the full key, documentation of the fields."""

import dataclasses
import importlib
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from ml_collections import ConfigDict

from zerosearch_jax import config_flags, main
from zerosearch_jax.errors import UserError
from zerosearch_jax.training.workdir import keep_config

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Inner:
    """An inner section."""

    rate: float
    """Learning rate,
    in two lines."""
    names: tuple[str, ...]
    """Names."""

    def __post_init__(self):
        if self.rate < 0:
            raise UserError(f"rate={self.rate} must be at least 0")


@dataclass(frozen=True)
class Outer:
    """An outer section."""

    steps: int
    """Steps."""
    flag: bool
    """Flag."""
    limit: int | None
    """Limit."""
    inner: Inner
    parts: dict[str, Inner]
    sizes: dict[str, Any]
    """Sizes."""
    extra: Inner | None = None


def _mapping(**changes) -> dict:
    inner = dict(rate=1, names=["a", "b"])
    values = dict(steps=3, flag=True, limit=None, inner=inner, parts={"x": inner}, sizes={"a": 1})
    return values | changes


def test_typed_converts_nested_sections_and_plain_is_its_inverse():
    typed = config_flags.typed(Outer, ConfigDict(_mapping()))
    inner = Inner(rate=1.0, names=("a", "b"))
    assert typed == Outer(3, True, None, inner, {"x": inner}, {"a": 1})
    assert type(typed.inner.rate) is float
    assert config_flags.typed(Outer, config_flags.plain(typed)) == typed
    assert "extra" not in config_flags.plain(typed) and "limit" in config_flags.plain(typed)
    assert config_flags.typed(Outer, _mapping(extra=dict(rate=2, names=()))).extra.rate == 2.0


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        (dict(steps=1.0), ("config.steps=1.0", "int")),
        (dict(steps=True), ("config.steps=True", "int")),
        (dict(flag=1), ("config.flag=1", "bool")),
        (dict(limit="3"), ("config.limit='3'", "int")),
        (dict(inner=dict(rate="x", names=())), ("config.inner.rate='x'", "float")),
        (dict(inner=dict(rate=True, names=())), ("config.inner.rate=True", "float")),
        (dict(inner=dict(rate=1, names=("a", 2))), ("config.inner.names[1]=2", "str")),
        (dict(inner=dict(rate=1, names="ab")), ("config.inner.names='ab'", "tuple[str, ...]")),
        (dict(inner=dict(rate=1)), ("config.inner.names is missing", "tuple[str, ...]")),
        (dict(inner=3), ("config.inner=3", "Inner")),
        (dict(parts={"x": dict(rate=1, names=(), nam=2)}), ("config.parts.x.nam", "rate, names")),
        (dict(inner=dict(rate=-1, names=())), ("config.inner: rate=-1.0",)),
        (dict(stepz=1), ("config.stepz", "there is no such key")),
        (dict(burst_tokens=1), ("config.burst_tokens", "use config.chunk_tokens")),
        (dict(judge={}), ("config.judge", "use config.labeling")),
    ],
)
def test_wrong_section_is_refused_in_one_line_with_the_full_key(changes, parts):
    with pytest.raises(UserError) as refused:
        config_flags.typed(Outer, _mapping(**changes))
    message = str(refused.value)
    assert all(part in message for part in parts) and "\n" not in message


def test_missing_key_is_refused_unless_its_default_is_none():
    mapping = _mapping()
    del mapping["limit"]
    with pytest.raises(UserError, match="config.limit is missing"):
        config_flags.typed(Outer, mapping)


def test_field_docs_are_the_literals_below_the_fields():
    assert config_flags.field_docs(Inner) == {
        "rate": "Learning rate, in two lines.",
        "names": "Names.",
    }


def _sections(cls: type) -> set[type]:
    found = {cls}
    for hint in typing.get_type_hints(cls).values():
        for one in (hint, *typing.get_args(hint)):
            if dataclasses.is_dataclass(one):
                found |= _sections(one)
    return found


@pytest.mark.parametrize("name", main.CONFIGS.values())
def test_every_key_of_every_config_is_documented(name):
    module, _, cls = name.rpartition(".")
    root = getattr(importlib.import_module(f"zerosearch_jax.{module}"), cls)
    for section in _sections(root):
        assert section.__doc__ and not section.__doc__.startswith(f"{section.__name__}(")
        docs = config_flags.field_docs(section)
        for field, hint in typing.get_type_hints(section).items():
            nested = any(map(dataclasses.is_dataclass, (hint, *typing.get_args(hint))))
            assert nested or docs.get(field), f"{section.__name__}.{field}"


@pytest.mark.parametrize(
    ("file", "key", "value", "parts"),
    [
        ("eval", "engines.bm25.engine", "web", ("engines.bm25", "needs web and remote")),
        ("eval", "engines.bm25.engine", "google", ("engines.bm25", "'google'", "recorded_web")),
        ("grpo", "eval.every", 0, ("config.eval", "every=0")),
        ("grpo", "checkpoint_every", 0, ("checkpoint_every=0",)),
        ("grpo", "policy.generator.dtype", "int4", ("config.policy.generator", "'int4'")),
        ("sft_simulator", "data.examples", "answers", ("needs source and split",)),
        ("collect", "labeling.model", "", ("labeling.kind=reader", "labeling.model")),
        ("simulator_report", "limit", 0, ("limit=0",)),
    ],
)
def test_wrong_value_of_a_section_is_refused_before_anything_is_built(file, key, value, parts):
    config = config_flags.load(str(ROOT / "configs" / f"{file}.py"))
    config.update_from_flattened_dict({key: value})
    with pytest.raises(UserError) as refused:
        config_flags.typed(main.config_class(config), config)
    assert all(part in str(refused.value) for part in parts)


def test_kept_config_prints_a_warning_per_changed_key(tmp_path, capsys):
    config = ConfigDict(dict(kl=dict(coef=0.01), rl=dict(sizes=(1, 2)), seed=0))
    keep_config(config, tmp_path)
    keep_config(config, tmp_path)
    assert capsys.readouterr().out == ""
    config.kl.coef = 0.1
    config.rl.steps = 3
    del config["seed"]
    keep_config(config, tmp_path)
    changes = [line.partition("config.")[2] for line in capsys.readouterr().out.splitlines()]
    assert changes == ["kl.coef: 0.01 → 0.1", "seed: 0 → 'absent'", "rl.steps: 'absent' → 3"]
    keep_config(config, tmp_path)
    assert capsys.readouterr().out == ""


def test_kept_config_names_changed_contents_without_their_fingerprints(tmp_path, capsys):
    for sha256 in ("aa11", "bb22"):
        keep_config({"seed": 0, "contents": {"training questions": sha256}}, tmp_path)
    warning = capsys.readouterr().out
    assert "the content of training questions has changed" in warning
    assert "aa11" not in warning


@pytest.mark.parametrize("before", ["{}", '{"format": 1, "seed": 0}'])
def test_workdir_of_an_older_version_is_refused(tmp_path, before):
    (tmp_path / "config.json").write_text(before)
    with pytest.raises(UserError, match="older version.* new --workdir") as refused:
        keep_config(ConfigDict(dict(seed=0)), tmp_path)
    assert str(tmp_path) in str(refused.value)
    assert (tmp_path / "config.json").read_text() == before
