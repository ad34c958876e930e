"""The collectives of a compiled program, read from its optimized HLO text with loops counted.

The TPU compiler may spread one collective over several fusions, to overlap it with their work. Such
a collective appears in each of them with the same channel id and counts once.
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
# Bytes that each chip of a ring of g chips sends per byte of the result.
WIRE = {
    "all-gather": lambda g: (g - 1) / g,
    "reduce-scatter": lambda g: g - 1,
    "all-reduce": lambda g: 2 * (g - 1) / g,
    "all-to-all": lambda g: (g - 1) / g,
    "collective-permute": lambda g: 1,
}
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_COLLECTIVE = re.compile(rf" = (.*?) ({'|'.join(KINDS)})(-start)?\(")
_CALLED = re.compile(r"(?:calls|to_apply|body|branch_computations)=\{?((?:%[\w.\-]+(?:, )?)+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CONSTANT = re.compile(r"%([\w.\-]+) = [su]32\[\]\S* constant\((\d+)\)")
_LESS = re.compile(r"ROOT .* compare\([^%]*%[\w.\-]+, [^%]*%([\w.\-]+)\), direction=LT")


@dataclass(frozen=True)
class Collective:
    """One collective of a program.

    Attributes:
      bytes: size of its result on one chip, per run.
      wire_bytes: bytes that one chip sends over its links, per run.
      times: runs per call of the program.
    """

    kind: str
    bytes: int
    wire_bytes: float
    times: int


def collectives(hlo: str, unknown_trips: Sequence[int], devices: int) -> list[Collective]:
    """Returns all collectives of an optimized HLO module.

    Args:
      unknown_trips: trip counts for the loops whose count is not a constant, outermost first.
      devices: devices of the program, the group of a collective that names none.

    Raises:
      ValueError: loops of unknown trip count are nested deeper than `unknown_trips`.
    """
    bodies, entry = _computations(hlo)
    found: dict[tuple, Collective] = {}

    def visit(name: str, times: int, depth: int, fused: bool) -> None:
        for line in bodies[name]:
            if match := _COLLECTIVE.search(line):
                one = _collective(match, line, name, times, devices)
                channel = re.search(r"channel_id=(\d+)", line)
                key = (one.kind, channel[1], one.bytes) if fused and channel else (name, line)
                # Parts may be in a loop that hides the collective; its start is outside the loop.
                if key not in found or times < found[key].times:
                    found[key] = one
            deeper, trips = depth, 1
            if " while(" in line:
                trips = _trips(line, bodies)
                if trips is None:
                    if depth == len(unknown_trips):
                        raise ValueError(f"{depth + 1} nested loops of unknown trip count")
                    trips, deeper = unknown_trips[depth], depth + 1
            for called in _called(line):
                visit(called, times * trips, deeper, " fusion(" in line)

    visit(entry, 1, 0, False)
    return list(found.values())


def _computations(hlo: str) -> tuple[dict[str, list[str]], str]:
    bodies: dict[str, list[str]] = {}
    entry = name = ""
    for line in hlo.splitlines():
        if head := _HEAD.match(line):
            name = head[2]
            bodies[name] = []
            entry = name if head[1] else entry
        elif name:
            bodies[name].append(line)
    return bodies, entry


def _called(line: str) -> Iterator[str]:
    for match in _CALLED.finditer(line):
        yield from re.findall(r"%([\w.\-]+)", match[1])


def _trips(line: str, bodies: dict[str, list[str]]) -> int | None:
    """The trip count of a loop from 0 to a constant; None if the count depends on data."""
    if known := _TRIPS.search(line):
        return int(known[1])
    lines = bodies[re.search(r"condition=%([\w.\-]+)", line)[1]]
    constants = dict(match.groups() for match in map(_CONSTANT.search, lines) if match)
    less = next(filter(None, map(_LESS.search, lines)), None)
    return int(constants[less[1]]) if less and less[1] in constants else None


def _collective(match, line: str, computation: str, times: int, devices: int) -> Collective:
    kind, group = match[2], _group(line, devices)
    size = sum(_bytes(*shape) for shape in re.findall(r"(\w+)\[([\d,]*)\]", match[1]))
    if match[3] and kind == "all-gather":  # Its type also holds the operand.
        size = size * group // (group + 1)
    if match[3] and kind == "collective-permute":
        size //= 2
    if computation.startswith("all-reduce-scatter"):  # A TPU fusion that keeps one part.
        kind, size = "reduce-scatter", size // group
    return Collective(kind, size, size * WIRE[kind](group), times)


def _bytes(dtype: str, shape: str) -> int:
    bits = 8 if dtype == "pred" else int(re.search(r"\d+", dtype)[0])  # s32, bf16, f8e4m3fn
    return math.prod(int(n) for n in shape.split(",") if n) * bits // 8


def _group(line: str, devices: int) -> int:
    """Number of chips in one instance of a collective."""
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(match[1])
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return len(match[1].split(","))
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", line):
        sizes = dict(re.findall(r"'([\w.]+)'=(\d+)", match[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'([\w.]+)'", match[2]))
    return devices
