"""README's file tree and metric glossary say what the package says."""

import re
from pathlib import Path

from zerosearch_jax.telemetry.metrics import EPISODE_METRICS, METRICS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def _tree() -> list[str]:
    """The files that the tree names below zerosearch_jax/, in its order."""
    block = re.search(r"```\nzerosearch_jax/\n(.*?)```", README, re.DOTALL)
    assert block is not None
    files, folders = [], []
    for line in block[1].splitlines():
        name = line.split()[0]
        if not line.startswith(" "):
            break  # configs/ and what follows
        depth = (len(line) - len(line.lstrip())) // 2 - 1
        folders = folders[:depth]
        if name.endswith("/"):
            folders.append(name)
        if name.endswith(".py"):
            assert len(line.split()) > 1, f"{name} has no line of its own"
            files.append("".join([*folders, name]))
    return files


def test_the_file_tree_names_every_module_once():
    package = ROOT / "zerosearch_jax"
    modules = [path.relative_to(package).as_posix() for path in package.rglob("*.py")]
    assert sorted(_tree()) == sorted(m for m in modules if not m.endswith("__init__.py"))


def test_the_tree_names_every_config():
    (line,) = re.findall(r"^configs/ +(.*)$", README, re.MULTILINE)
    assert set(re.findall(r"\w+\.py", line)) == {p.name for p in (ROOT / "configs").glob("*.py")}


def test_the_glossary_is_the_recorders():
    written = dict(re.findall(r"^\| `([^`]+)` \| (.*) \|$", README, re.MULTILINE))
    at_evaluation = {f"eval/{name}" for name in EPISODE_METRICS}
    glossary = {name: text.replace("|", "\\|") for name, text in METRICS.items()}
    assert {n: t for n, t in written.items() if n in METRICS} == {
        n: t for n, t in glossary.items() if n not in at_evaluation
    }


def test_what_the_reading_order_names_exists_and_the_readme_stays_short():
    named = re.findall(r"`((?:zerosearch_jax|configs|rl)/[\w/.]+\.py)", README)
    assert named
    for name in named:
        assert (ROOT / name).exists() or (ROOT / "zerosearch_jax" / name).exists(), name
    assert README.count("\n") <= 380
