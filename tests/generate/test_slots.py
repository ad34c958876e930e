"""Tests the split of slots over replicas, the sharing of prompts and the cutting of rows."""

from zerosearch_jax.generate.slots import SlotLayout, cut_to_buckets, plan_prompts

LAYOUT = SlotLayout(replicas=2, slots_per_replica=3)
A, B = (1, 2), (3, 4, 5)


def test_slots_are_split_in_order_and_batched_per_replica():
    assert LAYOUT.by_replica([5, 0, 1, 2]) == [[0, 1, 2], [5]]
    # Rows 0 and 1 belong to the first replica, rows 2 and 3 to the second one.
    assert list(LAYOUT.batches([5, 0, 1, 2], 2)) == [{0: 0, 1: 1, 2: 5}, {0: 2}]
    # Unused rows point past the three cache rows of a replica.
    assert LAYOUT.cache_rows({0: 2, 2: 5, 3: 3}, 2).tolist() == [2, 4, 2, 0]


def test_each_replica_computes_a_prompt_once():
    prefills, source_of = plan_prompts(dict.fromkeys(range(6), A), {}, LAYOUT.replica_of)
    assert prefills == [0, 3]
    assert source_of == {1: 0, 2: 0, 4: 3, 5: 3}


def test_prompts_are_copied_only_from_slots_that_keep_them():
    held = {0: A, 1: B, 2: A}
    # Slot 0 keeps its prompt, slot 1 gives up B, and slot 2 is not started.
    assert plan_prompts({0: A, 1: A, 3: B}, held, LAYOUT.replica_of) == ([3], {1: 2})
    assert plan_prompts({0: B, 1: A, 2: B}, held, LAYOUT.replica_of) == ([0, 1], {2: 0})


def test_rows_are_cut_to_the_smallest_bucket_that_fits():
    rows = {7: list(range(11)), 9: [50, 51]}
    assert list(cut_to_buckets(rows, [4, 8])) == [
        (8, {7: list(range(8)), 9: [50, 51]}),
        (4, {7: [8, 9, 10], 9: []}),
    ]
    assert list(cut_to_buckets({7: []}, [4, 8])) == []
