"""Reads a config file and its `--config.a.b=…` overrides; a slip of the pen gets one clear line.

`ml_collections.config_flags` does the overriding; this adds what it lacks: the nearest right
key, the presets, the file that is not there. It knows no key by name.
"""

import difflib
import importlib.util
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from zerosearch_jax.errors import UserError

# Below this similarity a suggestion would puzzle more than it helps.
_NEAR_ENOUGH = 0.5


def parse(flag_values: flags.FlagValues, argv: Sequence[str]) -> ConfigDict:
    """Parses `argv` (with the program's name first) into `flag_values`; returns the config.

    Raises:
      UserError: no or unknown config file, unknown preset, unknown key or flag, wrong type.
    """
    config = load(config_argument(argv))
    known = config.to_dict()
    for key in _override_keys(argv):
        check_key(key, known)
    rest = _without_config(argv)
    try:
        overridden = config_flags.DEFINE_config_dict(
            "config", config, flag_values=flag_values, sys_argv=rest
        )
        leftover = flag_values(rest)[1:]
    except flags.Error as error:
        raise UserError(_one_line(error, known)) from error
    if leftover:
        raise UserError(f"{leftover[0]!r} is not a flag; values are given as --flag=value")
    return overridden.value


def load(spec: str) -> ConfigDict:
    """Calls `get_config(preset)` of the file in `spec`, which reads `path.py[:preset]`.

    Raises:
      UserError: the file does not exist, or its `get_config` refuses the preset.
    """
    path, _, preset = spec.partition(":")
    if not Path(path).is_file():
        raise UserError(f"--config={spec}: there is no file {path}{_configs_beside(path)}")
    module_spec = importlib.util.spec_from_file_location("zerosearch_config", path)
    if module_spec is None or module_spec.loader is None:
        raise UserError(f"--config={spec}: {path} is not a Python file")
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    try:
        return module.get_config(preset) if preset else module.get_config()
    except ValueError as error:
        raise UserError(f"--config={spec}: {error}") from error


def choose(presets: Mapping[str, Any], preset: str, path: str) -> Any:
    """The entry of `presets` that the config file at `path` was asked for.

    Raises:
      UserError: there is none; it names those that there are.
    """
    if preset not in presets:
        raise UserError(
            f"configs/{Path(path).name} has no preset {preset!r}; "
            f"the presets are {', '.join(filter(None, presets))}"
        )
    return presets[preset]


def check_key(key: str, config: Mapping[str, Any]) -> None:
    """Raises UserError with the nearest right key when the nested `config` has no `key` ("a.b")."""
    node: Any = config
    for part in key.split("."):
        name = part.partition("[")[0]  # the override syntax can index a tuple: engines[0]
        if not isinstance(node, Mapping) or name not in node:
            raise UserError(f"--config.{key}: there is no such key{_suggestion(key, config)}")
        node = node[name]


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two configs as JSON gives them back: "kl.coef: 0.01 → 0.1" each."""
    were, are = dict(_leaves(before)), dict(_leaves(now))
    return [
        f"{key}: {were.get(key, 'absent')!r} → {are.get(key, 'absent')!r}"
        for key in dict.fromkeys([*were, *are])
        if were.get(key, "absent") != are.get(key, "absent")
    ]


def _suggestion(key: str, config: Mapping[str, Any]) -> str:
    paths = [path for path, _ in _leaves(config)]
    last = key.rpartition(".")[2]

    def likeness(path: str) -> float:
        whole = difflib.SequenceMatcher(None, key, path).ratio()
        # A right name in the wrong section is worth a suggestion, too.
        tail = difflib.SequenceMatcher(None, last, path.rpartition(".")[2]).ratio()
        return max(whole, 0.9 * tail)

    best = max(paths, key=likeness, default="")
    if best and likeness(best) >= _NEAR_ENOUGH:
        return f"; did you mean --config.{best}?"
    return f"; the sections are {', '.join(config)}"


def _leaves(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def config_argument(argv: Sequence[str]) -> str:
    """The value of `--config` in `argv`: `path.py[:preset]`. Raises UserError if there is none."""
    position = _config_position(argv)
    if position is None:
        listed = _configs_beside("configs/x.py")
        raise UserError(f"no config is given; say --config=configs/grpo.py{listed}")
    _, equals, value = argv[position].partition("=")
    return value if equals else argv[position + 1]


def _config_position(argv: Sequence[str]) -> int | None:
    for position, argument in enumerate(argv):
        if re.match(r"--?config=", argument):
            return position
        if re.fullmatch(r"--?config", argument) and position + 1 < len(argv):
            return position
    return None


def _without_config(argv: Sequence[str]) -> list[str]:
    position = _config_position(argv)
    assert position is not None
    width = 1 if "=" in argv[position] else 2
    return [*argv[:position], *argv[position + width :]]


def _override_keys(argv: Sequence[str]) -> Iterator[str]:
    for argument in argv:
        if match := re.match(r"--?(?:no)?config\.([^=]+)", argument):
            yield match[1]


def _configs_beside(path: str) -> str:
    found = sorted(str(file) for file in Path(path).parent.glob("*.py"))
    return f"; there are {', '.join(found)}" if found else ""


def _one_line(error: flags.Error, known: Mapping[str, Any]) -> str:
    """The flag library's message on one line, with the type that the key wants."""
    message = " ".join(str(error).split()).removeprefix("flag ")
    if match := re.match(r"--config\.([^=]+)=", message):
        value: Any = known
        for part in match[1].split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if value is not None:
            message += f"; the value must be of type {type(value).__name__}, such as {value!r}"
    return message
