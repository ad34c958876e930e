"""Rows of a benchmark: our measurements and a peer's, their medians and ratio."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from tabulate import tabulate

from zerosearch_jax.files import write_json


@dataclass(frozen=True)
class Row:
    """Our repeats and a peer's repeats of one measurement, taken in one run. More is better.

    Attributes:
      ours, peer: one measurement per repeat, in `unit`.
    """

    name: str
    ours: Sequence[float]
    peer: Sequence[float]
    unit: str

    def __str__(self) -> str:
        d = self.as_dict()
        medians = f"{d['ours']:.4g} against {d['peer']:.4g} {self.unit}"
        return f"{self.name}: {medians}, ratio {d['ratio']:.2f}, {len(self.ours)} repeats"

    def as_dict(self) -> dict[str, str | float]:
        """Name, medians, unit, and the ratio of our median to the peer's."""
        ours, peer = median(self.ours), median(self.peer)
        return {
            "name": self.name,
            "ours": ours,
            "peer": peer,
            "unit": self.unit,
            "ratio": ours / peer,
        }


def report(rows: Sequence[Row], workdir: Path) -> None:
    """Prints a table of medians and writes `workdir/bench.json`."""
    lines = [row.as_dict() | {"repeats": len(row.ours)} for row in rows]
    formats = ("", ".4g", ".4g", "", ".2f", "")
    print(f"\nmedians:\n{tabulate(lines, headers='keys', floatfmt=formats)}")
    workdir.mkdir(parents=True, exist_ok=True)
    path = workdir / "bench.json"
    write_json(path, [row.as_dict() for row in rows])
    print(f"\nwritten to {path}")
