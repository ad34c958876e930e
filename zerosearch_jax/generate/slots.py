"""Host-side bookkeeping of a generator's slots: split over replicas, shared prompts, chunks."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass
class DecodingSlot:
    """Host state of a slot that is sampling."""

    stream: tuple[int, int]  # numbers folded into the key
    limit: int  # tokens that it may still sample
    stop_state: int = 0  # state of the stop automaton
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class SlotLayout:
    """Even split of a generator's slots over the replicas of its mesh, in order.

    Attributes:
      replicas: number of replicas.
      slots_per_replica: number of slots, and of cache rows, of each.
    """

    replicas: int
    slots_per_replica: int

    def replica_of(self, slot: int) -> int:
        """Returns the replica that holds a slot."""
        return slot // self.slots_per_replica

    def by_replica(self, items: Sequence[tuple[int, Any]]) -> list[list[Any]]:
        """Groups `(slot, item)` pairs: one list of items per replica, in the given order."""
        groups: list[list[Any]] = [[] for _ in range(self.replicas)]
        for slot, item in items:
            groups[self.replica_of(slot)].append(item)
        return groups

    def batches(self, items: Sequence[tuple[int, Any]], size: int) -> Iterator[list[list[Any]]]:
        """Yields the groups of `by_replica` in batches of at most `size` items per replica."""
        groups = self.by_replica(items)
        for start in range(0, max(map(len, groups)), size):
            yield [group[start : start + size] for group in groups]

    def cache_rows(self, groups: Sequence[Sequence[int]], rows: int) -> np.ndarray:
        """Returns the cache row within its replica of each slot, `[replicas * rows]` int32.

        Args:
          groups: at most `rows` slots per replica. Unused rows get indices past the cache's end.
        """
        first, size = self.slots_per_replica, self.replicas
        index = np.tile(np.arange(first, first + rows), (size, 1))
        for replica, group in enumerate(groups):
            index[replica, : len(group)] = [slot % self.slots_per_replica for slot in group]
        return index.ravel().astype(np.int32)


@dataclass(frozen=True)
class PromptPlan:
    """How slots get their prompts. Slots that hold theirs already are in no list.

    Attributes:
      copies: `(source, target)` slots; the source holds the prompt now.
      prefills: slots whose prompt is computed.
      late_copies: `(source, target)` slots; the source is one of `prefills`.
    """

    copies: list[tuple[int, int]]
    prefills: list[int]
    late_copies: list[tuple[int, int]]


def plan_prompts(
    wanted: Mapping[int, tuple[int, ...]],
    held: Mapping[int, tuple[int, ...]],
    replica_of: Callable[[int], int],
) -> PromptPlan:
    """Plans the prefill of prompts so that each replica computes a prompt once.

    Args:
      wanted: slot -> prompt that it starts with now.
      held: slot -> prompt that its cache begins with.
    """
    # A slot can be copied from if it keeps its prompt or is not started now.
    sources = {
        (replica_of(slot), prompt): slot
        for slot, prompt in held.items()
        if wanted.get(slot, prompt) == prompt
    }
    plan = PromptPlan([], [], [])
    for slot, prompt in wanted.items():
        if held.get(slot) == prompt:
            continue
        source = sources.setdefault((replica_of(slot), prompt), slot)
        if source == slot:
            plan.prefills.append(slot)
        elif source in plan.prefills:
            plan.late_copies.append((source, slot))
        else:
            plan.copies.append((source, slot))
    return plan


def cut_to_buckets(
    rows: dict[int, list[int]], buckets: Sequence[int]
) -> Iterator[tuple[int, dict[int, list[int]]]]:
    """Cuts rows of tokens into chunks; yields each chunk's bucket size and its part of each row.

    Args:
      buckets: ascending chunk lengths. The smallest that holds the longest remaining row is used,
        or else the largest.
    """
    while any(rows.values()):
        longest = max(map(len, rows.values()))
        size = next((size for size in buckets if size >= longest), buckets[-1])
        yield size, {i: row[:size] for i, row in rows.items()}
        rows = {i: row[size:] for i, row in rows.items()}
