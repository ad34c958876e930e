"""Hostile configs and command lines run, or are refused in one line that names the fault.

Each try runs `main.cli` up to the import of jax: the job, the lock of the workdir and the requests
to servers are replaced. A try fails if it raises, prints several lines, names neither key nor file,
or shows a secret.
"""

import copy
import functools
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, seed, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict

from zerosearch_jax import config_flags, main
from zerosearch_jax.search.http_client import JsonClient

ROOT = Path(__file__).parents[2]
SECRET = "s3cr3t"
SIZES = [20, pytest.param(2500, marks=pytest.mark.slow)]

NUMBERS = [
    *("0", "-0", "-0.0", "1", "-1", "2.5", "1e400", "-1e400", "nan", "inf", "-inf", "1e-320"),
    *("True", "False", "None", "0x10", "1_0", "٣", "1j", "1e", "--1", "2147483648", "9" * 5000),
    *("4294967296", "1e308", "1" + "0" * 19),
]
TEXTS = [
    *("", " ", "\n", "a\nb", "a\0b", "\udcff", "é", "'", '"', "\\", "=", "a" * 5000, "%s", "{}"),
    *(
        "None",
        "none",
        "world",
        "synthetic:",
        "synthetic:0:0",
        "synthetic:1:-1",
        "~",
        ".",
        "/",
        "..",
    ),
    *("synthetic:" + "9" * 5000 + ":1", "synthetic:1:2:3", "synthetic:٣:1", "world/", "/", "a/b/c"),
    *("no/such/file.jsonl", "configs", "configs/grpo.py", "/dev/null", "promted", "rl", "v5e:8x8"),
]
STRUCTURES = [
    *("()", "[]", "{}", "(1,)", "(1, 2, 3)", "('a',)", "(None,)", "(True,)", "((1,),)", "1, 2"),
    *("(1.5, 2)", "(-1,)", "{'a': 1}", "{'a': {'b': 1}}", "(", "{1: 2}", "(" * 300, "-" * 3000),
    *("('q', 'q')", "(2147483648,)", "(" + "9" * 5000 + ",)", "('\\n',)", "('\\ud800',)", "(nan,)"),
    *("__import__('os')", "lambda: 1", "b'a'", "(b'a',)", "[1", "{'engine': 'none'}"),
]
ADDRESSES = [
    *(
        "ftp://host",
        "http://",
        "http:///path",
        "http://host:99999",
        "http://host:0",
        "http://host:x",
    ),
    *(
        "http://[bad",
        "http://[bad#x",
        "http://[::1]:80",
        "http://a b",
        " http://host",
        "http://h\n",
    ),
    *(
        f"http://user:{SECRET}@host",
        f"https://{SECRET}@host:1/",
        f"ftp://u:{SECRET}@host",
        "//host",
    ),
    *("http://host?q=1", "http://host#f", "HTTP://host", "http://host/retrieve", "http://h/v1/"),
    *(
        "http://höst",
        "http://\udcff",
        "http://host:-1",
        "http://host\\x",
        "localhost:80",
        "http://٣",
    ),
]
FLAGS = [
    *("--unknown=1", "--describe", "--describe=maybe", "--nodescribe", "--describe=1", "--profile"),
    *("--profile=", "--profile=0", "--profile=1,", "--profile=-1", "--profile=" + "9" * 5000),
    *("--profile=٣", "--export=", "--export=-1", "--export=" + "9" * 5000, "--export=first"),
    *(
        "--export=1",
        "--workdir",
        "--workdir=",
        "--workdir=\0",
        "--",
        "-",
        "x",
        "--config",
        "--config=",
    ),
    *(
        "--config=configs/grpo.py",
        "--config.=1",
        "--config.",
        "--config.rl=1",
        "--config.rl",
        "--=1",
    ),
    *(
        "--config.rl.steps",
        "--noconfig.rl.steps",
        "--noconfig.rl",
        "--config.rl.steps.x=1",
        "-config",
    ),
    *("--config.rl[0]=1", "--config.lora.targets[0]=q", "--config.no.such=1", "--noworkdir", "--é"),
    *("--distributed", "--distributed=maybe", "--flagfile=no/such", "--flagfile=.", "--undefok=x"),
    *("--config.rl={'steps': 1}", "--config.data=None", "---x", "--config.rl.steps 3", "\udcff"),
]
VARIABLES = {
    "JAX_COORDINATOR_ADDRESS": [
        "host:1",
        "host",
        "host:",
        ":1",
        "host:99999",
        "a b:1",
        "http://h:1",
    ],
    "JAX_NUM_PROCESSES": ["2", "0", "-1", "abc", "", "1e3", "٣", "9" * 5000],
    "JAX_PROCESS_ID": ["0", "1", "2", "-1", "abc", "", "9" * 5000],
    "SERPER_API_KEY": [SECRET, f"{SECRET}é", f"{SECRET}\n", f" {SECRET}", "", f"{SECRET}\udcff"],
    "LABEL_KEY": [SECRET, f"{SECRET}ž", f"{SECRET} {SECRET}", ""],
}
LABELED_BY_A_SERVER = [
    "--config.labeling.kind=server",
    "--config.labeling.url=http://host",
    "--config.labeling.server.key_variable=LABEL_KEY",
]
# Configs whose models and files are in the repository.
COMPLETE = ["configs/grpo.py", "configs/eval.py", "configs/collect.py", "configs/sft_policy.py"]
COMPLETE += ["configs/r1_searcher.py", "configs/miniature.py", "configs/bench.py"]
# Overrides of configs/grpo.py that make the run read other sections.
READERS = [
    [],
    [("search.engine", "retriever")],
    [("search.engine", "web")],
    [("search.engine", "recorded_web")],
    [("search.simulator.url", "http://host:1")],
    [("advantage.estimator", "ppo")],
    [("rl.epochs", "2")],
]
# Parts of a config file that replace a value, and whole files.
EXPRESSIONS = [
    *(
        "None",
        "1",
        "-1",
        "1.5",
        "float('nan')",
        "10**5000",
        "True",
        "'x'",
        "'\\ud800'",
        "'a\\nb'",
        "()",
    ),
    *(
        "b'x'",
        "object()",
        "{1: 2}",
        "{'x': 1}",
        "[[]]",
        "lambda: 1",
        "set()",
        "1j",
        "range(3)",
        "int",
    ),
    *("placeholder(int)", "required_placeholder(int)", "FieldReference(3)", "FieldReference('x')"),
    *("ConfigDict()", "ConfigDict({'a': 1})", "print", "(1, 'a', None)", "{'engine': 'none'}"),
]
FILES = [
    *(
        b"",
        b"\xff\xfe",
        b"def get_config(:",
        b"x = 1",
        b"get_config = 3",
        b"raise ValueError",
        b"\0",
    ),
    *(
        b"import no_such_module",
        b"import sys; sys.exit(0)",
        b"1 / 0",
        b"def get_config(): return {}",
    ),
    *(b"def get_config(): return get_config()", b"def get_config(): return None", b"assert False"),
    *(
        b"def get_config(p='', q=1, *, r): pass",
        b"raise KeyError('a\\nb')",
        b"raise SystemExit('x')",
    ),
    *(
        b"x = " + b"(" * 300,
        b"x = " + b"-" * 9000 + b"1",
        b"# -*- coding: no -*-",
        b"raise Exception",
    ),
    *(b"def get_config():\n    raise UserWarning('\\ud800')", b"\tx", b"class get_config: pass"),
]


def _keys(config: dict, prefix: str = "") -> dict[str, Any]:
    """Every section and every key below it, by its full name, with its value."""
    found = {}
    for name, value in config.items():
        found[f"{prefix}{name}"] = value
        if isinstance(value, dict):
            found |= _keys(value, f"{prefix}{name}.")
    return found


@functools.cache
def _specs() -> list[str]:
    """All config files and presets; miniature.py has many presets with the same keys."""
    files = sorted((ROOT / "configs").glob("*.py"))
    return [
        f"configs/{f.name}:{preset}" if preset else f"configs/{f.name}"
        for f in files
        for preset in ("", *config_flags.presets(f))[: 3 if f.stem == "miniature" else None]
    ]


@pytest.fixture
def command(monkeypatch, capsys):
    """A function that runs a command line up to the job; returns its status and standard error."""
    monkeypatch.chdir(ROOT)
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    load, specs, load_once = config_flags.load, _specs(), functools.cache(config_flags.load)
    monkeypatch.setattr(
        config_flags, "load", lambda s: copy.deepcopy(load_once(s)) if s in specs else load(s)
    )
    # absl formats the config as YAML for its help text, which takes most of the time of a try.
    monkeypatch.setattr(ConfigDict, "__str__", object.__repr__)
    monkeypatch.setattr(main, "_run_job", lambda *arguments: None)
    monkeypatch.setattr(main, "locked", _unlocked)
    monkeypatch.setattr(JsonClient, "no_reply", lambda client: "")

    def run(arguments: list[str], variables: dict[str, str] | None = None) -> tuple[int, str]:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in (variables or {}).items():
                patch.setenv(name, value)
            status = main.cli(["main", *arguments])
        captured = capsys.readouterr()
        assert SECRET not in captured.err and SECRET not in captured.out
        return status, captured.err

    return run


@contextmanager
def _unlocked(workdir: str) -> Iterator[None]:
    yield


def _explore(strategy: st.SearchStrategy, tries: int, check: Callable[[Any], str]) -> list[str]:
    """Calls `check` with `tries` draws; returns its non-empty results and its exceptions."""
    failures = []

    @settings(settings.get_profile("fuzz"), max_examples=tries, derandomize=False)
    @seed(19)
    @given(strategy)
    def explore(case):
        try:
            fault = check(case)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            fault = f"{type(error).__name__}: {str(error)[:300]}"
        if fault:
            failures.append(f"{repr(case)[:300]}: {fault}")

    explore()
    return failures


def _fault(status: int, error: str, names: Iterable[str]) -> str:
    """Returns why the outcome of a command line is not acceptable; "" if it is."""
    if status == 0 and not error:
        return ""
    if status != 2 or not error.startswith("error: ") or error.count("\n") != 1:
        return f"status {status}, {error!r}"
    if not any(name in error for name in names):
        return f"names none of {names}: {error!r}"
    return ""


@st.composite
def _overrides(draw) -> tuple[str, list[tuple[str, str]]]:
    """A config, overrides that select readers, and one to three keys with hostile values."""
    spec = draw(
        st.sampled_from(COMPLETE[:1]) | st.sampled_from(COMPLETE) | st.sampled_from(_specs())
    )
    keys = _keys(config_flags.load(spec).to_dict())
    found = [*draw(st.sampled_from(READERS))] if spec == COMPLETE[0] else []
    for key in draw(st.lists(st.sampled_from(sorted(keys)), min_size=1, max_size=3)):
        own = keys[key]
        likely = {int: NUMBERS, float: NUMBERS, tuple: STRUCTURES, dict: STRUCTURES}
        values = st.sampled_from(ADDRESSES if key.endswith("url") else likely.get(type(own), TEXTS))
        values |= st.sampled_from(NUMBERS + TEXTS + STRUCTURES + ADDRESSES)
        values |= st.integers(0, len(str(own))).map(lambda i, own=str(own): own[:i] + own[i + 1 :])
        values |= st.text(max_size=9) | st.integers().map(str) | st.floats().map(str)
        found.append((key, draw(values)))
    return spec, found


@pytest.mark.parametrize("tries", SIZES)
def test_hostile_overrides_are_run_or_refused_in_one_line_with_their_key(command, tally, tries):
    # Many presets name models that are not in the repository: that refusal is right, too.
    unchanged = functools.cache(lambda spec: command([f"--config={spec}"])[1].strip() or "ran")

    def check(case) -> str:
        spec, overrides = case
        arguments = [f"--config.{key}={value}" for key, value in overrides]
        status, error = command([f"--config={spec}", *arguments], {"SERPER_API_KEY": SECRET})
        names = [key.rpartition(".")[2] for key, _ in overrides]
        return _fault(status, error, [*names, unchanged(spec)])

    failures = _explore(_overrides(), tries, check)
    tally("config: hostile overrides", tries, len(failures))
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize("tries", SIZES)
def test_hostile_flags_and_variables_are_run_or_refused_in_one_line(command, tally, tries):
    base = st.sampled_from(
        [
            ["--config=configs/grpo.py"],
            ["--config=configs/grpo.py", "--distributed"],
            ["--config=configs/eval.py:web"],
            ["--config=configs/collect.py", *LABELED_BY_A_SERVER],
            [],
        ]
    )
    variables = st.fixed_dictionaries(
        {}, optional={name: st.sampled_from(values) for name, values in VARIABLES.items()}
    )
    strategy = st.tuples(base, st.lists(st.sampled_from(FLAGS), max_size=2), variables)

    def check(case) -> str:
        arguments, hostile, values = case
        status, error = command([*arguments, *hostile], values)
        names = [part for flag in hostile for part in re.findall(r"\w+", flag)[:1]]
        return _fault(status, error, [*names, *VARIABLES, "--config", "flag"])

    failures = _explore(strategy, tries, check)
    tally("config: hostile flags and environment", tries, len(failures))
    assert not failures, "\n".join(failures)


@st.composite
def _files(draw) -> bytes:
    """A config file: broken, a valid one with changed bytes, or one with changed values."""
    kind = draw(st.sampled_from(["broken", "bytes", "values", "values"]))
    if kind == "broken":
        return draw(st.sampled_from(FILES) | st.binary(max_size=40))
    spec = draw(st.sampled_from(_specs()))
    if kind == "bytes":
        content = bytearray((ROOT / spec.partition(":")[0]).read_bytes())
        for _ in range(draw(st.integers(1, 3))):
            at = draw(st.integers(0, len(content) - 1))
            content[at : at + draw(st.integers(0, 3))] = draw(st.binary(max_size=2))
        return bytes(content)
    config = config_flags.load(spec).to_dict()
    for _ in range(draw(st.integers(1, 2))):
        section = config
        while True:
            key = draw(st.sampled_from(sorted(section, key=str)))
            if (
                not isinstance(section[key], dict)
                or not section[key]
                or draw(st.integers(0, 9)) == 0
            ):
                break
            section = section[key]
        if draw(st.integers(0, 3)) == 0:
            del section[key]
        else:
            section[draw(st.sampled_from([key, key, key, "x", 1, ""]))] = Expression(
                draw(st.sampled_from(EXPRESSIONS) | st.text(max_size=5).map(repr))
            )
        if not section:
            break
    return (HEAD + f"def get_config():\n    return ConfigDict({config!r})\n").encode()


class Expression(str):
    """Source text that `repr` shows without quotes."""

    def __repr__(self) -> str:
        return str(self)


HEAD = "from ml_collections import ConfigDict, FieldReference\n"
HEAD += "from ml_collections.config_dict import placeholder, required_placeholder\n"


@pytest.mark.parametrize("tries", SIZES)
def test_hostile_config_files_are_run_or_refused_in_one_line(command, tally, tmp_path, tries):
    path = tmp_path / "hostile.py"

    def check(content: bytes) -> str:
        path.write_bytes(content)
        status, error = command([f"--config={path}"])
        return _fault(status, error, [path.name, "config."])

    failures = _explore(_files(), tries, check)
    tally("config: hostile config files", tries, len(failures))
    assert not failures, "\n".join(failures)
