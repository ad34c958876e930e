"""Tests of the simulated engine."""

import pytest

from zerosearch_jax.search.engine import SearchRequest
from zerosearch_jax.search.http_client import SearchFailed, TooLong
from zerosearch_jax.search.simulated import SimulatedEngine
from zerosearch_jax.text.prompts import simulator_prompt

REQUESTS = [
    SearchRequest(7, 0, "capital of Chad", "Which capital?", ("N'Djamena", "Fort-Lamy"), False),
    SearchRequest(3, 2, "iron symbol", "Which symbol?", ("Fe",), True),
    SearchRequest(3, 1, "peak", "Which peak?", ("Fuji",), False),
]


class Writer:
    def __init__(self, texts):
        self.texts = texts
        self.calls = []

    def __call__(self, prompts, keys):
        self.calls.append((list(prompts), list(keys)))
        return self.texts


@pytest.mark.parametrize("form", ["finetuned", "prompted"])
def test_each_prompt_contains_only_its_own_request(form):
    writer = Writer(["Doc 1: a"] * 3)
    SimulatedEngine(writer, form=form, topk=3).search(REQUESTS)
    ((prompts, keys),) = writer.calls
    assert keys == [(7, 0), (3, 2), (3, 1)]
    for request, prompt in zip(REQUESTS, prompts, strict=True):
        assert prompt == simulator_prompt(
            request.question, request.golden_answers[0], request.query, request.noisy, form, 3
        )
        assert request.query in prompt and request.question in prompt
        assert prompt.endswith("Noisy Output:" if request.noisy else "Useful Output:")
        others = [r for r in REQUESTS if r is not request]
        assert not any(r.query in prompt or r.question in prompt for r in others)


def test_texts_are_cut_into_documents_of_their_request():
    texts = [
        " Doc 1: one\nDoc 2: two\nover two lines\nDoc 3: three\nDoc 4: four",
        "I do not know any documents.",
        "",
    ]
    results = SimulatedEngine(Writer(texts), form="finetuned", topk=3).search(REQUESTS)
    assert [result.key for result in results] == [(7, 0), (3, 2), (3, 1)]
    assert [result.documents for result in results] == [
        ("one", "two over two lines", "three"), (), ()
    ]  # fmt: skip
    assert not any(result.failure for result in results)


def test_a_query_too_long_for_the_simulator_fails_only_its_search():
    texts = [
        "Doc 1: a",
        TooLong("too long: 9 tokens, at most 5"),
        SearchFailed("HTTP 500", "http_5xx"),
    ]
    results = SimulatedEngine(Writer(texts), form="finetuned", topk=3).search(REQUESTS)
    assert [bool(result.failure) for result in results] == [False, True, True]
    assert [result.too_long for result in results] == [False, True, False]


def test_missing_text_raises():
    with pytest.raises(ValueError, match="zip"):
        SimulatedEngine(Writer(["Doc 1: a"]), form="finetuned", topk=3).search(REQUESTS)
