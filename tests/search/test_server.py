"""Tests of the addresses and API keys of servers."""

import pytest

from zerosearch_jax.errors import UserError
from zerosearch_jax.search.server import authorization, check_address, endpoint, read_key
from zerosearch_jax.training.inputs import check_search
from zerosearch_jax.training.probe import probe
from zerosearch_jax.training.sections import RemoteConfig, SearchConfig

CHAT = "/v1/chat/completions"


@pytest.mark.parametrize(
    ("address", "path", "asked"),
    [
        *(
            (f"http://h:80{end}{slash}", CHAT, f"http://h:80{CHAT}")
            for end in ("", "/v1", "/v1/chat", CHAT)
            for slash in ("", "/")
        ),
        *(
            (f"https://h/a/b{end}", "/retrieve", "https://h/a/b/retrieve")
            for end in ("", "/", "/retrieve", "/retrieve/")
        ),
        ("http://h/openai/v1/", CHAT, f"http://h/openai{CHAT}"),
        ("http://v1", CHAT, f"http://v1{CHAT}"),
        ("http://retrieve", "/retrieve", "http://retrieve/retrieve"),
        ("http://h/nov1", CHAT, f"http://h/nov1{CHAT}"),
        ("http://h/v1/retrieve/x", "/retrieve", "http://h/v1/retrieve/x/retrieve"),
        ("http://[::1]:8000/v1", CHAT, f"http://[::1]:8000{CHAT}"),
    ],
)
def test_an_address_may_end_in_the_start_of_the_path(address, path, asked):
    assert endpoint(check_address("url", address), path) == asked


@pytest.mark.parametrize(
    ("address", "named"),
    [
        ("localhost:8000", "must begin with http"),
        ("ftp://h", "must begin with http"),
        ("", "must begin with http"),
        ("http://", "not an address"),
        ("http://:80", "not an address"),
        ("http:///v1", "not an address"),
        ("http://h:x", "not an address"),
        ("http://h:0", "not an address"),
        ("http://h:99999", "not an address"),
        ("http://[bad", "not an address"),
        ("http://a%20b", "not an address"),
        ("http://\ud800", "not an address"),
        ("http://h/a?key=s3cr3t", "from '?' on"),
        ("http://h/a#b", "from '#' on"),
        ("http://h/a b", "from ' ' on"),
        ("http://h\n", "remove"),
        *(
            (f"{scheme}://{user}@h/v1", "user name or password")
            for scheme in ("http", "https", "ftp")
            for user in ("user:s3cr3t", "s3cr3t", ":s3cr3t", "user:s3cr3t/x", "user:s3cr3t@y")
        ),
    ],
)
def test_other_addresses_are_refused_and_show_no_password(address, named):
    with pytest.raises(UserError, match="^config.url") as error:
        check_address("config.url", address)
    assert named in str(error.value) and "s3cr3t" not in str(error.value)


@pytest.mark.parametrize(
    "value",
    ["s3cr3t\n", " s3cr3t", "s3 cr3t", "s3cr3té", "s3cr3t\u200b", "s3cr3t\x00", "\udce9s3cr3t"],
)
def test_a_variable_without_an_api_key_is_refused_and_not_shown(monkeypatch, value):
    monkeypatch.setattr("os.environ", {"MY_KEY": value, "EMPTY": ""})
    for variable in ("MY_KEY", "EMPTY", "ABSENT"):
        with pytest.raises(UserError, match=f"variable {variable}") as error:
            authorization(variable)
        assert "cr3t" not in str(error.value)


def test_a_key_becomes_a_header_and_an_empty_variable_none(monkeypatch):
    monkeypatch.setenv("MY_KEY", "sk-A_b.c~1+/=")
    assert read_key("MY_KEY") == "sk-A_b.c~1+/="
    assert authorization("MY_KEY") == {"Authorization": "Bearer sk-A_b.c~1+/="}
    assert authorization("") == {}


def retriever(url, key_variable=""):
    remote = RemoteConfig(
        url=url, dialect="search_r1", key_variable=key_variable,
        timeout_secs=10.0, attempts=3, backoff_secs=0.0, workers=2,
    )  # fmt: skip
    return SearchConfig(engine="retriever", topk=1, remote=remote)


def test_a_retriever_gets_the_key_that_its_config_names(serve, monkeypatch):
    url, calls = serve(lambda call: (200, {"result": [[]]}))
    monkeypatch.setenv("MY_KEY", "s3cr3t")
    check_search("search", retriever(url, "MY_KEY"))
    probe(retriever(f"{url}/retrieve/", "MY_KEY"), "search", 0, None)
    probe(retriever(url), "search", 0, None)
    posts = [call for call in calls if call.method == "POST"]
    assert [c.headers.get("authorization") for c in posts] == ["Bearer s3cr3t", None]
    assert [c.path for c in posts] == ["/retrieve"] * 2


def test_a_missing_key_names_the_config_key_and_the_variable(monkeypatch):
    monkeypatch.delenv("MY_KEY", raising=False)
    with pytest.raises(UserError, match="config.search.remote.key_variable: .*MY_KEY"):
        check_search("search", retriever("http://127.0.0.1:9", "MY_KEY"))


def test_a_refused_first_search_names_the_kind_and_the_address_asked(serve):
    url, calls = serve(lambda call: (503, {"error": "s3cr3t"}))
    with pytest.raises(UserError, match="config.engines.x") as error:
        probe(retriever(f"{url}/a"), "engines.x", 0, None)
    assert f"http_5xx 1; asked {url}/a/retrieve" in str(error.value)
    assert "s3cr3t" not in str(error.value) and len(calls) == 1


def test_a_password_in_a_config_is_refused_and_not_shown():
    with pytest.raises(UserError) as error:
        retriever("http://user:s3cr3t@h")
    assert "s3cr3t" not in str(error.value)
