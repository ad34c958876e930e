"""Splits work between the processes of one job and gathers its results on all of them.

Each process generates with its own devices, and the learner uses the devices of all processes.
Every process therefore needs the same learner batch. With one process nothing is split.
"""

import pickle
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


def part(items: Sequence[Any], group_size: int = 1) -> list[Any]:
    """Returns this process's contiguous share of `items`, cut between groups only.

    The numbers of groups of two processes differ by at most one.
    """
    groups = range(len(items) // group_size)
    own = np.array_split(groups, jax.process_count())[jax.process_index()]
    return [items[group * group_size + i] for group in own for i in range(group_size)]


def gather(items: list[Any]) -> list[Any]:
    """Concatenates the lists of all processes in process order: `gather(part(items)) == items`.

    Every process must call it. Items are pickled and padded to a power of two of bytes, so that
    the all-gather compiles for few lengths.
    """
    if jax.process_count() == 1:
        return items
    content = np.frombuffer(pickle.dumps(items), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(content.size))
    padded = np.zeros(1 << int(sizes.max()).bit_length(), np.uint8)
    padded[: content.size] = content
    rows = multihost_utils.process_allgather(padded)  # [processes, bytes]
    return [
        item
        for row, size in zip(rows, sizes.tolist(), strict=True)
        for item in pickle.loads(row[:size].tobytes())
    ]


def to_host(array: jax.Array) -> np.ndarray:
    """Returns the whole array on the host, even if other processes hold parts of it.

    Every process must call it.
    """
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return multihost_utils.process_allgather(array, tiled=True)
