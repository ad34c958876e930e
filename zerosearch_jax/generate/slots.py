"""Host-side bookkeeping of a generator's slots: split over replicas, shared prompts, chunks."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

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

    def by_replica(self, slots: Iterable[int]) -> list[list[int]]:
        """Groups slots: one list per replica, in the given order."""
        groups: list[list[int]] = [[] for _ in range(self.replicas)]
        for slot in slots:
            groups[self.replica_of(slot)].append(slot)
        return groups

    def slot_at(self, groups: Sequence[Sequence[int]], rows: int) -> dict[int, int]:
        """Maps the rows of a program, `rows` per replica, to each replica's group of slots."""
        return {
            replica * rows + i: slot
            for replica, group in enumerate(groups)
            for i, slot in enumerate(group)
        }

    def batches(self, slots: Iterable[int], rows: int) -> Iterator[dict[int, int]]:
        """Yields `slot_at` of batches of at most `rows` slots per replica."""
        groups = self.by_replica(slots)
        for start in range(0, max(map(len, groups)), rows):
            yield self.slot_at([group[start : start + rows] for group in groups], rows)

    def cache_rows(self, slot_at: Mapping[int, int], rows: int) -> np.ndarray:
        """Returns each row's cache row within its replica, `[replicas * rows]` int32.

        Unused rows get indices past the cache's end.
        """
        past_end = np.arange(rows, dtype=np.int32) + self.slots_per_replica
        index = np.tile(past_end, self.replicas)
        for row, slot in slot_at.items():
            index[row] = slot % self.slots_per_replica
        return index


def plan_prompts(
    wanted: Mapping[int, tuple[int, ...]],
    held: Mapping[int, tuple[int, ...]],
    replica_of: Callable[[int], int],
) -> tuple[list[int], dict[int, int]]:
    """Plans the prefill of prompts so that each replica computes a prompt once.

    Args:
      wanted: slot -> prompt that it starts with now.
      held: slot -> prompt that its cache begins with.

    Returns:
      The slots whose prompt is computed; and target -> source, the slots that are copied then.
      Slots that hold their prompt already are in neither.
    """
    # A slot can be copied from if it keeps its prompt or is not started now.
    sources = {
        (replica_of(slot), prompt): slot
        for slot, prompt in held.items()
        if wanted.get(slot, prompt) == prompt
    }
    prefills, source_of = [], {}
    for slot, prompt in wanted.items():
        if held.get(slot) == prompt:
            continue
        source = sources.setdefault((replica_of(slot), prompt), slot)
        if source == slot:
            prefills.append(slot)
        else:
            source_of[slot] = source
    return prefills, source_of


def cut_to_buckets(
    rows: dict[int, Sequence[int]], buckets: Sequence[int]
) -> Iterator[tuple[int, dict[int, Sequence[int]]]]:
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
