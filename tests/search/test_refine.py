"""Tests of document refinement."""

import pytest

from zerosearch_jax.search.engine import SearchRequest, SearchResult
from zerosearch_jax.search.http_client import TooLong
from zerosearch_jax.search.refine import RefiningEngine
from zerosearch_jax.text.prompts import NO_HELPFUL_INFORMATION, format_documents, refine_prompt

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
    def __init__(self, texts, room=None):
        self.texts, self.calls, self.room = texts, [], room

    def __call__(self, prompts, keys):
        self.calls.append(dict(zip(keys, prompts, strict=True)))
        return [self.texts[key] for key in keys if key in self.texts]

    def cut(self, text, prompt):
        return text[: self.room]


def test_documents_are_refined_for_their_own_request():
    engine, reader = Engine(), Reader({(7, 0): " It is N'Djamena.\n", (3, 2): "Fe"})
    refining = RefiningEngine(engine, reader)
    results = {result.key: result for result in refining.search(REQUESTS)}
    assert engine.requests == REQUESTS and refining.name == "refined shelf"
    assert reader.calls == [
        {
            r.key: refine_prompt(r.question, r.query, format_documents(FOUND[r.key].documents))
            for r in REQUESTS[:2]
        }
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


def test_documents_too_long_for_the_model_are_cut():
    reader = Reader({(7, 0): "It is N'Djamena."}, room=31)
    (result,) = RefiningEngine(Engine(), reader).search(REQUESTS[:1])
    assert result.documents == ("It is N'Djamena.",)
    assert "\nDoc 1: N'Djamena is its capital\n\nHelpful" in reader.calls[0][7, 0]


def test_a_query_too_long_for_the_model_fails_only_its_search():
    texts = {(7, 0): TooLong("too long: 9 tokens, at most 5"), (3, 2): "Fe"}
    refining = RefiningEngine(Engine(), Reader(texts))
    results = {result.key: result for result in refining.search(REQUESTS[:2])}
    assert results[7, 0] == SearchResult((7, 0), (), "too long: 9 tokens, at most 5", "too_long")
    assert results[3, 2].documents == ("Fe",)


def test_missing_text_raises():
    with pytest.raises(ValueError, match="zip"):
        RefiningEngine(Engine(), Reader({})).search(REQUESTS[:1])
