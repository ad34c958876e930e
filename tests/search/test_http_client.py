"""Tests of the JSON client against real servers that fail, stall, drip and recover."""

import asyncio
import gzip
import logging
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
import tracemalloc
import zlib
from concurrent.futures import wait
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from functools import cache, partial
from types import SimpleNamespace

import pytest

from zerosearch_jax.errors import Terminated, UserError
from zerosearch_jax.parallel.stop_request import StopRequest
from zerosearch_jax.search import http_client
from zerosearch_jax.search.chat import ChatClient
from zerosearch_jax.search.engine import SearchRequest, SearchResult
from zerosearch_jax.search.http_client import (
    JsonClient,
    SearchFailed,
    TooLong,
    answer_all,
    retry_after_secs,
)
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


@contextmanager
def traced_memory():
    """Yields an object whose `peak` is, after the block, its peak of Python's memory in bytes."""
    memory = SimpleNamespace(peak=None)
    tracemalloc.start()
    try:
        yield memory
    finally:
        memory.peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()


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


def test_a_second_reply_does_not_answer_the_next_request(raw_server):
    """Otherwise a query would get the documents of another one."""

    def send_two(connection, stop):
        replies = (f"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n{n}" for n in (1, 2))
        connection.sendall("".join(replies).encode())
        connection.settimeout(1.0)
        connection.recv(65_536)  # until the client closes the connection or uses it again

    client = make_client(raw_server(send_two), attempts=1)
    assert [client.get("/x", {}) for _ in range(3)] == [1, 1, 1]


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503])
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


def test_waits_have_a_limit_and_a_budget(serve):
    """Without a limit, the last of 100 doubled waits would take 10²⁸ seconds."""
    url, _ = serve(lambda call: (503, {}))
    client = make_client(url, attempts=5, backoff_secs=25.0)
    with pytest.raises(SearchFailed):
        client.post("/x", {})
    assert client.waits == [25.0, 50.0, 60.0, 60.0]
    assert client.budget_secs == 5 * client.timeout_secs + sum(client.waits)
    assert make_client(url, attempts=100, backoff_secs=600.0).budget_secs < 10_000


def in_secs(secs):
    return format_datetime(datetime.now(UTC) + timedelta(seconds=secs), usegmt=True)


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        *((text, 0) for text in ("0", "-5", "+5", "1e9", "nan", "inf", "0.5", "soon", "", "٣")),
        *((text, 0) for text in ("Mon, 99 Foo 2026 99:99:99 GMT", "9" * 5000)),
        ("7", 7),
        ("999999999999", 999999999999),
        (-100, 0),
        (1000, 1000),
        (10**9, 10**9),
    ],
)
def test_retry_after_is_a_number_of_seconds_or_a_date(header, expected):
    header = in_secs(header) if isinstance(header, int) else header
    assert retry_after_secs(header) == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize(
    ("header", "waits"), [("12", [12.0]), ("0", [0.5]), ("1000", []), (1000, [])]
)
@pytest.mark.parametrize("status", [429, 503])
def test_retry_after_is_respected_within_the_budget(raw_server, status, header, waits):
    """The budget is 20.5 s. The server would refuse an earlier try."""

    def respond(connection, stop):
        after = in_secs(header) if isinstance(header, int) else header
        head = f"HTTP/1.1 {status} No\r\nRetry-After: {after}\r\nContent-Length: 0\r\n\r\n"
        connection.sendall(head.encode())

    client = make_client(raw_server(respond), attempts=2)
    with pytest.raises(SearchFailed, match=f"HTTP {status} in {len(waits) + 1} tries"):
        client.post("/x", {})
    assert client.waits == waits


@pytest.mark.parametrize(
    ("status", "body", "kind"),
    [
        (302, b"", "http_3xx"),
        (404, b"", "http_4xx"),
        (429, b"", "http_429"),
        (500, b"", "http_5xx"),
        (600, b"", "other"),
        (413, b"", "too_long"),
        (200, b"", "not_json"),
        (200, b"\xff", "not_json"),
        (200, b"[" * 100_000, "not_json"),
        (200, b"1" * 5000, "not_json"),
        (200, b" " * 200_000, "too_large"),
    ],
)
def test_failures_have_a_kind_and_the_address_asked(serve, status, body, kind):
    url, _ = serve(lambda call: (status, body))
    client = make_client(f"{url}/a/v1/", attempts=1, max_reply_bytes=150_000)
    with pytest.raises(SearchFailed) as raised:
        client.post("/v1/x", {})
    assert raised.value.kind == kind
    assert raised.value.address == f"{url}/a/v1/x" and url not in str(raised.value)


def test_a_reply_of_many_values_is_refused_before_it_is_parsed(serve):
    """Parsed values take 20 times the bytes of their JSON."""
    url, _ = serve(lambda call: (200, b"[" + b"[]," * 2**20 + b"1]"))
    with traced_memory() as memory, pytest.raises(SearchFailed) as raised:
        make_client(url).post("/x", {})
    assert raised.value.kind == "too_large" and memory.peak < 20 * 10**6


def test_a_connection_that_the_server_closed_is_replaced(raw_server):
    """A server closes its connections when it restarts between two requests."""

    def respond(connection, stop):
        connection.sendall(OK + b"Content-Length: 2\r\n\r\n[]")

    client = make_client(raw_server(respond), attempts=2)
    assert [client.post("/x", {}) for _ in range(5)] == [[]] * 5


def test_cookies_are_not_kept(raw_server):
    def respond(connection, stop):
        connection.sendall(OK + b"Content-Length: 2\r\nSet-Cookie: a=b\r\n\r\n[]")

    client = make_client(raw_server(respond))
    client.post("/x", {})
    assert list(client._http.cookies.jar) == []


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


OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"
# The start of a reply, and the bytes that the server then repeats without end.
ENDLESS = {
    "status line": (b"HTTP/1.1 200 ", b"x"),
    "one header": (OK + b"X-Long: ", b"x"),
    "many headers": (OK, b"X: y\r\n"),
    "interim replies": (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "chunk size": (CHUNKED, b"0"),
    "chunk extension": (CHUNKED + b"1;", b"x"),
    "trailers": (CHUNKED + b"1\r\n1\r\n0\r\n", b"X: y\r\n"),
    "body with a length": (OK + b"Content-Length: 1000000000\r\n\r\n", b" "),
    "body without a length": (OK + b"\r\n", b" "),
}


@pytest.mark.parametrize(("start", "drop"), ENDLESS.values(), ids=ENDLESS)
def test_deadline_covers_a_reply_that_drips(raw_server, start, drop):
    def drip(connection, stop):
        connection.sendall(start)
        while not stop.wait(0.02):
            connection.sendall(drop)

    began = time.monotonic()
    with pytest.raises(SearchFailed, match="^POST /x: Timeout in 1 tries$") as raised:
        make_client(raw_server(drip), timeout_secs=0.2, attempts=1).post("/x", {})
    assert raised.value.kind == "timeout" and time.monotonic() - began < 5


@pytest.mark.parametrize(("start", "drop"), ENDLESS.values(), ids=ENDLESS)
def test_a_reply_that_never_ends_takes_little_memory(raw_server, start, drop):
    """Every endless part has a limit of bytes or ends at the deadline."""

    def flood(connection, stop):
        connection.sendall(start)
        while not stop.is_set():
            connection.sendall(flow)

    flow = drop * (65_536 // len(drop))
    client = make_client(raw_server(flood), timeout_secs=0.2, attempts=1, max_reply_bytes=10**6)
    with traced_memory() as memory, pytest.raises(SearchFailed) as raised:
        client.post("/x", {})
    assert raised.value.kind in ("timeout", "connection", "too_large")
    assert memory.peak < 8 * 10**6


@pytest.mark.parametrize("where", ["connect", "TLS", "send", "look-up"])
def test_deadline_covers_all_before_the_reply(raw_server, monkeypatch, where):
    payload, filling = {}, []
    url = raw_server(hang)
    if where == "connect":  # a full queue of connections: further ones get no answer
        listener = socket.create_server(("127.0.0.1", 0), backlog=0)
        filling = [listener, *(socket.socket() for _ in range(3))]
        for connection in filling[1:]:
            connection.setblocking(False)
            connection.connect_ex(listener.getsockname())
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    elif where == "TLS":
        url = url.replace("http:", "https:")
    elif where == "send":  # more than the buffers of both sockets hold
        payload = {"q": "x" * 20_000_000}
    else:
        released = threading.Event()
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_: released.wait(10))
        url = "http://search.invalid"
    with pytest.raises(SearchFailed) as raised:
        make_client(url, timeout_secs=0.5, attempts=1).post("/x", payload)
    assert raised.value.kind == "timeout"
    for connection in filling:
        connection.close()
    if where == "look-up":
        released.set()


def test_exit_does_not_wait_for_a_look_up():
    script = """
import socket, time
from zerosearch_jax.search.http_client import JsonClient, SearchFailed
socket.getaddrinfo = lambda *_: time.sleep(100)
client = JsonClient("http://search.invalid", timeout_secs=0.1, attempts=1, backoff_secs=0)
try:
    client.post("/x", {})
except SearchFailed as failure:
    print(failure.kind)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "timeout\n" and done.stderr == ""


def test_a_blocked_event_loop_does_not_block_the_caller(serve, monkeypatch):
    monkeypatch.setattr(http_client, "_GRACE_SECS", 0.1)
    client = make_client(serve(lambda call: (200, {}))[0], attempts=1)
    client.post("/x", {})
    client.timeout_secs, released = 0.2, threading.Event()
    http_client._event_loop().call_soon_threadsafe(released.wait, 20)
    with pytest.raises(SearchFailed) as raised:
        client.post("/x", {})
    assert raised.value.kind == "timeout" and not released.is_set()
    released.set()


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


def encoded(encoding, body):
    head = f"Content-Encoding: {encoding}\r\nContent-Length: {len(body)}\r\n\r\n"
    return OK + head.encode() + body


@pytest.mark.parametrize(
    "body",
    [b"[]", gzip.compress(b"[]")[:-4], gzip.compress(b"[]") * 2, b""],
    ids=["no gzip", "cut", "two members", "empty"],
)
def test_damaged_compression_is_retried(raw_server, body):
    def respond(connection, stop):
        connection.sendall(encoded("gzip", body))

    with pytest.raises(SearchFailed, match="damaged in 3 tries$") as raised:
        make_client(raw_server(respond)).post("/x", {})
    assert raised.value.kind == "not_json"


@cache
def bomb(layers):
    compressed = zlib.compressobj(9, wbits=zlib.MAX_WBITS | 16)
    body = b"".join(compressed.compress(b" " * 10**6) for _ in range(30)) + compressed.flush()
    for _ in range(layers - 1):
        body = gzip.compress(body)
    return body


@pytest.mark.parametrize(
    ("encoding", "layers", "kind"),
    [
        ("gzip", 1, "too_large"),
        ("gzip, gzip, gzip", 3, "not_json"),
        ("deflate", 1, "not_json"),
        ("br", 1, "not_json"),
        ("zstd", 1, "not_json"),
    ],
)
def test_decompression_stops_at_the_byte_limit(raw_server, encoding, layers, kind):
    """30 MB of spaces in 30 KB or less; only gzip is requested, and only once."""
    reply, tries = encoded(encoding, bomb(layers)), []

    def respond(connection, stop):
        tries.append(1)
        connection.sendall(reply)

    client = make_client(raw_server(respond), max_reply_bytes=10**6)
    with traced_memory() as memory, pytest.raises(SearchFailed) as raised:
        client.post("/x", {})
    assert raised.value.kind == kind and len(tries) == 1
    assert memory.peak < 5 * 10**6


def test_an_error_status_is_reported_whatever_its_body(raw_server):
    def respond(connection, stop):
        body = encoded("gzip", b"damaged").replace(b"200 OK", b"404 Not Found")
        connection.sendall(body)

    with pytest.raises(SearchFailed, match="^POST /x: HTTP 404$"):
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


def test_a_try_that_begins_after_close_is_cancelled(monkeypatch):
    client, schedule = make_client("http://127.0.0.1:9"), asyncio.run_coroutine_threadsafe

    def close_first(coroutine, loop):
        monkeypatch.undo()
        client.close()
        future = schedule(coroutine, loop)
        wait([future])
        return future

    monkeypatch.setattr(asyncio, "run_coroutine_threadsafe", close_first)
    with pytest.raises(SearchFailed, match="cancelled"):
        client.post("/x", {})


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


def test_sigterm_does_not_wait_for_requests(raw_server):
    client, stop = make_client(raw_server(hang), timeout_secs=60, sleep=None), StopRequest()
    timer = threading.Timer(
        0.2, signal.pthread_kill, (threading.main_thread().ident, signal.SIGTERM)
    )
    timer.start()
    began = time.monotonic()
    with stop, pytest.raises(Terminated), stop.interruptible():
        answer_all([request(0)], lambda _: client.post("/x", {}), workers=2)
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
