"""Writes docs/code_map.md and docs/metrics.md from the sources; `make docs` runs it.

The sources are parsed with `ast` and never imported, so this needs no installed package.
"""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "zerosearch_jax"

# Heading of the code map -> folders and files of the package, in the order to read them.
TIERS = {
    "Start here": ("__init__.py", "examples", "main.py", "config_flags.py", "jobs"),
    "The training step": ("training", "rl", "rollout"),
    "Search": ("search", "retrieval", "simulator"),
    "Models and generation": ("generate", "models"),
    "Data and text": ("data", "text"),
    "Evaluation and serving": ("evaluation", "serving"),
    "Foundations": ("parallel", "telemetry", "checkpoints.py", "files.py", "errors.py"),
    "Studies": ("experiments", "benchmarks", "tpu_aot"),
}


def pages() -> dict[Path, str]:
    """The generated pages by path."""
    docs = ROOT / "docs"
    return {docs / "code_map.md": code_map(), docs / "metrics.md": metrics()}


def code_map() -> str:
    """Every module and config with the first sentence of its docstring."""
    modules = [path for path in sorted((ROOT / PACKAGE).rglob("*.py")) if _summary(path)]
    tiers = {heading: [] for heading in (*TIERS, "Other")}
    for path in modules:
        tiers[_tier(path)].append(path)
    lines = [
        "# Code map",
        "",
        "Every module with the first sentence of its docstring. `make docs` generates this page.",
        "",
        "Imports go down: a tier of the package never imports from one that uses it. The rule is",
        "the table in `tests/test_imports.py`.",
    ]
    for heading, paths in tiers.items():
        order = TIERS.get(heading, ())
        paths.sort(key=lambda path: (order.index(_top(path)) if order else 0, path))
        lines += _table(heading, "module", paths, ROOT / PACKAGE)
    lines += _table("Configs", "config", sorted((ROOT / "configs").glob("*.py")), ROOT)
    return "\n".join(lines) + "\n"


def metrics() -> str:
    """The tables of metrics that `telemetry/metrics.py` defines."""
    path = ROOT / PACKAGE / "telemetry" / "metrics.py"
    lines = [
        "# Metrics",
        "",
        "Every metric that a run writes to `metrics.jsonl` and TensorBoard. `make docs` generates",
        "this page from `telemetry/metrics.py`; the recorder refuses any other name. Policy tokens",
        "are the tokens that the policy sampled; prompt and documents never count.",
    ]
    for name, table in _literal_tables(path).items():
        heading = name.removesuffix("_METRICS").replace("_", " ")
        lines += ["", f"## {heading if len(heading) < 4 else heading.capitalize()}", ""]
        if name in ("EPISODE_METRICS", "FAILURE_METRICS"):
            lines += ["Each of these also exists as `eval/NAME`: the metric at evaluation.", ""]
        if name == "FAILURE_METRICS":
            lines += ["Failed searches of a step by kind. Kinds without failures are absent.", ""]
        lines += ["| metric | meaning |", "|---|---|"]
        lines += [f"| `{metric}` | {_cell(meaning)} |" for metric, meaning in table.items()]
    return "\n".join(lines) + "\n"


def _tier(path: Path) -> str:
    return next((heading for heading, tops in TIERS.items() if _top(path) in tops), "Other")


def _top(path: Path) -> str:
    return path.relative_to(ROOT / PACKAGE).parts[0]


def _table(heading: str, column: str, paths: list[Path], root: Path) -> list[str]:
    if not paths:
        return []
    rows = [
        f"| [`{path.relative_to(root)}`](../{path.relative_to(ROOT)}) | {_cell(_summary(path))} |"
        for path in paths
    ]
    return ["", f"## {heading}", "", f"| {column} | purpose |", "|---|---|", *rows]


def _summary(path: Path) -> str:
    """The first sentence of a module's docstring; "" without one."""
    paragraph = (ast.get_docstring(ast.parse(path.read_text("utf-8"))) or "").split("\n\n")[0]
    return re.split(r"(?<!Dr\.)(?<=\.)\s", " ".join(paragraph.split()), maxsplit=1)[0]


def _literal_tables(path: Path) -> dict[str, dict[str, str]]:
    """The module's literal dicts of strings whose names end in "_METRICS"."""
    tables = {}
    for node in ast.parse(path.read_text("utf-8")).body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Dict):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            if isinstance(target, ast.Name) and target.id.endswith("_METRICS"):
                tables[target.id] = ast.literal_eval(node.value)
    return tables


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    for page, text in pages().items():
        page.write_text(text, encoding="utf-8")
        print(f"wrote {page.relative_to(ROOT)}")
