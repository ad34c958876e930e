"""Several processes of one job: which part of the work is whose, and how all get to know it all.

A process plays with generators on its own devices and learns with all the others, so what the
learner's batch is made of has to be the same everywhere. With one process nothing is changed.
"""

import pickle
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


def part(items: Sequence[Any], group_size: int = 1) -> list[Any]:
    """This process's items: whole groups that lie side by side, as many as the others have or one
    more or less."""
    groups = range(len(items) // group_size)
    own = np.array_split(groups, jax.process_count())[jax.process_index()]
    return [items[group * group_size + i] for group in own for i in range(group_size)]


def gather(items: list[Any]) -> list[Any]:
    """The lists of all processes in their order, so `gather(part(items))` is `items`.

    Every process must call this. The items travel pickled, padded to a power of two of bytes, so
    that few lengths are ever compiled for.
    """
    if jax.process_count() == 1:
        return items
    content = np.frombuffer(pickle.dumps(items), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(content.size))
    padded = np.zeros(1 << int(sizes.max()).bit_length(), np.uint8)
    padded[: content.size] = content
    every = multihost_utils.process_allgather(padded)
    return [
        item
        for row, size in zip(every, sizes.tolist(), strict=True)
        for item in pickle.loads(row[:size].tobytes())
    ]


def to_host(array: jax.Array) -> np.ndarray:
    """The whole of an array that may lie on several processes' devices; every one must call."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return multihost_utils.process_allgather(array, tiled=True)
