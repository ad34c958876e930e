"""Tests the split of slots over replicas, the sharing of prompts and the cutting of rows."""

from zerosearch_jax.generate.slots import SlotLayout, cut_to_buckets, plan_prompts

LAYOUT = SlotLayout(replicas=2, slots_per_replica=3)
A, B = (1, 2), (3, 4, 5)


def test_slots_are_split_in_order_and_batched_per_replica():
    items = [(slot, f"slot {slot}") for slot in (5, 0, 1, 2)]
    assert LAYOUT.by_replica(items) == [["slot 0", "slot 1", "slot 2"], ["slot 5"]]
    assert list(LAYOUT.batches(items, 2)) == [
        [["slot 0", "slot 1"], ["slot 5"]],
        [["slot 2"], []],
    ]
    # Unused rows point past the three cache rows of a replica.
    assert LAYOUT.cache_rows([[2], [5, 3]], 2).tolist() == [2, 4, 2, 0]


def test_each_replica_computes_a_prompt_once():
    plan = plan_prompts(dict.fromkeys(range(6), A), {}, LAYOUT.replica_of)
    assert (plan.copies, plan.prefills) == ([], [0, 3])
    assert plan.late_copies == [(0, 1), (0, 2), (3, 4), (3, 5)]


def test_prompts_are_copied_only_from_slots_that_keep_them():
    held = {0: A, 1: B, 2: A}
    # Slot 0 keeps its prompt, slot 1 gives up B, and slot 2 is not started.
    plan = plan_prompts({0: A, 1: A, 3: B}, held, LAYOUT.replica_of)
    assert (plan.prefills, plan.late_copies) == ([3], [])
    assert plan.copies == [(2, 1)]
    plan = plan_prompts({0: B, 1: A, 2: B}, held, LAYOUT.replica_of)
    assert (plan.copies, plan.prefills, plan.late_copies) == ([], [0, 1], [(0, 2)])


def test_rows_are_cut_to_the_smallest_bucket_that_fits():
    rows = {7: list(range(11)), 9: [50, 51]}
    assert list(cut_to_buckets(rows, [4, 8])) == [
        (8, {7: list(range(8)), 9: [50, 51]}),
        (4, {7: [8, 9, 10], 9: []}),
    ]
    assert list(cut_to_buckets({7: []}, [4, 8])) == []
