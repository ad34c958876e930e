"""Tests of the BM25 engine with noisy results."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zerosearch_jax.data.embedded.world import corpus, load_entities, write_questions
from zerosearch_jax.errors import UserError
from zerosearch_jax.search.bm25 import BM25Engine
from zerosearch_jax.search.curriculum import draw_noisy
from zerosearch_jax.search.engine import Passage, SearchRequest
from zerosearch_jax.search.noisy import NoisyEngine
from zerosearch_jax.text.matching import mentions


@pytest.fixture(scope="module")
def bm25():
    return BM25Engine(corpus(load_entities()))


@pytest.fixture(scope="module")
def requests():
    """Good queries for the last hop of 60 test questions."""
    return [
        SearchRequest(n, n % 3, q.hops[-1].query, q.question, q.golden_answers, noisy=n % 2 == 0)
        for n, q in enumerate(write_questions(load_entities(), "test", 0)[:60])
    ]


def has_answer(request, result):
    return any(mentions(d, a) for d in result.documents for a in request.golden_answers)


def test_share_zero_equals_the_engine(bm25, requests):
    assert NoisyEngine(bm25, 0.0, 3).search(requests) == bm25.search(requests)


def test_share_one_withholds_every_answer(bm25, requests):
    results = NoisyEngine(bm25, 1.0, 3).search(requests)
    assert [r.key for r in results] == [r.key for r in requests]
    assert all(len(result.documents) == 3 and result.failure == "" for result in results)
    assert not any(has_answer(*pair) for pair in zip(requests, results, strict=True))
    # BM25 itself finds most of the answers.
    good = bm25.search(requests)
    assert sum(has_answer(*pair) for pair in zip(requests, good, strict=True)) > 50


def test_noisy_result_holds_the_best_passages_without_the_answer():
    texts = ["fox fox Fe", "fox fox bird", "fox bird bird", "fox iron", "bird", "fox gold bird"]
    engine = BM25Engine([Passage(str(i), "e", "t", t, ()) for i, t in enumerate(texts)], topk=2)
    request = SearchRequest(0, 0, "fox", "?", ("fe", "Iron"))
    useless = [p.text for p in engine.ranked("fox", 6) if p.text not in (texts[0], texts[3])]
    assert len(useless) == 3
    (result,) = NoisyEngine(engine, 1.0, 0).search([request])
    assert result.documents == tuple(useless[:2])
    (few,) = NoisyEngine(engine, 1.0, 0).search([SearchRequest(0, 0, "gold", "?", ("Gold",))])
    assert few.documents == () and few.failure == ""


@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 99), share=st.floats(0, 1), higher=st.floats(0, 1))
def test_each_search_follows_its_own_draw(bm25, requests, seed, share, higher):
    requests = requests[:8]
    clean, noise = bm25.search(requests), NoisyEngine(bm25, 1.0, seed).search(requests)
    engine = NoisyEngine(bm25, share, seed)
    results = engine.search(requests)
    for request, result, good, bad in zip(requests, results, clean, noise, strict=True):
        drawn = draw_noisy(seed, 0, request.episode, request.turn, share)
        assert result == (bad if drawn else good)
        if drawn and higher >= share:
            assert draw_noisy(seed, 0, request.episode, request.turn, higher)
    assert engine.search(requests[::-1]) == results[::-1]


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_share_out_of_range_is_refused(bm25, share):
    with pytest.raises(UserError, match="share is"):
        NoisyEngine(bm25, share, 0)
