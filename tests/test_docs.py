"""The generated pages in docs/ are current."""

import importlib.util
from pathlib import Path

import pytest

from zerosearch_jax.telemetry.metrics import METRICS

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture(scope="module")
def generate():
    spec = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_pages_are_current(generate):
    for path, text in generate.pages().items():
        assert path.exists() and path.read_text("utf-8") == text, (
            f"{path.name} is not current; run `make docs` (python docs/generate.py) and commit it"
        )


def test_code_map_names_every_module_with_a_docstring(generate):
    package = DOCS.parent / "zerosearch_jax"
    written = {path for path in package.rglob("*.py") if path.read_text("utf-8").strip()}
    page = generate.code_map()
    missing = [path for path in written if f"](../{path.relative_to(DOCS.parent)})" not in page]
    assert not missing, f"modules without a docstring: {missing}"


def test_metrics_page_names_every_metric(generate):
    page = generate.metrics()
    missing = [name for name in METRICS if f"| `{name.removeprefix('eval/')}` |" not in page]
    assert not missing
