"""Tests of web search: filter, providers, recordings and the embedded world's recording."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zerosearch_jax.data.embedded.phrasing import ATTRIBUTES
from zerosearch_jax.data.embedded.recorded_web import world_recording
from zerosearch_jax.data.embedded.world import corpus, load_entities
from zerosearch_jax.data.recordings import load_recording
from zerosearch_jax.errors import UserError
from zerosearch_jax.search.engine import SearchRequest, SearchResult
from zerosearch_jax.search.http_client import JsonClient
from zerosearch_jax.search.web import RecordedWeb, WebEngine, filter_results, record_of
from zerosearch_jax.text.matching import mentions

BLOCKED = ("huggingface.co",)


def result(title="T", snippet="S", link="https://a.example/1"):
    return {"title": title, "snippet": snippet, "link": link}


def request(query, episode=0):
    return SearchRequest(episode, 1, query, "question", ("answer",))


def kept(results, blocked=BLOCKED, topk=99):
    return filter_results(results, blocked_domains=blocked, topk=topk)


# ---- the filter ----------------------------------------------------------------------------


def test_filter_drops_incomplete_and_repeated_results():
    good = [result(f"t{i}", f"s{i}", f"https://a.example/{i}") for i in range(3)]
    bad = [
        {"title": "t", "link": "https://b.example/1"},
        {"snippet": "s", "link": "https://b.example/2"},
        result(" ", "s", "https://b.example/3"),
        result("t", "\n", "https://b.example/4"),
        result("t", None, "https://b.example/5"),
        {"title": "t", "snippet": "no link"},
        result("t", "no host", "/search?q=x"),
        result("t", "bad host", "https://[::1"),
        result("t", "bad host with a part", "https://[bad#x"),
        result("t", "character that no host has", "https://a\u2100b.example/#x"),
        result("t", "endless link", f"https://a.example/{'x' * 10_000}"),
        result("other", "other", "https://a.example/0"),
        result("other", "other", "https://a.example/0#part"),
        result("other", "s0 ", "https://mirror.example/0"),
    ]
    assert kept([good[0], *bad, *good[1:]]) == good
    assert kept([good[0], *bad, *good[1:]], topk=2) == good[:2]


@pytest.mark.parametrize(
    ("link", "accepted"),
    [
        ("https://huggingface.co/datasets/x", False),
        ("http://HuggingFace.co:443/", False),
        ("https://datasets.huggingface.co/x", False),
        ("https://huggingface.co./x", False),
        ("https://user@huggingface.co/x", False),
        ("https://nothuggingface.co/", True),
        ("https://huggingface.co.example/", True),
        ("https://a.example/huggingface.co", True),
        ("https://co/", True),
    ],
)
@pytest.mark.parametrize("blocked", ["huggingface.co", "HuggingFace.co", ".huggingface.co"])
def test_blocked_domains_include_their_subdomains(link, accepted, blocked):
    one = result(link=link)
    assert kept([one], (blocked,)) == [one] * accepted


_organic = st.lists(
    st.fixed_dictionaries(
        {},
        optional={
            "title": st.sampled_from(["", "a", "b"]),
            "snippet": st.sampled_from(["", "x", "y", "z", " x "]),
            "link": st.builds(
                "{}{}{}".format,
                st.sampled_from(["https://", "http://www.", ""]),
                st.sampled_from(["huggingface.co", "a.example", "b.example", ""]),
                st.sampled_from(["", "/1", "/1#2"]),
            ),
        },
    ),
    max_size=12,
)


@settings(deadline=None, max_examples=60)
@given(_organic, st.integers(1, 5))
def test_filter_keeps_the_first_acceptable_results_in_order(organic, topk):
    everything = kept(organic)
    assert kept(organic, topk=topk) == everything[:topk]
    assert kept(everything) == everything
    remaining = iter(organic)
    assert all(any(one is other for other in remaining) for one in everything)
    assert all(r["title"] and r["snippet"].strip() and "huggingface" not in r["link"]
               for r in everything)  # fmt: skip
    assert len({r["snippet"].strip() for r in everything}) == len(everything)
    assert len({r["link"].partition("#")[0] for r in everything}) == len(everything)


# ---- live search ---------------------------------------------------------------------------


def web(url, provider, topk=2, api_key="k3y"):
    client = JsonClient(url, timeout_secs=10, attempts=1, backoff_secs=0)
    return WebEngine(
        client,
        provider=provider,
        api_key=api_key,
        topk=topk,
        blocked_domains=BLOCKED,
        workers=4,
    )


def page(query):
    return [
        result("leak", "answer", "https://huggingface.co/x"),
        *(result(f"t{i}", f"{query} {i}", f"https://a.example/{i}") for i in range(4)),
    ]


DOCUMENTS = [
    SearchResult((5, 1), ("t0: iron 0", "t1: iron 1")),
    SearchResult((3, 1), ("t0: chad & co 0", "t1: chad & co 1")),
]
REQUESTS = [request("iron", 5), request("chad & co", 3)]


def test_serper_request_and_documents(serve):
    url, calls = serve(lambda call: (200, {"organic": page(call.payload["q"]), "credits": 1}))
    assert web(url, "serper").search(REQUESTS) == DOCUMENTS
    assert {(c.method, c.path, c.headers["x-api-key"]) for c in calls} == {
        ("POST", "/search", "k3y")
    }
    payloads = sorted((c.payload for c in calls), key=lambda p: p["q"])
    assert payloads == [{"q": "chad & co", "num": 10}, {"q": "iron", "num": 10}]


def test_serpapi_request_and_documents(serve):
    url, calls = serve(lambda call: (200, {"organic_results": page(call.params["q"])}))
    assert web(url, "serpapi", topk=2).search(REQUESTS) == DOCUMENTS
    assert {(c.method, c.path) for c in calls} == {("GET", "/search")}
    assert sorted((c.params for c in calls), key=lambda p: p["q"])[1] == {
        "engine": "google", "q": "iron", "num": "10", "api_key": "k3y",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("provider", "body", "failure"),
    [
        ("serper", {"organic": []}, ""),
        ("serper", {"searchParameters": {"q": "q"}, "credits": 1}, ""),
        ("serper", {"searchParameters": {"q": "q"}, "organic": None}, "organic"),
        ("serper", {"searchParameters": None, "message": "?"}, "organic"),
        ("serper", {"message": "?"}, "organic"),
        ("serper", {"organic": [["a"]]}, "organic"),
        ("serper", None, "organic"),
        ("serper", {"organic": ["a"]}, "organic"),
        ("serper", [], "organic"),
        ("serpapi", {"search_metadata": {"status": "Success"}, "error": "no results"}, ""),
        ("serpapi", {"search_metadata": {"status": "Error"}, "error": "?"}, "organic_results"),
        ("serpapi", {"error": "Invalid API key k3y"}, "organic_results"),
        ("serpapi", {"organic_results": None}, "organic_results"),
    ],
)
def test_empty_result_is_a_success_and_a_wrong_shape_a_failure(serve, provider, body, failure):
    url, _ = serve(lambda call: (200, body))
    (found,) = web(url, provider).search([request("q")])
    assert found.documents == () and found.key == (0, 1)
    assert bool(found.failure) == bool(failure) and failure in found.failure
    assert found.failure_kind == ("wrong_shape" if failure else "")
    assert "k3y" not in found.failure


@pytest.mark.parametrize("provider", ["serper", "serpapi"])
def test_results_of_wrong_types_are_dropped(serve, provider):
    good = result("t\ud800", "s\udfff", "https://a.example/")
    wrong = [good | {key: value} for key in good for value in (None, 7, True, ["x"], {"a": "b"})]
    body = {"organic": [{}, *wrong, good], "organic_results": [{}, *wrong, good]}
    (found,) = web(serve(lambda call: (200, body))[0], provider).search([request("q")])
    assert found == SearchResult((0, 1), ("t\ufffd: s\ufffd",))


def test_refused_key_fails_each_search(serve):
    url, _ = serve(lambda call: (403, {"message": "Unauthorized."}))
    assert [r.failure for r in web(url, "serper").search(REQUESTS)] == [
        "POST /search: HTTP 403"
    ] * 2


def test_bad_key_and_provider_are_refused():
    for key in ("", " k", "k\n"):
        with pytest.raises(UserError, match="API key for serper") as error:
            web("http://127.0.0.1", "serper", api_key=key)
        assert not key.strip() or f"{key!r}" not in str(error.value)
    with pytest.raises(UserError, match="provider is 'bing'"):
        web("http://127.0.0.1", "bing")


# ---- recordings ----------------------------------------------------------------------------

ROWS = [
    record_of(
        "fox",
        [
            result("leak", "red fox blue whale", "https://huggingface.co/x"),
            result("Fox", "the red fox", "https://a.example/fox"),
            {"title": "no snippet", "link": "https://a.example/none"},
            result("Den", "where it sleeps", "https://a.example/den"),
        ],
    ),
    record_of("whale", [result("Whale", "the blue whale", "https://a.example/whale")]),
    record_of("nothing", []),
]


def recorded(rows=ROWS, topk=3):
    return RecordedWeb(rows, topk=topk, blocked_domains=BLOCKED)


def test_recorded_query_gets_its_own_results():
    results = recorded().search([request("whale", 9), request("fox", 2), request("nothing", 4)])
    assert results == [
        SearchResult((9, 1), ("Whale: the blue whale",)),
        SearchResult((2, 1), ("Fox: the red fox", "Den: where it sleeps")),
        SearchResult((4, 1), ()),
    ]
    assert recorded(topk=1).search([request("fox")])[0].documents == ("Fox: the red fox",)


def test_other_queries_are_answered_by_bm25_over_all_filtered_results():
    whale, den, none = recorded().search([request(q) for q in ("Blue whale", "sleeps", "zzz")])
    assert whale.documents == ("Whale: the blue whale",)
    assert den.documents == ("Den: where it sleeps",)
    assert none.documents == () and none.failure == ""


def test_latest_recording_of_a_query_counts():
    rows = [*ROWS, record_of("fox", [result("New", "fox now", "https://a.example/new")])]
    assert recorded(rows).search([request("fox")])[0].documents == ("New: fox now",)


def test_recording_without_results_is_refused():
    with pytest.raises(UserError, match="recorded_web: no result"):
        recorded([ROWS[2]])


def test_recorded_live_search_gives_the_same_documents(serve, tmp_path):
    url, _ = serve(lambda call: (200, {"organic": page(call.payload["q"])}))
    live = web(url, "serper")
    path = tmp_path / "web.jsonl"
    rows = [record_of(r.query, live.organic(r.query)) for r in REQUESTS]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert load_recording(path) == rows
    assert recorded(load_recording(path), topk=2).search(REQUESTS) == DOCUMENTS


def test_unused_keys_are_ignored_and_a_reply_may_have_no_results(tmp_path):
    path = tmp_path / "web.jsonl"
    full = {
        "searchParameters": {"q": "fox", "gl": "us"},
        "organic": [{**result(), "position": 1, "sitelinks": []}],
        "credits": 1,
    }
    nothing = {"searchParameters": {"q": "elk"}}
    path.write_text(json.dumps(full) + "\n\n" + json.dumps(nothing) + "\n")
    assert load_recording(path) == [record_of("fox", [result()]), record_of("elk", [])]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "not JSON"),
        ("[]", "searchParameters.q"),
        ('{"searchParameters": "fox", "organic": []}', "searchParameters.q"),
        ('{"searchParameters": {"q": 7}, "organic": []}', "searchParameters.q"),
        ('{"searchParameters": {"q": "fox"}, "organic": null}', "organic is not"),
        ('{"searchParameters": {"q": "fox"}, "organic": ["a"]}', "organic is not"),
        (
            '{"searchParameters": {"q": "fox"}, "organic": [{}, {"snippet": 3}]}',
            r"organic\[1\].snippet is not text",
        ),
    ],
)
def test_bad_row_is_named(tmp_path, row, message):
    path = tmp_path / "web.jsonl"
    path.write_text(json.dumps(ROWS[0]) + "\n\n" + row + "\n")
    with pytest.raises(UserError, match=rf"web.jsonl: row 3: .*{message}"):
        load_recording(path)


def test_missing_empty_or_binary_file_is_named(tmp_path):
    with pytest.raises(UserError, match="none.jsonl: no such file"):
        load_recording(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(UserError, match="empty.jsonl: the file has no rows"):
        load_recording(tmp_path / "empty.jsonl")
    (tmp_path / "latin.jsonl").write_bytes(b"\xe9")
    with pytest.raises(UserError, match="latin.jsonl: row 1: not UTF-8"):
        load_recording(tmp_path / "latin.jsonl")


# ---- the embedded world --------------------------------------------------------------------


@pytest.fixture(scope="module")
def entities():
    return load_entities()[::4]


@pytest.fixture(scope="module")
def passages(entities):
    return corpus(entities)


@settings(deadline=None, max_examples=5)
@given(seed=st.integers(0, 2**31))
def test_filtered_world_recording_equals_the_passages(entities, passages, seed):
    rows = world_recording(passages, seed)
    assert rows == world_recording(passages, seed)
    assert [row["searchParameters"]["q"] for row in rows] == [e.name for e in entities]
    texts = [r["snippet"] for row in rows for r in kept(row["organic"])]
    assert sorted(texts) == sorted(p.text for p in passages)


def test_world_recording_has_the_flaws_of_real_pages(entities, passages):
    rows = world_recording(passages, 0)
    assert rows != world_recording(passages, 1)
    results = [r for row in rows for r in row["organic"]]
    snippets = [r["snippet"] for r in results if "snippet" in r]
    assert len(snippets) < len(results)  # some have none
    assert len(set(snippets)) < len(snippets)  # some are repeated
    leaks = {r["title"].partition(":")[0]: r for r in results if "huggingface.co" in r["link"]}
    assert 0 < len(leaks) < len(entities)
    for entity in entities:
        if entity.name in leaks:
            facts = [entity.facts[a] for a in ATTRIBUTES[entity.kind] if a in entity.facts]
            assert all(mentions(leaks[entity.name]["snippet"], value) for value in facts)
    # Overviews without facts come first, so a bare name is a poor query here, too.
    overviews = {p.text for p in passages if not p.attributes}
    assert all(kept(row["organic"])[0]["snippet"] in overviews for row in rows)


def test_world_recording_can_be_searched(entities, passages):
    engine = recorded(world_recording(passages, 0))
    chad = next(e for e in entities if "capital" in e.facts)
    by_name, by_attribute = engine.search([request(chad.name), request(f"capital of {chad.name}")])
    assert len(by_name.documents) == len(by_attribute.documents) == 3
    assert all(d.startswith(f"{chad.name}: ") for d in by_name.documents)
    assert mentions(by_attribute.documents[0], chad.facts["capital"])
    texts = {p.text for p in passages}
    assert all(d.partition(": ")[2] in texts for d in by_attribute.documents)
