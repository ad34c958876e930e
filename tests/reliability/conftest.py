"""Prints, at the end of the run, a table of the tries and failures of each kind of fault."""

from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile(
    "fuzz",
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
TABLE = pytest.StashKey[dict[tuple[str, str], Counter]]()


@pytest.fixture
def tally(request) -> Callable[..., None]:
    """`tally(kind, tries=1, failures=0)` adds to the row of `kind` in the table.

    docs/reliability.md has the same columns: kind, test, tries, failures.
    """
    table = request.config.stash.setdefault(TABLE, {})

    def add(kind: str, tries: int = 1, failures: int = 0) -> None:
        test = request.node.nodeid.partition("[")[0]
        table.setdefault((kind, test), Counter()).update(tries=tries, failures=failures)

    return add


def pytest_terminal_summary(terminalreporter, config) -> None:
    if table := config.stash.get(TABLE, {}):
        terminalreporter.section("reliability")
        for (kind, test), counts in table.items():
            row = (kind, test, f"{counts['tries']:,}", str(counts["failures"]))
            terminalreporter.write_line(f"| {' | '.join(row)} |")
