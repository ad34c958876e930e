"""Rows of a benchmark: ours against a named peer, as medians and their ratio."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median


@dataclass(frozen=True)
class Row:
    """Ours and a peer's repeats of one measurement, taken in one run; more is better.

    Attributes:
      ours, peer: one figure a repeat, in `unit`.
    """

    name: str
    ours: Sequence[float]
    peer: Sequence[float]
    unit: str

    def __str__(self) -> str:
        d = self.as_dict()
        return (
            f"{self.name:40}  {d['ours']:8.4g}   {d['peer']:8.4g}  {d['ratio']:5.2f}  "
            f"{self.unit} ({len(self.ours)})"
        )

    def as_dict(self) -> dict[str, str | float]:
        """Medians, and ours over the peer's."""
        ours, peer = median(self.ours), median(self.peer)
        return {
            "name": self.name,
            "ours": ours,
            "peer": peer,
            "unit": self.unit,
            "ratio": ours / peer,
        }


def report(rows: Sequence[Row], workdir: Path) -> None:
    """Prints the table and writes `workdir/bench.json`."""
    print(f"\n{'':40}      ours       peer  ratio  (medians; repeats)")
    for row in rows:
        print(row)
    workdir.mkdir(parents=True, exist_ok=True)
    path = workdir / "bench.json"
    path.write_text(json.dumps([row.as_dict() for row in rows], indent=1) + "\n")
    print(f"\nwritten to {path}")
