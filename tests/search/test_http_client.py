"""Tests of the JSON client against real servers that fail, stall, drip and recover."""

import gzip
import logging
import signal
import socket
import threading
import time
import traceback
from functools import partial

import pytest

from zerosearch_jax.errors import UserError
from zerosearch_jax.search.chat import ChatClient
from zerosearch_jax.search.engine import SearchRequest, SearchResult
from zerosearch_jax.search.http_client import JsonClient, SearchFailed, TooLong, answer_all
from zerosearch_jax.search.retriever import RetrieverEngine
from zerosearch_jax.search.simulated import SimulatedEngine
from zerosearch_jax.search.web import WebEngine


def make_client(url, *, timeout_secs=10.0, attempts=3, backoff_secs=0.5, **rest):
    """Returns a client that records its waits in `.waits` instead of waiting."""
    waits = []
    settings = {"sleep": waits.append, **rest}
    client = JsonClient(
        url, timeout_secs=timeout_secs, attempts=attempts, backoff_secs=backoff_secs, **settings
    )
    client.waits = waits
    return client


@pytest.fixture
def raw_server():
    """`raw_server(respond) -> url`: a bare socket server.

    It reads each connection's request and calls `respond(connection, stop)`, one connection at a
    time.
    """
    stop, threads, sockets = threading.Event(), [], []

    def start(respond):
        listener = socket.create_server(("127.0.0.1", 0))
        listener.settimeout(0.02)
        sockets.append(listener)

        def run():
            while not stop.is_set():
                try:
                    connection, _ = listener.accept()
                except TimeoutError:
                    continue
                with connection:
                    connection.recv(65_536)
                    try:
                        respond(connection, stop)
                    except OSError:  # the client has disconnected
                        continue

        threads.append(threading.Thread(target=run))
        threads[-1].start()
        return f"http://127.0.0.1:{listener.getsockname()[1]}"

    yield start
    stop.set()
    for thread in threads:
        thread.join()
    for listener in sockets:
        listener.close()


def hang(connection, stop):
    """Sends no reply."""
    stop.wait(30)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def test_post_and_get_send_payload_params_and_headers(serve):
    url, calls = serve(lambda call: (200, {"found": [1, "é"]}))
    client = make_client(url + "/", headers={"Authorization": "Bearer k"})
    assert client.post("/a", {"q": "ü"}, {"X-Extra": "1"}) == {"found": [1, "é"]}
    assert client.get("/b", {"q": "a b&c", "n": 3}) == {"found": [1, "é"]}
    assert [(c.method, c.path, c.params, c.payload) for c in calls] == [
        ("POST", "/a", {}, {"q": "ü"}),
        ("GET", "/b", {"q": "a b&c", "n": "3"}, None),
    ]
    assert [c.headers["authorization"] for c in calls] == ["Bearer k"] * 2
    assert [c.headers.get("x-extra") for c in calls] == ["1", None]
    assert calls[0].headers["content-type"] == "application/json"
    assert client.waits == []


def test_requests_share_one_connection(serve):
    url, calls = serve(lambda call: (200, {}))
    client = make_client(url)
    for _ in range(3):
        client.post("/x", {})
    assert len({call.peer for call in calls}) == 1


@pytest.mark.parametrize("status", [429, 500, 502, 503])
def test_transient_errors_are_retried(serve, status):
    statuses = iter([status, status, 200])
    url, calls = serve(lambda call: (next(statuses), {"ok": 1}))
    client = make_client(url)
    assert client.post("/x", {}) == {"ok": 1}
    assert len(calls) == 3
    assert client.waits == [0.5, 1.0]


def test_tries_are_bounded_and_backoff_doubles(serve):
    url, calls = serve(lambda call: (503, {}))
    client = make_client(url, attempts=4, backoff_secs=0.25)
    with pytest.raises(SearchFailed, match=r"^POST /x: HTTP 503 in 4 tries$"):
        client.post("/x", {})
    assert len(calls) == 4
    assert client.waits == [0.25, 0.5, 1.0]


@pytest.mark.parametrize("status", [301, 307, 400, 401, 403, 404])
def test_permanent_errors_are_not_retried_and_redirects_not_followed(serve, status):
    url, calls = serve(lambda call: (status, {}))
    client = make_client(url)
    with pytest.raises(SearchFailed, match=f"^POST /x: HTTP {status}$"):
        client.post("/x", {})
    assert [call.path for call in calls] == ["/x"] and client.waits == []


@pytest.mark.parametrize(
    ("status", "message", "too_long"),
    [
        (413, "", True),
        (414, "", True),
        (400, "This model's maximum context length is 4096 tokens. However, you requested", True),
        (400, "The input (5000 tokens) is longer than the model's context length", True),
        (422, "`inputs` tokens + `max_new_tokens` must be <= 4096", True),
        (400, "top_p must be in (0, 1]", False),
        (404, "The model `context length` does not exist", False),
        (500, "context length", False),
    ],
)
def test_a_request_that_is_too_long_is_told_from_other_failures(serve, status, message, too_long):
    url, _ = serve(lambda call: (status, {"error": {"message": message}}))
    with pytest.raises(SearchFailed, match=f"HTTP {status}") as raised:
        make_client(url, attempts=1).post("/x", {})
    assert isinstance(raised.value, TooLong) is too_long


def test_reply_that_is_not_json_fails_at_once(serve):
    url, calls = serve(lambda call: (200, b"<html>"))
    with pytest.raises(SearchFailed, match="GET /x: the reply is not JSON"):
        make_client(url).get("/x", {})
    assert len(calls) == 1


def test_refused_connection_is_retried():
    client = make_client(f"http://127.0.0.1:{free_port()}")
    with pytest.raises(SearchFailed, match="^POST /x: ConnectError in 3 tries$"):
        client.post("/x", {})
    assert len(client.waits) == 2


def test_no_reply_tells_a_silent_server_from_one_that_replies(serve, raw_server):
    for status in (200, 404, 503):
        url, _ = serve(lambda call, status=status: (status, {}))
        assert make_client(url).no_reply() == ""
    assert make_client(f"http://127.0.0.1:{free_port()}").no_reply() == "ConnectError"
    assert make_client(raw_server(hang), timeout_secs=0.05).no_reply() == "Timeout"


def test_silent_server_times_out(raw_server):
    with pytest.raises(SearchFailed, match="^POST /x: Timeout in 2 tries$"):
        make_client(raw_server(hang), timeout_secs=0.05, attempts=2).post("/x", {})


@pytest.mark.parametrize(
    ("start", "drop"),
    [
        (b"HTTP/1.1 200 OK\r\nX-Long: ", b"x"),
        (b"HTTP/1.1 200 OK\r\n", b"X: y\r\n"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n", b" "),
        (b"HTTP/1.1 200 OK\r\n\r\n", b" "),
    ],
    ids=["one header", "many headers", "body with a length", "body without a length"],
)
def test_deadline_covers_a_reply_that_drips(raw_server, start, drop):
    def drip(connection, stop):
        connection.sendall(start)
        while not stop.wait(0.02):
            connection.sendall(drop)

    began = time.monotonic()
    with pytest.raises(SearchFailed, match="^POST /x: Timeout in 2 tries$"):
        make_client(raw_server(drip), timeout_secs=0.2, attempts=2).post("/x", {})
    assert 0.4 <= time.monotonic() - began < 5


def test_truncated_body_is_retried(raw_server):
    bodies = iter([b"[1, 2", b"[1, 2]"])

    def respond(connection, stop):
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\n" + next(bodies))

    client = make_client(raw_server(respond))
    assert client.post("/x", {}) == [1, 2]
    assert len(client.waits) == 1


def test_chunked_body_is_read(raw_server):
    def respond(connection, stop):
        head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
        connection.sendall(head + b"3\r\n[1,\r\n3\r\n 2]\r\n0\r\n\r\n")

    assert make_client(raw_server(respond)).post("/x", {}) == [1, 2]


@pytest.mark.parametrize("encoding", ["identity", "gzip"])
def test_reply_over_the_byte_limit_fails_at_once(raw_server, encoding):
    tries = []

    def respond(connection, stop):
        tries.append(1)
        body = b" " * 1000 + b"[]"
        body = gzip.compress(body) if encoding == "gzip" else body
        head = f"Content-Encoding: {encoding}\r\nContent-Length: {len(body)}\r\n"
        connection.sendall(f"HTTP/1.1 200 OK\r\n{head}\r\n".encode() + body)

    url = raw_server(respond)
    assert make_client(url, max_reply_bytes=1002).post("/x", {}) == []
    with pytest.raises(SearchFailed, match="^POST /x: the reply is larger than 1001 bytes$"):
        make_client(url, max_reply_bytes=1001).post("/x", {})
    assert len(tries) == 2


def test_damaged_compression_is_retried(raw_server):
    def respond(connection, stop):
        head = b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 2\r\n\r\n"
        connection.sendall(head + b"[]")

    with pytest.raises(SearchFailed, match="^POST /x: DecodingError in 3 tries$"):
        make_client(raw_server(respond)).post("/x", {})


@pytest.mark.parametrize("waiting_for", ["a reply", "the next try"])
def test_close_ends_waiting_requests(raw_server, waiting_for):
    if waiting_for == "a reply":
        client = make_client(raw_server(hang), timeout_secs=60, sleep=None)
    else:
        client = make_client(f"http://127.0.0.1:{free_port()}", backoff_secs=60, sleep=None)
    timer = threading.Timer(0.2, client.close)
    timer.start()
    began = time.monotonic()
    with pytest.raises(SearchFailed, match="^POST /x: cancelled$"):
        client.post("/x", {})
    assert time.monotonic() - began < 10
    timer.join()
    client.close()  # a second call has no effect
    with pytest.raises(SearchFailed, match="^GET /x: cancelled$"):
        client.get("/x", {})


@pytest.mark.parametrize(
    "through", ["post", "answer_all", "chat", "search_r1", "zerosearch", "web", "simulated"]
)
def test_ctrl_c_does_not_wait_for_requests(raw_server, through):
    """Through every engine that asks a server; retries would take 3 × 60 s."""
    client = make_client(raw_server(hang), timeout_secs=60, sleep=None)
    chat = ChatClient(
        client, model="m", temperature=0.0, top_p=1.0, max_tokens=1, workers=2, seed=0
    )
    requests = [request(0), request(1)]
    run = {
        "post": lambda: client.post("/x", {}),
        "answer_all": lambda: answer_all(requests, lambda _: client.post("/x", {}), workers=2),
        "chat": lambda: chat(["a", "b"], [(0, 0), (1, 0)]),
        "simulated": partial(SimulatedEngine(chat, form="prompted", topk=2).search, requests),
        "web": partial(
            WebEngine(
                client, provider="serper", api_key="k", topk=2, blocked_domains=(), workers=2
            ).search,
            requests,
        ),
        **{
            dialect: partial(
                RetrieverEngine(client, topk=2, dialect=dialect, workers=2).search, requests
            )
            for dialect in ("search_r1", "zerosearch")
        },
    }[through]
    main = threading.main_thread().ident
    timer = threading.Timer(0.3, signal.pthread_kill, (main, signal.SIGINT))
    timer.start()
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run()
    assert time.monotonic() - began < 10
    timer.join()


def test_keys_stay_out_of_reasons_tracebacks_and_logs(serve, caplog):
    secret = "s3cr3t"
    with caplog.at_level(logging.DEBUG):
        url, _ = serve(lambda call: (500, {"error": f"bad key {secret}"}))
        for where in (url, f"http://127.0.0.1:{free_port()}"):
            client = make_client(where, headers={"X-API-KEY": secret})
            with pytest.raises(SearchFailed) as failure:
                client.get("/x", {"api_key": secret})
            assert secret not in "".join(traceback.format_exception(failure.value))
            assert failure.value.__context__ is None
        for bad, kind in (("\n", "LocalProtocolError"), ("é", "UnicodeEncodeError")):
            with pytest.raises(SearchFailed, match=f"^POST /x: {kind}$") as failure:
                make_client(url, headers={"X-API-KEY": f"{secret}{bad}"}).post("/x", {})
            assert secret not in "".join(traceback.format_exception(failure.value))
    assert secret not in caplog.text and secret not in repr(client)
    assert url not in caplog.text


def test_many_threads_share_a_client(serve):
    seen, lock = set(), threading.Lock()

    def reply(call):
        with lock:
            first = call.payload["n"] not in seen
            seen.add(call.payload["n"])
        return (503 if first else 200), {}

    url, calls = serve(reply)
    client = make_client(url)
    threads = [threading.Thread(target=client.post, args=("/x", {"n": n})) for n in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 40 and len(client.waits) == 20


@pytest.mark.parametrize("change", [{"attempts": 0}, {"timeout_secs": 0.0}, {"backoff_secs": -1.0}])
def test_numbers_out_of_range_are_refused(change):
    with pytest.raises(UserError, match=next(iter(change))):
        make_client("http://127.0.0.1", **change)


def test_address_without_http_is_refused():
    with pytest.raises(UserError, match="must begin with http"):
        make_client("localhost:8000")


def test_proxy_of_the_environment_is_used(serve, monkeypatch):
    url, calls = serve(lambda call: (200, {"ok": 1}))
    monkeypatch.setenv("HTTP_PROXY", url)
    assert make_client("http://search.invalid").post("/x", {}) == {"ok": 1}
    assert calls[0].headers["host"] == "search.invalid"


def test_unsupported_proxy_is_refused(monkeypatch):
    monkeypatch.setenv("ALL_PROXY", "ftp://proxy")
    with pytest.raises(UserError, match="ALL_PROXY"):
        make_client("http://search.invalid")


def request(episode):
    return SearchRequest(episode, 1, f"q{episode}", "question", ("answer",))


def test_answer_all_keeps_the_order_and_runs_in_parallel():
    barrier = threading.Barrier(4, timeout=10)  # passed only by four threads at once

    def ask(request):
        barrier.wait()
        if request.episode % 2:
            raise SearchFailed(f"no {request.query}", "timeout", "http://a/x")
        return [request.query, "b"]

    results = answer_all([request(n) for n in (8, 3, 5, 2)], ask, workers=4)
    assert results == [
        SearchResult((8, 1), ("q8", "b")),
        SearchResult((3, 1), (), "no q3", "timeout", "http://a/x"),
        SearchResult((5, 1), (), "no q5", "timeout", "http://a/x"),
        SearchResult((2, 1), ("q2", "b")),
    ]
    assert answer_all([], ask, workers=4) == []


def test_answer_all_raises_other_exceptions():
    def ask(request):
        raise KeyError(request.query)

    with pytest.raises(KeyError, match="q1"):
        answer_all([request(1)], ask, workers=2)
