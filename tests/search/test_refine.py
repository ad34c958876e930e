"""Tests of document refinement."""

import pytest

from zerosearch_jax.search.engine import SearchRequest, SearchResult
from zerosearch_jax.search.http_client import TooLong
from zerosearch_jax.search.refine import RefiningEngine
from zerosearch_jax.text.prompts import NO_HELPFUL_INFORMATION, refine_prompt

REQUESTS = [
    SearchRequest(7, 0, "capital of Chad", "Which capital?", ("N'Djamena",), False),
    SearchRequest(3, 2, "iron symbol", "Which symbol?", ("Fe",), True),
    SearchRequest(3, 1, "peak", "Which peak?", ("Fuji",), False),
    SearchRequest(5, 0, "sea", "Which sea?", ("Aral",), False),
]
FOUND = {
    (7, 0): SearchResult((7, 0), ("N'Djamena is its capital.", "Chad is large.")),
    (3, 2): SearchResult((3, 2), ("Iron is Fe.",)),
    (3, 1): SearchResult((3, 1), ()),
    (5, 0): SearchResult((5, 0), (), failure="timeout"),
}


class Engine:
    """Answers in reversed order."""

    name = "shelf"

    def search(self, requests):
        self.requests = list(requests)
        return [FOUND[request.key] for request in reversed(requests)]


class Reader:
    def __init__(self, texts):
        self.texts, self.calls = texts, []

    def __call__(self, prompts, keys):
        self.calls.append(dict(zip(keys, prompts, strict=True)))
        return [self.texts[key] for key in keys]


def test_documents_are_refined_for_their_own_request():
    engine, reader = Engine(), Reader({(7, 0): " It is N'Djamena.\n", (3, 2): "Fe"})
    refining = RefiningEngine(engine, reader)
    results = {result.key: result for result in refining.search(REQUESTS)}
    assert engine.requests == REQUESTS and refining.name == "refined shelf"
    assert reader.calls == [
        {r.key: refine_prompt(r.question, r.query, FOUND[r.key].documents) for r in REQUESTS[:2]}
    ]
    assert results[7, 0] == SearchResult((7, 0), ("It is N'Djamena.",))
    assert results[3, 2] == SearchResult((3, 2), ("Fe",))


def test_failed_and_empty_results_are_returned_unchanged():
    reader = Reader({})
    results = RefiningEngine(Engine(), reader).search(REQUESTS[2:])
    assert sorted(results, key=lambda r: r.key) == [FOUND[3, 1], FOUND[5, 0]]
    assert reader.calls == [{}]


@pytest.mark.parametrize(
    ("text", "document"),
    [
        (" \n", NO_HELPFUL_INFORMATION),
        ("<think>Is it Chad?</think>\nIt is N'Djamena.", "It is N'Djamena."),
        ("<think>It is N'Djamena, because", NO_HELPFUL_INFORMATION),
    ],
)
def test_a_refined_document_is_the_text_without_thoughts(text, document):
    (result,) = RefiningEngine(Engine(), Reader({(7, 0): text})).search(REQUESTS[:1])
    assert result.documents == (document,)


def test_documents_too_long_for_the_model_fail_only_their_search():
    texts = {(7, 0): TooLong("too long: 9 tokens, at most 5"), (3, 2): "Fe"}
    refining = RefiningEngine(Engine(), Reader(texts))
    results = {result.key: result for result in refining.search(REQUESTS[:2])}
    assert results[7, 0] == SearchResult((7, 0), (), "too long: 9 tokens, at most 5", "too_long")
    assert results[3, 2].documents == ("Fe",)


def test_missing_text_raises():
    with pytest.raises(ValueError, match="zip"):
        RefiningEngine(Engine(), lambda prompts, keys: []).search(REQUESTS[:1])
