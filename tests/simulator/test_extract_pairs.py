"""Tests of extracting pairs from labeled episodes: filters, balance and the held-out split."""

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from zerosearch_jax.simulator.pairs import Pair, balanced, extract_pairs


def _episode(id_: str, question: str, *queries: str, finish="answer", documents=2, failure=""):
    searches = [
        {"turn": i, "query": q, "documents": [f"{q} {n}" for n in range(documents)]}
        | {"failure": failure}
        for i, q in enumerate(queries)
    ]
    return dict(
        id=id_, question=question, golden_answers=["g", "h"], finish=finish, searches=searches
    )


EPISODES = [
    _episode("a#0", "A", "x", "y"),
    _episode("a#1", "A", "x", "z"),  # repeats x
    _episode("b#0", "B", "x", "y", "z"),
    _episode("c#0", "C", "x", finish="length"),
    _episode("d#0", "D", "x", documents=1),
    _episode("e#0", "E", "x", documents=0, failure="timeout"),
    _episode("f#0", "F", "x"),
    _episode("g#0", "G"),
]
RIGHT = {"a#0", "a#1", "e#0"}
LABELS = {
    f"{e['id']}/{s['turn']}": "useful" if e["id"] in RIGHT else "noisy"
    for e in EPISODES
    for s in e["searches"]
} | {"f#0/0": None}


def _extract(**changes):
    arguments = dict(topk=2, last_only=False, balance=False, heldout_share=0.0, seed=0) | changes
    return extract_pairs(EPISODES, LABELS, **arguments)


def test_filters_drop_searches_and_count_the_rest():
    train, heldout, counts = _extract()
    assert [pair.id for pair in train] == ["a#0/0", "a#0/1", "a#1/1", "b#0/0", "b#0/1", "b#0/2"]
    assert heldout == []
    assert train[1] == Pair("a#0/1", "y", ("y 0", "y 1"), "A", ("g", "h"), "useful", True)
    assert [pair.last for pair in train] == [False, True, True, False, False, True]
    assert {stage: tuple(row.values()) for stage, row in counts.items()} == {
        "searches": (5, 5, 11),
        "labelled": (5, 5, 10),
        "not failed": (4, 5, 9),
        "with 2 documents": (4, 4, 8),
        "not cut by length": (4, 3, 7),
        "without repetitions": (3, 3, 6),
        "train": (3, 3, 6),
        "held out": (0, 0, 0),
    }


def test_a_failed_search_drops_its_whole_episode():
    episode = _episode("a#0", "A", "x", "y")
    episode["searches"][1]["failure"] = "timeout"
    options = dict(topk=2, last_only=False, balance=False, heldout_share=0.0, seed=0)
    train, _, counts = extract_pairs([episode], {"a#0/0": "noisy", "a#0/1": "noisy"}, **options)
    assert train == [] and counts["labelled"]["all"] == 2


def test_last_only_keeps_the_last_search_of_each_episode():
    train, _, counts = _extract(last_only=True)
    assert [pair.id for pair in train] == ["a#0/1", "a#1/1", "b#0/2"]
    assert tuple(counts["last of their episode"].values()) == (2, 1, 3)
    train, _, _ = _extract(last_only=True, balance=True)
    assert sorted(pair.label for pair in train) == ["noisy", "useful"]


PAIRS = st.lists(st.tuples(st.integers(0, 6), st.booleans()), max_size=40).map(
    lambda rows: [
        Pair(f"{i}", f"q{i}", (), f"Q{q}", ("g",), "useful" if useful else "noisy", True)
        for i, (q, useful) in enumerate(rows)
    ]
)


@settings(deadline=None, max_examples=60)
@given(PAIRS, st.integers(0, 3))
def test_balance_cuts_the_larger_label_whatever_the_order(pairs, seed):
    kept = balanced(pairs, seed)
    labels = Counter(pair.label for pair in pairs)
    size = min(labels["useful"], labels["noisy"])
    assert Counter(pair.label for pair in kept) == Counter({"useful": size, "noisy": size})
    assert kept == [pair for pair in pairs if pair in kept]
    assert set(balanced(pairs[::-1], seed)) == set(kept)


def test_the_seed_decides_the_held_out_answers_and_the_balance():
    episodes = [  # Two questions share each gold answer.
        _episode(f"{i}#0", f"question {i}", "x") | {"golden_answers": [f"answer {i // 2}", "h"]}
        for i in range(400)
    ]
    labels = {f"{i}#0/0": "useful" if i % 4 else "noisy" for i in range(400)}

    def parts(seed, share):
        arguments = dict(topk=2, last_only=False, heldout_share=share, seed=seed)
        train, heldout, _ = extract_pairs(episodes, labels, balance=False, **arguments)
        assert len(train) + len(heldout) == 400
        answers = [{pair.golden_answers for pair in part} for part in (train, heldout)]
        assert not answers[0] & answers[1]  # The questions of an answer stay together.
        return answers[1]

    heldout = parts(0, 0.2)
    assert 19 < len(heldout) < 61  # Of 200 answers: 40 ± 3.7 standard deviations.
    assert heldout == parts(0, 0.2) < parts(0, 0.4)  # A larger share adds answers.
    assert heldout != parts(1, 0.2)
    pairs = [
        Pair(f"{i}", "q", (), "Q", ("g",), "useful" if i < 30 else "noisy", True) for i in range(40)
    ]
    assert balanced(pairs, 0) != balanced(pairs, 1)
