"""Holds DESIGN's "who may import whom": reads every import of the package, runs none."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "zerosearch_jax"

# Module or package (the longest match counts) → what of ours it may import, besides `errors`
# and its own package. A package that is not here may import anything of ours.
OURS = {
    "errors": (),
    "text": (),
    "search": ("text", "data.world", "data.phrasing"),
    "wheels": (),
    "data": ("text", "search", "rollout.packing"),  # its scripted agents search for real
    "data.build_wikipedia": ("data", "wheels"),  # run by hand
    "parallel": (),
    "models": ("parallel",),
    "models.smollm2_gguf": ("parallel", "text", "wheels"),  # a converter, run by hand
    "generate": ("models", "parallel", "text"),
    "rollout": ("generate", "search.engine", "search.curriculum", "text"),
    "rl.losses": None,  # nothing at all
    "rl.advantages": None,
    "rl.rewards": ("text",),
    "rl": ("models", "parallel", "rollout.trajectory", "rollout.packing"),
    "telemetry": (),
    "checkpoints": (),
    "config_check": (),
    "main": ("config_check", "jobs"),
}
NO_JAX = ("search", "rl.rewards")  # also not through modules of ours that they import
ONLY_JAX = ("rl.losses", "rl.advantages")
CONFIG_READERS = ("jobs", "main", "config_check")
STDLIB_USED_BY_PURE_CODE = {"collections", "dataclasses", "functools", "math", "typing"}


def _module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root / PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def _imports(path: Path, root: Path) -> Iterator[str]:
    """Full dotted names, `from a import b` as `a.b`; relative ones resolved."""
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


def _reaches_jax(module: str, graph: dict[str, set[str]], seen: set[str]) -> bool:
    if module in seen or module not in graph:
        return False
    seen.add(module)
    if any(_within(name, ("jax", "flax", "optax", "orbax")) for name in graph[module]):
        return True
    return any(
        _reaches_jax(target, graph, seen)
        for name in _own(graph[module])
        for target in (name, name.rpartition(".")[0])
        if target
    )


def violations(root: Path) -> list[str]:
    """One line for each import that breaks a rule in the package below `root`."""
    files = sorted((root / PACKAGE).rglob("*.py"))
    graph = {_module_name(path, root): set(_imports(path, root)) for path in files}
    found = []
    for module, imported in graph.items():
        rule = max((key for key in OURS if _within(module, (key,))), key=len, default=None)
        if rule is not None:
            allowed = OURS[rule]
            fine = () if allowed is None else (*allowed, "errors", module.partition(".")[0])
            bad = [name for name in _own(imported) if not _within(name, fine)]
            found += [f"{module} may not import {name}" for name in bad]
        if _within(module, ONLY_JAX):
            tops = {name.partition(".")[0] for name in imported} - {PACKAGE}
            bad = tops - {"jax"} - STDLIB_USED_BY_PURE_CODE
            found += [f"{module} may import only jax, not {name}" for name in bad]
        if _within(module, NO_JAX) and _reaches_jax(module, graph, set()):
            found.append(f"{module} may not import jax, not even through another module")
        if not _within(module, CONFIG_READERS) and any(
            _within(name, ("ml_collections",)) for name in imported
        ):
            found.append(f"{module} may not see the ConfigDict")
    return sorted(found)


def test_the_package_keeps_the_rules():
    assert (ROOT / PACKAGE / "main.py").exists()
    assert violations(ROOT) == []


@pytest.mark.parametrize(
    ("module", "line", "complaint"),
    [
        ("search/bm25.py", "import jax.numpy as jnp", "search.bm25 may not import jax"),
        ("search/bm25.py", "from zerosearch_jax.text import helper", "may not import jax"),
        ("search/bm25.py", "from zerosearch_jax import rollout", "may not import rollout"),
        ("rl/rewards.py", "def f():\n    import jax", "rl.rewards may not import jax"),
        ("rl/losses.py", "import numpy", "rl.losses may import only jax, not numpy"),
        ("rl/losses.py", "from zerosearch_jax import errors", "may not import errors"),
        ("rl/learner.py", "from ..rollout import episodes", "may not import rollout.episodes"),
        ("rollout/scheduler.py", "from zerosearch_jax.search.bm25 import B", "search.bm25"),
        ("models/config.py", "import ml_collections", "may not see the ConfigDict"),
        ("models/config.py", "from zerosearch_jax.generate import g", "may not import generate"),
        ("text/actions.py", "from zerosearch_jax.data import world", "may not import data.world"),
    ],
)
def test_a_bad_import_is_found(tmp_path, module, line, complaint):
    package = tmp_path / PACKAGE
    (package / "text").mkdir(parents=True)
    (package / "text" / "helper.py").write_text("import jax\n")
    path = package / module
    path.parent.mkdir(exist_ok=True)
    path.write_text(line + "\n")
    found = violations(tmp_path)
    assert any(complaint in one for one in found), found


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("rl/losses.py", "import jax.numpy as jnp\nfrom typing import Any"),
        ("rl/learner.py", "from zerosearch_jax.rollout.trajectory import Trajectory"),
        ("rollout/scheduler.py", "from zerosearch_jax.search.engine import SearchEngine"),
        ("jobs/rl.py", "from ml_collections import ConfigDict\nfrom ..search import bm25"),
        ("search/bm25.py", "from zerosearch_jax.errors import UserError\nfrom . import engine"),
    ],
)
def test_a_good_import_is_let_through(tmp_path, module, line):
    path = tmp_path / PACKAGE / module
    path.parent.mkdir(parents=True)
    path.write_text(line + "\n")
    assert violations(tmp_path) == []
