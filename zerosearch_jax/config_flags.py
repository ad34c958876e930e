"""Config files, `--config.a.b=…` overrides and typed config sections, with one-line errors.

`ml_collections.config_flags` applies the overrides. This module adds the nearest key for a
misspelt one, the new name of a renamed one, the presets of a file, and `typed`, which turns a
ConfigDict into frozen dataclasses.
"""

import ast
import dataclasses
import difflib
import importlib.util
import inspect
import os
import re
import textwrap
import traceback
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from textwrap import fill
from typing import Any, TypeVar

from absl import flags
from ml_collections import ConfigDict, config_flags
from tabulate import tabulate

from zerosearch_jax.errors import UNPRINTABLE, UserError, one_line, reason, shown
from zerosearch_jax.ranges import MAX_FLOAT, MAX_INT, MIN_FLOAT

T = TypeVar("T")

_MOVED = {
    "optimizer": "learning_rate warmup_steps schedule_steps final_fraction beta1 beta2 "
    "weight_decay clip_norm moment_dtype",
    "advantage": "estimator baseline normalize_std gamma gae_lambda",
    "loss": "surrogate clip_low clip_high dual_clip aggregate fixed_tokens entropy llds "
    "importance_cap",
}
RENAMED_KEYS = {
    **{f"rl.{key}": f"{section}.{key}" for section, keys in _MOVED.items() for key in keys.split()},
    "rl.kl": "kl.coef",
    "rl.kl_estimator": "kl.estimator",
    "rl.kl_in": "kl.apply_to",
    "rl.kl_target": "kl.target",
    "rl.kl_horizon": "kl.horizon",
    "rl.nonfinite_limit": "watch.nonfinite_limit",
    "watch.stop": "watch.action",
    "critic.value": "critic.coef",
    "data.habits.astray": "data.behaviours.wrong_attribute",
    "data.habits": "data.behaviours",
    "judge": "labeling",
}
"""Old key or section: its new name. A key below a renamed section moves with it.

A key with an entry precedes its section.
"""
RENAMED_NAMES = {"burst_tokens": "chunk_tokens"}
"""Old last part of a key, in any section: its new name."""

# A suggestion that is less similar than this would confuse more than it helps.
_NEAR_ENOUGH = 0.5
_WIDTHS = (32, 32, 44)  # columns of `describe`: type, value, documentation
_VALUE_CHARACTERS = 2000
_MESSAGE_WIDTH = 300  # of the flag library's messages, which repeat the user's value


def parse(flag_values: flags.FlagValues, argv: Sequence[str]) -> ConfigDict:
    """Parses `argv` (program name first) into `flag_values` and returns the config.

    Raises:
      UserError: no or unknown config file, unknown preset, unknown or renamed key, unknown flag,
        or a value of the wrong type.
    """
    spec, rest = split_config(argv)
    config = load(spec)
    known = config.to_dict()
    for argument in rest:
        if match := re.match(r"--?(?:no)?config\.([^=]*)", argument):
            check_key(match[1], known)
    try:
        overridden = config_flags.DEFINE_config_dict(
            "config", config, flag_values=flag_values, sys_argv=rest
        )
        leftover = flag_values(rest)[1:]
    except flags.Error as error:
        raise UserError(_one_line(error, known)) from error
    if leftover:
        raise UserError(f"{leftover[0]!r} is not a flag; give values as --flag=value")
    return overridden.value


# Config files.


def load(spec: str) -> ConfigDict:
    """Returns `get_config(preset)` of the file in `spec`, which has the form `path.py[:preset]`.

    Raises:
      UserError: the file does not exist or raises an exception, or its `get_config` refuses the
        preset or returns no ConfigDict.
    """
    path, _, preset = spec.partition(":")
    get_config = getattr(load_module(path), "get_config", None)
    if not callable(get_config):
        raise UserError(f"--config={path}: the file has no function get_config; add it")
    with _named_errors_of(path, f"--config={spec}"):
        config = get_config(preset) if preset else get_config()
        if isinstance(config, ConfigDict):
            config.to_dict()  # fails for a required placeholder
            str(config)  # fails for an int of more than 4,300 digits, as in the flag library
            return config
    raise UserError(
        f"--config={spec}: get_config returned {type(config).__name__}; return a ConfigDict"
    )


def presets(path: str | Path) -> tuple[str, ...]:
    """Returns the names of the presets of a config file, "" (the default) left out."""
    module = load_module(path)
    with _named_errors_of(path, f"--config={path}"):
        return tuple(filter(None, map(str, getattr(module, "PRESETS", ()))))


def choose(options: Mapping[str, T], preset: str, path: str) -> T:
    """Returns the entry of `options` for the preset that the config file at `path` was given.

    Raises:
      UserError: there is no such preset. The message lists the presets.
    """
    if preset not in options:
        raise UserError(
            f"configs/{Path(path).name} has no preset {preset!r}; "
            f"the presets are {', '.join(filter(None, options))}"
        )
    return options[preset]


def load_module(path: str | Path) -> types.ModuleType:
    """Executes a config file and returns its module.

    Raises:
      UserError: there is no such file, or its code raises an exception.
    """
    module_spec = importlib.util.spec_from_file_location("zerosearch_config", path)
    if module_spec is None or module_spec.loader is None or not os.path.isfile(path):
        raise UserError(f"--config={path}: there is no such Python file{_files_next_to(path)}")
    module = importlib.util.module_from_spec(module_spec)
    with _named_errors_of(path, f"--config={path}"):
        module_spec.loader.exec_module(module)
    return module


@contextmanager
def _named_errors_of(path: str | Path, flag: str) -> Iterator[None]:
    """Raises an exception of a config file's code as a UserError with the file's line.

    A config file is the user's code, so the user must fix its errors, `sys.exit` included.
    """
    try:
        yield
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        lines = [line for frame, line in traceback.walk_tb(error.__traceback__)
                 if frame.f_code.co_filename == os.path.abspath(path)]  # fmt: skip
        if isinstance(error, SyntaxError) and error.lineno:
            lines.append(error.lineno)
        at = f", line {lines[-1]}" if lines else ""
        raise UserError(
            f"{flag}{at}: {type(error).__name__}: {reason(error)}; fix the file"
        ) from error


# Keys.


def check_key(key: str, config: Mapping[str, Any]) -> None:
    """Raises UserError if the nested `config` has no `key` ("a.b").

    The message names the new key if `key` was renamed, else the nearest one. An element of a tuple
    is not a key.
    """
    known = dict(_entries(config))
    name, bracket, _ = key.partition("[")
    if bracket and name in known:  # absl would try to assign to an element of a tuple
        raise UserError(
            f"--config.{key}: an element cannot be overridden; give the whole value, such as "
            f'--config.{name}="{known[name]}"'
        )
    if key not in known:
        if new := renamed(key):
            raise UserError(f"--config.{key}: this key was renamed; use --config.{new}")
        raise UserError(f"--config.{key}: there is no such key{_suggestion(key, config)}")


def renamed(key: str) -> str | None:
    """Returns the current name of a key that an older version had, or None."""
    section, dot, name = key.rpartition(".")
    if name in RENAMED_NAMES:
        return f"{renamed(section) or section}{dot}{RENAMED_NAMES[name]}"
    for old, new in RENAMED_KEYS.items():
        if key == old or key.startswith(f"{old}."):
            return new + key.removeprefix(old)
    return None


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Lists the keys that differ between two configs read from JSON: "kl.coef: 0.01 → 0.1"."""
    were, are = _leaves(before), _leaves(now)
    return [
        f"{key}: {were.get(key, 'absent')!r} → {are.get(key, 'absent')!r}"
        for key in dict.fromkeys([*were, *are])
        if were.get(key, "absent") != are.get(key, "absent")
    ]


def _suggestion(key: str, config: Mapping[str, Any]) -> str:
    paths = {path: path for path in _leaves(config)}
    # A misspelt old name is near the old name, and its new name is the suggestion.
    paths |= {old: new for old, new in RENAMED_KEYS.items() if new in paths}
    last = key.rpartition(".")[2]

    def likeness(path: str) -> float:
        whole = difflib.SequenceMatcher(None, key, path).ratio()
        # A correct name in the wrong section is worth a suggestion, too.
        tail = difflib.SequenceMatcher(None, last, path.rpartition(".")[2]).ratio()
        return max(whole, 0.9 * tail)

    best = max(paths, key=likeness, default="")
    if best and likeness(best) >= _NEAR_ENOUGH:
        return f"; did you mean --config.{paths[best]}?"
    return f"; the sections are {', '.join(config)}"


def _leaves(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in _entries(config) if not isinstance(value, Mapping)}


def _entries(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields every section and every key below it, by its full name, with its value."""
    for name, value in config.items():
        yield f"{prefix}{name}", value
        if isinstance(value, Mapping):
            yield from _entries(value, f"{prefix}{name}.")


# Typed sections.


def typed(cls: type[T], mapping: Mapping[str, Any] | ConfigDict, path: str = "config") -> T:
    """Builds the frozen dataclass `cls` from a config section.

    Nested dataclasses, `tuple[X, ...]`, `dict[str, X]` and `X | None` are converted, too. An int
    is accepted for a float; a bool is not an int. Only a key whose field has the default None may
    be absent, so that a config file states every value. A float must be finite in float32. A text
    must have no control characters. A value must be in its `ranges.Range` or `ranges.Choice`.

    Args:
      mapping: the section.
      path: its full key, for messages.

    Raises:
      UserError: an unknown, renamed or missing key, a value of the wrong type, or a value that
        `cls.__post_init__` refuses. The message names the full key.
    """
    given = plain(mapping)
    if not isinstance(given, Mapping):
        raise UserError(f"{path}={shown(mapping)}: expected a section of the type {cls.__name__}")
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for name in given.keys() - fields.keys():
        key = f"{path}.{name}"
        if new := renamed(key.removeprefix("config.")):
            raise UserError(f"{key}: this key was renamed; use config.{new}")
        raise UserError(f"{key}: there is no such key; {path} has {', '.join(fields)}")
    hints = typing.get_type_hints(cls, include_extras=True)
    values = {}
    for name, field in fields.items():
        if name in given:
            values[name] = _converted(hints[name], given[name], f"{path}.{name}")
        elif field.default is not None:
            raise UserError(f"{path}.{name} is missing: add it, of type {_name_of(hints[name])}")
    try:
        return cls(**values)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def plain(section: Any) -> Any:
    """Returns a typed section or a ConfigDict as nested dicts, the inverse of `typed`.

    Fields that may be absent and are None are left out.
    """
    if isinstance(section, ConfigDict):
        return section.to_dict()
    if dataclasses.is_dataclass(section):
        return {
            field.name: plain(getattr(section, field.name))
            for field in dataclasses.fields(section)
            if field.default is not None or getattr(section, field.name) is not None
        }
    if isinstance(section, Mapping):
        return {name: plain(value) for name, value in section.items()}
    return section


def _converted(hint: Any, value: Any, key: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return typed(hint, value, key)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        value = _converted(arguments[0], value, key)
        if bound := arguments[1].broken_bound(value):
            raise UserError(f"{key}={shown(value)} must be {bound}")
        return value
    if origin in (types.UnionType, typing.Union):
        (inner,) = (one for one in arguments if one is not types.NoneType)
        return None if value is None else _converted(inner, value, key)
    if origin is tuple and isinstance(value, tuple | list):
        hints = arguments if arguments[-1] is not Ellipsis else arguments[:1] * len(value)
        if len(hints) != len(value):
            raise UserError(f"{key}={shown(value)} must have {len(hints)} values")
        pairs = enumerate(zip(hints, value, strict=True))
        return tuple(_converted(inner, one, f"{key}[{i}]") for i, (inner, one) in pairs)
    if origin is dict and isinstance(value, Mapping):
        return {name: _converted(arguments[1], one, f"{key}.{name}") for name, one in value.items()}
    if hint is float and type(value) in (int, float):
        if not abs(value) <= MAX_FLOAT:
            raise UserError(f"{key}={shown(value)} must be a finite number up to {MAX_FLOAT}")
        if 0 < abs(value) < MIN_FLOAT:
            raise UserError(f"{key}={shown(value)} must be 0 or at least {MIN_FLOAT}")
        return float(value)
    if hint is str and type(value) is str and UNPRINTABLE.search(value):
        raise UserError(
            f"{key}={shown(value)} has a control character, a line break or a byte that is not "
            "UTF-8; remove it"
        )
    if hint is Any:
        return _converted_any(value, key)
    if type(value) is hint:
        return value
    raise UserError(f"{key}={shown(value)}: expected {_name_of(hint)}, not {type(value).__name__}")


def _converted_any(value: Any, key: str) -> Any:
    """Checks and returns a value without a declared type, such as a size of a new model."""
    if isinstance(value, Mapping):
        return {name: _converted_any(one, f"{key}.{name}") for name, one in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(_converted_any(one, f"{key}[{i}]") for i, one in enumerate(value))
    if type(value) is int and abs(value) > MAX_INT:
        raise UserError(f"{key}={shown(value)} must be within ±{MAX_INT}")
    if value is None or type(value) in (bool, int):
        return value
    return _converted(str if type(value) is str else float, value, key)


def _name_of(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return f"{_name_of(arguments[0])} {arguments[1]}"
    if origin in (types.UnionType, typing.Union):
        return " | ".join(map(_name_of, arguments))
    if arguments:
        return f"{origin.__name__}[{', '.join(map(_name_of, arguments))}]"
    names = {types.NoneType: "None", Ellipsis: "...", Any: "Any"}
    return names.get(hint) or hint.__name__


def field_docs(cls: type) -> dict[str, str]:
    """Returns the documentation of each field: the string literal right below it."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    return {
        field.target.id: " ".join(ast.literal_eval(below.value).split())
        for field, below in pairwise(tree.body)
        if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr)
    }


def describe(section: Any, path: str = "config") -> str:
    """Returns a table of a typed section: every key with its type, value and documentation.

    Nested sections follow the keys of their parent. Absent sections are left out.
    """
    docs, rows, nested = field_docs(type(section)), [], []
    for name, hint in typing.get_type_hints(type(section), include_extras=True).items():
        value = getattr(section, name)
        if dataclasses.is_dataclass(value):
            nested.append((name, value))
        elif isinstance(value, dict) and any(map(dataclasses.is_dataclass, value.values())):
            nested += [(f"{name}.{key}", one) for key, one in value.items()]
        elif name in docs:
            # Wrapped here: tabulate's maxcolwidths shows the text "False" as True.
            kind, text = _name_of(hint), shown(value, _VALUE_CHARACTERS)
            rows.append((name, *map(fill, (kind, text, docs[name]), _WIDTHS)))
    table = tabulate(rows, tablefmt="plain", disable_numparse=True)
    title = f"{path}: {(type(section).__doc__ or '').partition(chr(10))[0]}"
    below = [describe(value, f"{path}.{name}") for name, value in nested]
    return "\n\n".join([f"{title}\n{textwrap.indent(table, '  ')}".rstrip(), *below])


# The command line.


def split_config(argv: Sequence[str]) -> tuple[str, list[str]]:
    """Returns the value of the first `--config` in `argv`, `path.py[:preset]`, and the other flags.

    Raises:
      UserError: there is no `--config`.
    """
    for i, argument in enumerate(argv):
        name, equals, value = argument.partition("=")
        if name in ("-config", "--config"):
            if equals:
                return value, [*argv[:i], *argv[i + 1 :]]
            if i + 1 < len(argv):
                return argv[i + 1], [*argv[:i], *argv[i + 2 :]]
    listed = _files_next_to("configs/x.py")
    raise UserError(f"no config is given; use --config=configs/grpo.py{listed}")


def _files_next_to(path: str | Path) -> str:
    found = sorted(str(file) for file in Path(path).parent.glob("*.py"))
    return f"; there are {', '.join(found)}" if found else ""


def _one_line(error: flags.Error, known: Mapping[str, Any]) -> str:
    """Returns the flag library's message as one line; for a wrong value, names the right type."""
    message = one_line(" ".join(str(error).split()).removeprefix("flag "), _MESSAGE_WIDTH)
    match = re.match(r"--config\.([^=]+)=", message)
    value = dict(_entries(known)).get(match[1]) if match else None
    if isinstance(value, Mapping):
        key = f"--config.{match[1]}"
        return f"{key} is a section; override its keys, such as {key}.{next(iter(value), 'KEY')}"
    if value is not None:
        given = message.partition(": ")[0]
        return f"{given}: the value must be of type {type(value).__name__}, such as {shown(value)}"
    return message
