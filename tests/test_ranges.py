"""Field types: every number has a range, every fixed set is a type, `typed` refuses the rest."""

import dataclasses
import math
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zerosearch_jax import config_flags, main
from zerosearch_jax.errors import UserError
from zerosearch_jax.ranges import Choice, Range
from zerosearch_jax.training.validate import sections

ROOT = Path(__file__).parents[1]
PRESETS = {"collect", "algorithms", "compile", "eval:simulated", "eval:web", "miniature"}
PRESETS |= {"grpo", "sft_answers", "sft_policy", "simulator_report"}
PRESETS |= {f"bench:{suite}" for suite in ("rollout", "decode", "learner")}
PRESETS |= {"bench:decode-gpu", "bench:learner-gpu"}
"""Config files that together have every section."""


@given(
    bounds=st.tuples(st.integers(-5, 5), st.integers(-5, 5)).map(sorted),
    is_open=st.tuples(st.booleans(), st.booleans()),
    value=st.one_of(st.integers(-7, 7), st.floats(-7, 7)),
)
def test_a_value_breaks_a_bound_exactly_if_it_is_outside(bounds, is_open, value):
    (low, high), (open_low, open_high) = bounds, is_open
    above = low < value if open_low else low <= value
    below = value < high if open_high else value <= high
    broken = Range(low, high, open_low, open_high).broken_bound(value)
    assert (broken == "") == (above and below)
    assert not broken or str(high if above else low) in broken


def _config(name: str):
    file, _, preset = name.partition(":")
    config = config_flags.load(str(ROOT / "configs" / f"{file}.py") + f":{preset}")
    return config_flags.typed(main.config_class(config), config)


@pytest.fixture(scope="module")
def examples() -> dict[type, Any]:
    """A valid section of every class, from the config files."""
    return {
        type(section): section
        for name in sorted(PRESETS)
        for _, section in sections(_config(name), object)
        if dataclasses.is_dataclass(section)
    }


def _classes(cls: type) -> Iterator[type]:
    yield cls
    for hint in typing.get_type_hints(cls).values():
        for inner in (hint, *typing.get_args(hint)):
            if dataclasses.is_dataclass(inner):
                yield from _classes(inner)


def test_the_examples_have_a_section_of_every_class(examples):
    roots = [path.rpartition(".") for path in main.CONFIGS.values()]
    for module, _, name in roots:
        root = getattr(__import__(f"zerosearch_jax.{module}", fromlist=[name]), name)
        assert set(_classes(root)) <= examples.keys()


def _numbers(hint: Any, wrap=lambda value: value) -> Iterator[tuple[type, Range | None, Any]]:
    """Yields type and range of each number in a field, and how a field with that number looks."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint in (int, float):
        yield hint, None, wrap
    elif origin is typing.Annotated and arguments[0] is not str:
        yield arguments[0], arguments[1], wrap
    elif origin in (types.UnionType, typing.Union):
        for inner in arguments:
            yield from _numbers(inner, wrap)
    elif origin is tuple:
        rest = [typing.get_args(inner)[1].low for inner in arguments[1:] if inner is not Ellipsis]
        yield from _numbers(arguments[0], lambda value: (value, *rest))
    elif origin is dict:
        yield from _numbers(arguments[1], lambda value: {"x": value})


def _outside(number: type, interval: Range) -> Iterator[Any]:
    """Values that a field of this type must refuse."""
    step = 1 if number is int else 0.5
    for bound, is_open, away in (
        (interval.low, interval.open_low, -step),
        (interval.high, interval.open_high, step),
    ):
        if math.isfinite(bound):
            yield bound if is_open else bound + away
    yield from (math.nan, math.inf, -math.inf, True, "1", "a")
    if number is int:
        yield from (1.5, 10**20)


def test_every_number_has_a_range_and_values_outside_are_refused_with_their_key(examples):
    checked = 0
    for cls, section in examples.items():
        for name, hint in typing.get_type_hints(cls, include_extras=True).items():
            for number, interval, wrap in _numbers(hint):
                assert interval is not None, f"{cls.__name__}.{name} has no range"
                for value in _outside(number, interval):
                    wrong = config_flags.plain(section) | {name: wrap(value)}
                    with pytest.raises(UserError) as refused:
                        config_flags.typed(cls, wrong, "config.here")
                    assert str(refused.value).startswith(f"config.here.{name}"), wrong[name]
                    checked += 1
    assert checked > 1000


FREE_TEXTS = {
    *("job", "suite"),  # checked by `main`, because they select the type of the config
    *("model", "init", "pairs", "report", "recording", "corpus", "recipe", "directory"),
    *("source", "eval_source", "split", "train_split", "eval_split", "test_split", "sets"),
    *("examples", "validation", "url", "key_variable", "blocked_domains", "preset", "prefix"),
    *("arms", "baselines", "noise_arms", "start_policies", "configs", "torch_device", "topology"),
    *("programs", "tunix_python", "llamacpp_python", "trl_python"),
}
"""Fields whose texts are the user's names or paths, not members of a fixed set."""


def _texts(hint: Any, wrap=lambda value: value) -> Iterator[tuple[Choice | None, Any]]:
    """Yields the set of each text in a field, and how a field with that text looks."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is str:
        yield None, wrap
    elif origin is typing.Annotated and arguments[0] is str:
        yield arguments[1], wrap
    elif origin in (types.UnionType, typing.Union):
        for inner in arguments:
            yield from _texts(inner, wrap)
    elif origin is tuple:
        yield from _texts(arguments[0], lambda value: (value,))
    elif origin is dict:
        yield from _texts(arguments[1], lambda value: {"x": value})


def test_every_text_has_a_set_or_is_free_and_wrong_texts_are_refused_with_their_key(examples):
    checked = 0
    for cls, section in examples.items():
        for name, hint in typing.get_type_hints(cls, include_extras=True).items():
            for choice, wrap in _texts(hint):
                assert (choice is None) == (name in FREE_TEXTS), f"{cls.__name__}.{name}"
                wrong = ["a\0b", "a\nb", "\udcff", 3, None, b"a"]
                if choice:
                    known = choice.known
                    wrong += ["", known[0].upper(), known[0][:-1], f"{known[-1]} ", known]
                if choice is None and type(None) in typing.get_args(hint):
                    wrong.remove(None)
                for value in wrong:
                    changed = config_flags.plain(section) | {name: wrap(value)}
                    with pytest.raises(UserError) as refused:
                        config_flags.typed(cls, changed, "config.here")
                    message = str(refused.value)
                    assert message.startswith(f"config.here.{name}") and message.isprintable()
                    if choice and type(value) is str:
                        assert known[-1] in message or "control character" in message
                    checked += 1
    assert checked > 300
