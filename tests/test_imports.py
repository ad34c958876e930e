"""Keeps the table of docs DESIGN §1: imports go down, some rooms have no jax, modules stay small.

The tests read the source of every module and run none of it. Imports inside functions count.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "zerosearch_jax"

TIERS = (
    ("main",),
    ("examples", "experiments", "benchmarks", "tpu_aot"),
    ("jobs",),
    ("training", "evaluation", "serving", "simulator"),
    ("rl", "rollout", "retrieval"),
    ("generate",),
    ("models", "data"),
    ("search",),
    ("text", "telemetry", "parallel", "checkpoints", "config_flags", "files", "ranges"),
    ("errors",),
)
"""Rooms from top to bottom. A room imports lower tiers, and its own tier without a cycle."""
NO_JAX = (
    "search",
    "data",
    "rl.rewards",
    "text",
    *("rl.config", "experiments.config", "benchmarks.config", "tpu_aot.config"),
    *("training.sections", "training.config", "training.job_configs"),
    *("training.validate", "training.inputs"),
)
"""Modules that do not reach jax, not even through other modules."""
ONLY_JAX = ("rl.losses", "rl.advantages")
"""Modules that import jax and nothing else besides `STDLIB`."""
STDLIB = {"collections", "dataclasses", "functools", "math", "typing"}
CONFIG_READERS = ("main", "config_flags", "jobs", "experiments", "benchmarks", "tpu_aot")
"""Modules that may import ml_collections. All others get typed sections."""
JAX = ("jax", "flax", "optax", "orbax")

MAX_MODULE_LINES = 450
MAX_FUNCTION_LINES = 80
TRAINING_LOOPS = ("jobs.rl.run", "jobs.sft.run")
MAX_LOOP_LINES = 100


def _module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root / PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def _imports(path: Path, root: Path) -> Iterator[str]:
    """Full dotted names, with `from a import b` as `a.b` and relative imports resolved."""
    here = path.relative_to(root).with_suffix("").parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(here[: -node.level]) if node.level else ""
            source = ".".join(filter(None, (base, node.module)))
            yield from (f"{source}.{alias.name}" for alias in node.names)


def _within(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def _own(imported: set[str]) -> set[str]:
    return {name.removeprefix(f"{PACKAGE}.") for name in imported if _within(name, (PACKAGE,))}


def _room(name: str) -> str:
    return name.partition(".")[0]


def _tier(room: str) -> int | None:
    return next((i for i, rooms in enumerate(TIERS) if room in rooms), None)


def _reaches_jax(module: str, graph: dict[str, set[str]], seen: set[str]) -> bool:
    if module in seen or module not in graph:
        return False
    seen.add(module)
    return any(_within(name, JAX) for name in graph[module]) or any(
        _reaches_jax(target, graph, seen)
        for name in _own(graph[module])
        for target in (name, name.rpartition(".")[0])
        if target
    )


def _imports_within_tiers(graph: dict[str, set[str]]) -> Iterator[tuple[str, str]]:
    """Pairs of different rooms of one tier, of which the first imports the second."""
    for module, imported in graph.items():
        for name in _own(imported):
            pair = _room(module), _room(name)
            if pair[0] != pair[1] and _tier(pair[0]) == _tier(pair[1]) is not None:
                yield pair


def _cycles(edges: set[tuple[str, str]]) -> Iterator[str]:
    reached = set(edges)
    while more := {(a, d) for a, b in reached for c, d in edges if b == c} - reached:
        reached |= more
    yield from (f"{room} imports itself through its tier" for room, to in reached if room == to)


def violations(root: Path) -> list[str]:
    """Returns one line per import that breaks a rule in the package below `root`."""
    files = sorted((root / PACKAGE).rglob("*.py"))
    graph = {_module_name(path, root): set(_imports(path, root)) for path in files}
    found = list(_cycles(set(_imports_within_tiers(graph))))
    for module, imported in graph.items():
        tier = _tier(_room(module))
        if module and tier is None:
            found.append(f"{module} is in no tier")
            continue
        found += [
            f"{module} may not import {name}, which is above it"
            for name in _own(imported)
            if module and _tier(_room(name)) is not None and _tier(_room(name)) < tier
        ]
        if _within(module, ONLY_JAX):
            others = {_room(name) for name in imported} - {"jax"} - STDLIB
            found += [f"{module} may import only jax, not {name}" for name in others]
        if _within(module, NO_JAX) and _reaches_jax(module, graph, set()):
            found.append(f"{module} may not import jax, not even through another module")
        reads_config = any(_within(name, ("ml_collections",)) for name in imported)
        if reads_config and not _within(module, CONFIG_READERS):
            found.append(f"{module} may not import ml_collections")
    return sorted(found)


def too_long(root: Path) -> list[str]:
    """Returns one line per module or function below `root` that exceeds its limit."""
    found = []
    for path in sorted((root / PACKAGE).rglob("*.py")):
        module, source = _module_name(path, root), path.read_text(encoding="utf-8")
        if (lines := len(source.splitlines())) > MAX_MODULE_LINES:
            found.append(f"{module} has {lines} lines")
        for node in ast.walk(ast.parse(source)):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            name, lines = f"{module}.{node.name}", node.end_lineno - node.lineno + 1
            if lines > (MAX_LOOP_LINES if name in TRAINING_LOOPS else MAX_FUNCTION_LINES):
                found.append(f"{name} has {lines} lines")
    return found


def test_the_package_keeps_the_import_rules():
    assert (ROOT / PACKAGE / "main.py").exists()
    assert violations(ROOT) == []


def test_modules_and_functions_keep_their_limits():
    assert too_long(ROOT) == []


@pytest.mark.parametrize(
    ("module", "source", "complaint"),
    [
        ("search/bm25.py", "import jax.numpy as jnp", "search.bm25 may not import jax"),
        ("search/bm25.py", "from zerosearch_jax.text import helper", "may not import jax"),
        ("search/bm25.py", "from zerosearch_jax import rollout", "may not import rollout"),
        ("data/qa.py", "def f():\n    import flax", "data.qa may not import jax"),
        ("rl/rewards.py", "def f():\n    import jax", "rl.rewards may not import jax"),
        ("rl/losses.py", "import numpy", "rl.losses may import only jax, not numpy"),
        ("rl/losses.py", "from zerosearch_jax import errors", "may import only jax"),
        ("rl/learner.py", "from ..training import factory", "may not import training.factory"),
        ("models/config.py", "import ml_collections", "may not import ml_collections"),
        ("models/config.py", "def f():\n    from zerosearch_jax.generate import g", "generate.g"),
        ("text/actions.py", "from zerosearch_jax.data import world", "may not import data.world"),
        ("jobs/rl.py", "from zerosearch_jax import main", "may not import main"),
        ("training/a.py", "from zerosearch_jax.jobs import rl", "may not import jobs.rl"),
        ("training/a.py", "from zerosearch_jax.simulator import gate", "training imports itself"),
        ("utils/a.py", "", "utils.a is in no tier"),
    ],
)
def test_forbidden_import_is_found(tmp_path, module, source, complaint):
    package = tmp_path / PACKAGE
    (package / "text").mkdir(parents=True)
    (package / "text" / "helper.py").write_text("import jax\n")
    (package / "simulator").mkdir()
    (package / "simulator" / "gate.py").write_text("from zerosearch_jax.training import factory\n")
    path = package / module
    path.parent.mkdir(exist_ok=True)
    path.write_text(source + "\n")
    found = violations(tmp_path)
    assert any(complaint in one for one in found), found


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("rl/losses.py", "import jax.numpy as jnp\nfrom typing import Any"),
        ("rl/learner.py", "from zerosearch_jax.rollout.trajectory import Trajectory"),
        ("rollout/scheduler.py", "from zerosearch_jax.search.engine import SearchEngine"),
        ("jobs/rl.py", "from ml_collections import ConfigDict\nfrom ..search import bm25"),
        ("search/bm25.py", "from zerosearch_jax.errors import UserError\nfrom . import engine"),
        ("evaluation/summary.py", "from zerosearch_jax.training import factory"),
    ],
)
def test_allowed_import_is_not_reported(tmp_path, module, source):
    path = tmp_path / PACKAGE / module
    path.parent.mkdir(parents=True)
    path.write_text(source + "\n")
    assert violations(tmp_path) == []


def test_long_modules_and_functions_are_found(tmp_path):
    path = tmp_path / PACKAGE / "jobs" / "rl.py"
    path.parent.mkdir(parents=True)
    body = "\n".join(["    pass"] * 90)
    path.write_text(f"def run():\n{body}\n\n\ndef other():\n{body}\n" + "#\n" * 300)
    assert too_long(tmp_path) == ["jobs.rl has 484 lines", "jobs.rl.other has 91 lines"]
