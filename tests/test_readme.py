"""README and docs name files, links, configs and config keys that exist."""

import re
from contextlib import suppress
from functools import cache
from pathlib import Path

import pytest

from zerosearch_jax import config_flags
from zerosearch_jax.errors import UserError

ROOT = Path(__file__).parents[1]
DOCS = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [ROOT / "README.md", *DOCS]
# The log names files and keys of older commits; the code map quotes docstrings.
CURRENT = [page for page in PAGES if page.name not in ("log.md", "code_map.md")]
WRITTEN_BY_RUNS = {"report.md", "compile.md"}

LINK = re.compile(r"\]\(([^)\s]+)\)")
FILE = re.compile(r"`((?:[\w-]+/)*[\w-]+\.(?:py|sh|md|yaml))(?::[\w.-]+)?`")
CONFIG = re.compile(r"(?:CONFIG=|--config=)(configs/\w+\.py(?::[a-z0-9][\w.-]*)?)")
OVERRIDE = re.compile(r"--config\.([a-z0-9_]+(?:\.[a-z0-9_]+)*)")
SECTIONS = "rl optimizer advantage loss kl watch learner rollout search eval data curriculum critic"
KEY = re.compile(rf"`((?:{'|'.join(SECTIONS.split())})(?:\.[a-z0-9_]+)+)(?:=[^`]*)?`")


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


@cache
def load(config: str):
    return config_flags.load(config)


def has_key(config, key: str) -> bool:
    for part in key.split("."):
        if not hasattr(config, "keys") or part not in config:
            return False
        config = config[part]
    return True


@cache
def all_configs() -> tuple:
    """Every config, and every preset that a page names."""
    names = {config for page in CURRENT for config in CONFIG.findall(page.read_text("utf-8"))}
    names |= {f"configs/{path.name}" for path in (ROOT / "configs").glob("*.py")}
    configs = []
    for name in sorted(names):
        with suppress(UserError):  # test_named_configs_exist reports it, with its page
            configs.append(load(name))
    return tuple(configs)


def anchors(page: Path) -> set[str]:
    """GitHub's anchors of the page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_to_existing_files_and_headings(page):
    broken = []
    for link in LINK.findall(page.read_text("utf-8")):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        exists = re.match(r"[a-z]+://", link) or target.exists()
        if not exists or (anchor and target.exists() and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


@pytest.mark.parametrize("page", CURRENT, ids=name_of)
def test_named_source_files_exist(page):
    bases = (ROOT, ROOT / "zerosearch_jax", ROOT / "configs", ROOT / "launch", page.parent)
    named = set(FILE.findall(page.read_text("utf-8"))) - WRITTEN_BY_RUNS
    assert not [name for name in named if not any((base / name).exists() for base in bases)]


@pytest.mark.parametrize("page", CURRENT, ids=name_of)
def test_named_configs_exist(page):
    for config in CONFIG.findall(page.read_text("utf-8")):
        load(config)


@pytest.mark.parametrize("page", CURRENT, ids=name_of)
def test_overrides_in_commands_exist_in_the_named_config(page):
    missing = []
    for paragraph in page.read_text("utf-8").split("\n\n"):
        names = CONFIG.findall(paragraph) + ["configs/grpo.py"] * ("make run" in paragraph)
        configs = [load(name) for name in names] or all_configs()
        keys = OVERRIDE.findall(paragraph)
        missing += [key for key in keys if not any(has_key(c, key) for c in configs)]
    assert not missing


@pytest.mark.parametrize("page", CURRENT, ids=name_of)
def test_config_keys_in_backticks_exist(page):
    keys = KEY.findall(page.read_text("utf-8"))
    modules = [ROOT / "zerosearch_jax" / Path(*key.split(".")[:2]) for key in keys]
    assert not [
        key
        for key, module in zip(keys, modules, strict=True)
        if not key.endswith(".py")
        and not module.with_suffix(".py").exists()
        and not any(has_key(config, key) for config in all_configs())
    ]
