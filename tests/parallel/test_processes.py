"""Tests of splitting work between processes and gathering the results."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zerosearch_jax.parallel import processes
from zerosearch_jax.parallel.mesh import make_mesh, sharding_of_rows


@settings(deadline=None, max_examples=60)
@given(groups=st.integers(0, 20), size=st.integers(1, 5), count=st.integers(1, 6))
def test_parts_of_all_processes_concatenate_to_the_whole(groups, size, count):
    items = list(range(groups * size))
    parts = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "process_count", lambda: count)
        for index in range(count):
            patch.setattr(jax, "process_index", lambda index=index: index)
            parts.append(processes.part(items, size))
    assert sum(parts, []) == items
    assert all(len(one) % size == 0 for one in parts)  # groups stay together
    assert max(map(len, parts)) - min(map(len, parts)) <= size


def test_gather_concatenates_the_items_of_each_process(monkeypatch):
    """A fake all-gather adds the contribution of a second process."""
    given = [[("a", 1.5)], [("b" * 5000, None), ("c", float("inf"))]]
    sent = []

    def allgather(array):  # `array` comes from process 0; process 1 would send the same kind
        sent.append(np.asarray(array))
        if array.ndim == 0:
            return np.array([_size(part) for part in given], np.int32)
        rows = [np.frombuffer(_dump(part), np.uint8) for part in given]
        return np.stack([np.pad(row, (0, array.size - row.size)) for row in rows])

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(processes.multihost_utils, "process_allgather", allgather)
    assert processes.gather(given[0]) == given[0] + given[1]
    assert sent[0] == _size(given[0]) and sent[1].size == 8192
    assert sent[1][: _size(given[0])].tobytes() == _dump(given[0])


def _dump(items) -> bytes:
    return processes.pickle.dumps(items)


def _size(items) -> int:
    return len(_dump(items))


def test_single_process_gathers_its_own_list():
    items = [object()]
    assert processes.gather(items) is items
    assert processes.part(items, 1) == items


def test_to_host_returns_the_whole_sharded_array():
    values = np.arange(12.0).reshape(4, 3)
    mesh = make_mesh(2, 2, 2)
    np.testing.assert_array_equal(
        processes.to_host(jax.device_put(values, sharding_of_rows(mesh))), values
    )
