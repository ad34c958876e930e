"""Tests of both retriever dialects against a real server."""

import pytest

from zerosearch_jax.errors import UserError
from zerosearch_jax.search.engine import SearchRequest, SearchResult
from zerosearch_jax.search.http_client import JsonClient
from zerosearch_jax.search.retriever import RetrieverEngine, plain

REQUESTS = [
    SearchRequest(4, 0, "capital of Chad", "?", ("N'Djamena",)),
    SearchRequest(9, 2, "iron", "?", ("Fe",)),
]


def engine(url, dialect, topk=2):
    client = JsonClient(url, timeout_secs=10, attempts=1, backoff_secs=0)
    return RetrieverEngine(client, topk=topk, dialect=dialect, workers=4)


def hit(text):
    return {"document": {"id": "1", "contents": text}, "score": 0.5}


def test_search_r1_sends_one_batch(serve):
    url, calls = serve(
        lambda call: (200, {"result": [[hit(f'"T"\n{q}')] for q in call.payload["queries"]]})
    )
    assert engine(url, "search_r1").search(REQUESTS) == [
        SearchResult((4, 0), ("T: capital of Chad",)),
        SearchResult((9, 2), ("T: iron",)),
    ]
    assert [(c.method, c.path, c.payload) for c in calls] == [
        (
            "POST",
            "/retrieve",
            {"queries": ["capital of Chad", "iron"], "topk": 2, "return_scores": True},
        )
    ]
    assert engine(url, "search_r1").search([]) == [] and len(calls) == 1


def test_search_r1_reads_bare_documents_and_keeps_topk(serve):
    bare = [{"id": "1", "contents": c} for c in ("a", "b", "c")]
    url, _ = serve(lambda call: (200, {"result": [bare, []]}))
    results = engine(url, "search_r1").search(REQUESTS)
    assert [r.documents for r in results] == [("a", "b"), ()]
    assert not any(r.failure for r in results)


@pytest.mark.parametrize("dialect", ["search_r1", "zerosearch"])
def test_a_query_that_the_server_finds_too_long_fails_alone(serve, dialect):
    def reply(call):
        queries = call.payload.get("queries") or [call.payload["query"]]
        if any(len(query) > 50 for query in queries):
            return 413, {}
        found = [[hit(query)] for query in queries]
        return 200, {"result": found} if dialect == "search_r1" else [{"text": queries[0]}]

    long = SearchRequest(5, 1, "x" * 51, "?", ("a",))
    results = engine(serve(reply)[0], dialect).search([REQUESTS[0], long, REQUESTS[1]])
    assert [r.too_long for r in results] == [False, True, False]
    assert [r.documents for r in results] == [("capital of Chad",), (), ("iron",)]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({"results": []}, 'no list "result"'),
        ([[], []], 'no list "result"'),
        ({"result": [[hit("a")]]}, '"result" has 1 lists for 2 queries'),
    ],
)
def test_search_r1_reply_of_the_wrong_shape_fails_the_batch(serve, body, reason):
    url, _ = serve(lambda call: (200, body))
    results = engine(url, "search_r1").search(REQUESTS)
    assert [r.key for r in results] == [(4, 0), (9, 2)]
    assert all(reason in r.failure and r.documents == () for r in results)


@pytest.mark.parametrize(
    ("hits", "reason"),
    [
        ("text", "not a list"),
        ([{"document": {"text": "a"}}], '"contents"'),
        ([{"document": "a"}], '"contents"'),
        ([{"document": None}], '"contents"'),
        ([None], '"contents"'),
        (None, "not a list"),
        ({"0": hit("a")}, "not a list"),
        ([hit("a"), hit(7)], '"contents"'),
    ],
)
def test_search_r1_bad_result_fails_only_its_request(serve, hits, reason):
    url, _ = serve(lambda call: (200, {"result": [[hit("good")], hits]}))
    first, second = engine(url, "search_r1").search(REQUESTS)
    assert first == SearchResult((4, 0), ("good",))
    assert second.key == (9, 2) and second.documents == () and reason in second.failure


def test_zerosearch_sends_one_request_per_query(serve):
    url, calls = serve(
        lambda call: (200, [{"text": f"{call.payload['query']} {i}"} for i in range(3)])
    )
    assert engine(url, "zerosearch").search(REQUESTS) == [
        SearchResult((4, 0), ("capital of Chad 0", "capital of Chad 1")),
        SearchResult((9, 2), ("iron 0", "iron 1")),
    ]
    assert {(c.method, c.path, c.payload["query"], c.payload["top_k"]) for c in calls} == {
        ("POST", "/retrieve", "capital of Chad", 2),
        ("POST", "/retrieve", "iron", 2),
    }


@pytest.mark.parametrize(
    ("status", "body", "reason"),
    [
        (500, {}, "HTTP 500"),
        (200, {"text": "a"}, "not a list"),
        (200, [{"contents": "a"}], '"text"'),
        (200, ["a"], '"text"'),
    ],
)
def test_zerosearch_bad_reply_fails_only_its_request(serve, status, body, reason):
    def reply(call):
        return (status, body) if call.payload["query"] == "iron" else (200, [{"text": "good"}])

    first, second = engine(serve(reply)[0], "zerosearch").search(REQUESTS)
    assert first == SearchResult((4, 0), ("good",))
    assert second.key == (9, 2) and second.documents == () and reason in second.failure


@pytest.mark.parametrize("dialect", ["search_r1", "zerosearch"])
def test_lone_surrogates_of_a_document_are_replaced(serve, dialect):
    def reply(call):
        text = "a\ud83d b \ud83d\ude00 \udc00"
        return 200, {"result": [[hit(text)]]} if dialect == "search_r1" else [{"text": text}]

    (found,) = engine(serve(reply)[0], dialect).search(REQUESTS[:1])
    assert found.documents == ("a\ufffd b \U0001f600 \ufffd",)


@pytest.mark.parametrize("dialect", ["search_r1", "zerosearch"])
def test_scores_that_are_not_finite_are_accepted(serve, dialect):
    """Python servers write NaN; scores are not read."""
    body = {"search_r1": b'{"result": [[{"document": {"contents": "a"}, "score": NaN}]]}',
            "zerosearch": b'[{"text": "a", "score": -Infinity}]'}[dialect]  # fmt: skip
    (found,) = engine(serve(lambda call: (200, body))[0], dialect).search(REQUESTS[:1])
    assert found.documents == ("a",)


@pytest.mark.parametrize(
    ("contents", "document"),
    [
        ('"Chad"\nA country.\nIn Africa.', "Chad: A country.\nIn Africa."),
        ('"The "Iron" Age"\ntext', 'The "Iron" Age: text'),
        ("No title\nat all", "No title\nat all"),
        ('"A quotation" alone', '"A quotation" alone'),
        ('"Only a title"', '"Only a title"'),
        ('""\ntext', '""\ntext'),
        ("", ""),
    ],
)
def test_plain_converts_quoted_titles(contents, document):
    assert plain(contents) == document


def test_unknown_dialect_is_refused():
    with pytest.raises(UserError, match="dialect is 'e5'"):
        engine("http://127.0.0.1", "e5")
