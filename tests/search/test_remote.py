"""The JSON client against real servers that fail, stall, lie and recover."""

import logging
import socket
import threading
import traceback

import pytest

from zerosearch_jax.errors import UserError
from zerosearch_jax.search.engine import SearchRequest, SearchResult
from zerosearch_jax.search.remote import JsonClient, SearchFailed, answer_all


def client(url, *, timeout_secs=10.0, attempts=3, backoff_secs=0.5, **rest):
    """A client that notes its waits in `.waits` and does not wait."""
    waits = []
    made = JsonClient(
        url,
        timeout_secs=timeout_secs,
        attempts=attempts,
        backoff_secs=backoff_secs,
        sleep=waits.append,
        **rest,
    )
    made.waits = waits
    return made


@pytest.fixture
def raw_server():
    """`raw_server(talk) -> url`: a bare socket server; `talk(connection)` after each request."""
    stop, threads, sockets = threading.Event(), [], []

    def start(talk):
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
                        talk(connection, stop)
                    except OSError:  # the client has gone
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


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def test_post_and_get_carry_everything(serve):
    url, calls = serve(lambda call: (200, {"found": [1, "é"]}))
    asked = client(url + "/", headers={"Authorization": "Bearer k"})
    assert asked.post("/a", {"q": "ü"}, {"X-Extra": "1"}) == {"found": [1, "é"]}
    assert asked.get("/b", {"q": "a b&c", "n": 3}) == {"found": [1, "é"]}
    assert [(c.method, c.path, c.params, c.payload) for c in calls] == [
        ("POST", "/a", {}, {"q": "ü"}),
        ("GET", "/b", {"q": "a b&c", "n": "3"}, None),
    ]
    assert [c.headers["authorization"] for c in calls] == ["Bearer k"] * 2
    assert [c.headers.get("x-extra") for c in calls] == ["1", None]
    assert asked.retries == 0 and asked.waits == []


@pytest.mark.parametrize("status", [429, 500, 502, 503])
def test_passing_trouble_is_tried_again(serve, status):
    statuses = iter([status, status, 200])
    url, calls = serve(lambda call: (next(statuses), {"ok": 1}))
    asked = client(url)
    assert asked.post("/x", {}) == {"ok": 1}
    assert len(calls) == 3 and asked.retries == 2
    assert asked.waits == [0.5, 1.0]


def test_tries_are_bounded_and_back_off_doubles(serve):
    url, calls = serve(lambda call: (503, {}))
    asked = client(url, attempts=4, backoff_secs=0.25)
    with pytest.raises(SearchFailed, match=r"^POST /x: HTTP 503 in 4 tries$"):
        asked.post("/x", {})
    assert len(calls) == 4 and asked.retries == 3
    assert asked.waits == [0.25, 0.5, 1.0]


@pytest.mark.parametrize("status", [301, 307, 400, 401, 403, 404])
def test_what_will_not_pass_is_not_tried_again(serve, status):
    url, calls = serve(lambda call: (status, {}))
    asked = client(url)
    with pytest.raises(SearchFailed, match=f"^POST /x: HTTP {status}$"):
        asked.post("/x", {})
    assert [call.path for call in calls] == ["/x"] and asked.retries == 0 and asked.waits == []


def test_a_reply_that_is_not_json(serve):
    url, calls = serve(lambda call: (200, b"<html>"))
    with pytest.raises(SearchFailed, match="GET /x: the reply is not JSON"):
        client(url).get("/x", {})
    assert len(calls) == 1


def test_nobody_listens():
    asked = client(f"http://127.0.0.1:{free_port()}")
    with pytest.raises(SearchFailed, match="^POST /x: ConnectionError in 3 tries$"):
        asked.post("/x", {})
    assert asked.retries == 2


def test_silence_is_given_up(raw_server):
    url = raw_server(lambda connection, stop: stop.wait(10))
    with pytest.raises(SearchFailed, match="^POST /x: ReadTimeout in 1 tries$"):
        client(url, timeout_secs=0.05, attempts=1).post("/x", {})


@pytest.mark.parametrize("length", ["Content-Length: 100000\r\n", ""])
def test_a_body_that_drips_in_is_given_up(raw_server, length):
    def drip(connection, stop):
        connection.sendall(f"HTTP/1.1 200 OK\r\n{length}\r\n".encode())
        while not stop.wait(0.02):
            connection.sendall(b" ")

    with pytest.raises(SearchFailed, match="^POST /x: Timeout in 1 tries$"):
        client(raw_server(drip), timeout_secs=0.2, attempts=1).post("/x", {})


def test_a_body_that_is_cut_short_is_tried_again(raw_server):
    bodies = iter([b"[1, 2", b"[1, 2]"])

    def talk(connection, stop):
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\n" + next(bodies))

    asked = client(raw_server(talk))
    assert asked.post("/x", {}) == [1, 2]
    assert asked.retries == 1


def test_a_body_in_chunks(raw_server):
    def talk(connection, stop):
        head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
        connection.sendall(head + b"3\r\n[1,\r\n3\r\n 2]\r\n0\r\n\r\n")

    assert client(raw_server(talk)).post("/x", {}) == [1, 2]


def test_keys_stay_out_of_reasons_tracebacks_and_logs(serve, caplog):
    secret = "s3cr3t"
    with caplog.at_level(logging.DEBUG):
        url, _ = serve(lambda call: (500, {"error": f"bad key {secret}"}))
        for where in (url, f"http://127.0.0.1:{free_port()}"):
            asked = client(where, headers={"X-API-KEY": secret})
            with pytest.raises(SearchFailed) as failure:
                asked.get("/x", {"api_key": secret})
            assert secret not in "".join(traceback.format_exception(failure.value))
            assert failure.value.__context__ is None
        with pytest.raises(SearchFailed, match="^POST /x: InvalidHeader$") as failure:
            client(url, headers={"X-API-KEY": f"{secret}\n"}).post("/x", {})
        assert secret not in "".join(traceback.format_exception(failure.value))
    assert secret not in caplog.text and secret not in repr(asked)


def test_retries_are_counted_across_threads(serve):
    seen, lock = set(), threading.Lock()

    def reply(call):
        with lock:
            first = call.payload["n"] not in seen
            seen.add(call.payload["n"])
        return (503 if first else 200), {}

    asked = client(serve(reply)[0])
    threads = [threading.Thread(target=asked.post, args=("/x", {"n": n})) for n in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert asked.retries == 20


@pytest.mark.parametrize("change", [{"attempts": 0}, {"timeout_secs": 0.0}, {"backoff_secs": -1.0}])
def test_bad_numbers(change):
    with pytest.raises(UserError, match=next(iter(change))):
        client("http://127.0.0.1", **change)


def test_bad_address():
    with pytest.raises(UserError, match="must begin with http"):
        client("localhost:8000")


def request(episode):
    return SearchRequest(episode, 1, f"q{episode}", "question", ("answer",))


def test_answer_all_keeps_the_order_and_works_side_by_side():
    together = threading.Barrier(4, timeout=10)  # passed only by four threads at once

    def ask(request):
        together.wait()
        if request.episode % 2:
            raise SearchFailed(f"no {request.query}")
        return [request.query, "b"]

    results = answer_all([request(n) for n in (8, 3, 5, 2)], ask, workers=4)
    assert results == [
        SearchResult((8, 1), ("q8", "b")),
        SearchResult((3, 1), (), "no q3"),
        SearchResult((5, 1), (), "no q5"),
        SearchResult((2, 1), ("q2", "b")),
    ]
    assert answer_all([], ask, workers=4) == []


def test_answer_all_swallows_nothing_else():
    def ask(request):
        raise KeyError(request.query)

    with pytest.raises(KeyError, match="q1"):
        answer_all([request(1)], ask, workers=2)
