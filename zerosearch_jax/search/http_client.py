"""JSON over HTTP with bounded waits, counted retries and failures that give a reason.

A reason becomes text of an episode, so it never contains an address, a key or text of a reply.
"""

import asyncio
import functools
import json
import logging
import math
import re
import socket
import threading
import time
import weakref
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import NamedTuple

import httpx

from zerosearch_jax.errors import Terminated, UserError
from zerosearch_jax.files import parse_json
from zerosearch_jax.search.engine import FAILURE_KINDS, SearchRequest, SearchResult
from zerosearch_jax.search.server import check_address, endpoint

# Both libraries log whole addresses, and SerpAPI takes its key in the address.
logging.getLogger("httpx").setLevel(logging.WARNING)
logging.getLogger("httpcore").setLevel(logging.WARNING)

MAX_REPLY_BYTES = 32 * 2**20
MAX_REPLY_VALUES = 2**20
"""Limit of the commas and brackets of a reply, which bounds the memory of its values."""
MAX_WAIT_SECS = 60.0
"""Longest wait between two tries, unless the server asks for a longer one."""
_GRACE_SECS = 1.0  # added to deadlines, for loaded machines
_TRANSIENT = (
    httpx.NetworkError,
    httpx.RemoteProtocolError,
    httpx.ProxyError,
)
# Timeout (RFC 9110 §15.5.9), too early (RFC 8470 §5.2), too many requests (RFC 6585 §4).
_RETRIED_STATUSES = (408, 425, 429)


class SearchFailed(Exception):
    """One search failed after its retries; the message is a short phrase.

    Attributes:
      kind: one of `engine.FAILURE_KINDS`.
      address: scheme, host, port and path that was asked; "" without a server.
    """

    def __init__(self, reason: str, kind: str, address: str = ""):
        super().__init__(reason)
        self.kind = kind
        self.address = address


class TooLong(SearchFailed):
    """A search that failed because its text is too long for the model or the server."""

    def __init__(self, reason: str, address: str = ""):
        super().__init__(reason, "too_long", address)


# If a prompt is longer than the model's context, a server replies with status 400 or 422 and one of
# these texts. In order: OpenAI and vLLM; SGLang; TGI; others.
_CONTEXT_EXCEEDED = re.compile(
    rb"context.length|longer than the model|max_new_tokens` must be|too long"
)


class _Reply(NamedTuple):
    """Outcome of one try.

    Attributes:
      content: body of a successful reply.
      trouble: what went wrong; "" after a success.
      kind: one of `FAILURE_KINDS`; "" after a success.
      transient: another try may succeed.
      retry_after_secs: wait before the next try that the server asks for.
      replied: the server sent a status.
    """

    content: bytes | bytearray = b""
    trouble: str = ""
    kind: str = ""
    transient: bool = False
    retry_after_secs: float = 0.0
    replied: bool = False


_CANCELLED = _Reply(trouble="cancelled", kind="other")
_DAMAGED = _Reply(
    trouble="the compression is damaged", kind="not_json", transient=True, replied=True
)
_TIMEOUT = _Reply(trouble="Timeout", kind="timeout", transient=True)


class JsonClient:
    """Client of one server; safe for use by many threads.

    A request gets up to `attempts` tries. Connection errors, timeouts, damaged compression and the
    statuses 408, 425, 429 and 5xx are retried; any other error fails at once. The wait between try
    i and the next is `backoff_secs * 2**i`, at most `MAX_WAIT_SECS`. A longer Retry-After of the
    server is respected if it fits into `budget_secs`, which bounds the request as a whole. If it
    does not fit, the request fails at once.

    Redirects are not followed, so that an API key reaches no other server. Cookies are not kept.
    Proxy settings of the environment apply.

    Args:
      base_url: "http://host:port" or "https://host", optionally followed by a path. It may end in
        the path of the requests, or in the start of that path, such as "/v1".
      timeout_secs: total time of one try, from the look-up of the host to the end of the body.
      attempts: number of tries, at least 1.
      backoff_secs: wait after the first try, in seconds.
      headers: headers of every request, for example an API key. They are never logged.
      max_reply_bytes: limit of a reply's body, both compressed and decompressed; a larger reply
        fails at once. The HTTP library limits headers and trailers to 100 KB each.
      sleep: waits the given number of seconds; by default a wait that `close` ends.
    """

    def __init__(
        self,
        base_url: str,
        *,
        timeout_secs: float,
        attempts: int,
        backoff_secs: float,
        headers: Mapping[str, str] | None = None,
        max_reply_bytes: int = MAX_REPLY_BYTES,
        sleep: Callable[[float], object] | None = None,
    ):
        """Checks the arguments; the first request opens the first connection.

        Raises:
          UserError: the address is not HTTP, a number is out of range, or the environment names an
            unsupported proxy.
        """
        self.base_url = check_address("server address", base_url)
        if not (attempts >= 1 and 0 < timeout_secs < math.inf and 0 <= backoff_secs < math.inf):
            raise UserError(
                f"server {base_url}: attempts={attempts}, timeout_secs={timeout_secs}, "
                f"backoff_secs={backoff_secs}; they must be finite, and >= 1, > 0 and >= 0"
            )
        self.timeout_secs = timeout_secs
        self.attempts = attempts
        self.backoff_secs = backoff_secs
        self.max_reply_bytes = max_reply_bytes
        self._headers = {"Accept-Encoding": "gzip", **(headers or {})}
        self._closed: Future[None] = Future()
        self._sleep = sleep or functools.partial(wait, [self._closed])
        self._loop = _event_loop()
        # httpx's timeouts bound each read, not their sum: `_try` has the deadline. The number
        # of connections is bounded by the callers' threads; a limit here would make them queue
        # within their deadline. An explicit transport would switch the environment's proxies off.
        # Each request has its own connection. On a connection that is kept alive, a second reply to
        # the last request would become the documents of the next query.
        limits = httpx.Limits(max_keepalive_connections=0)
        cookies = CookieJar(DefaultCookiePolicy(allowed_domains=()))
        try:
            self._http = httpx.AsyncClient(
                timeout=None, limits=limits, cookies=cookies, follow_redirects=False
            )
        except (ImportError, ValueError) as error:
            raise UserError(
                f"server {base_url}: the environment's proxy settings are not supported ({error}); "
                "fix or unset HTTP_PROXY, HTTPS_PROXY and ALL_PROXY"
            ) from error
        # Also closes the connections of a client that is dropped without `close`.
        self._disconnect = weakref.finalize(self, _disconnect, self._http, self._loop)
        self._disconnect.atexit = False
        _CLIENTS.add(self)

    @property
    def budget_secs(self) -> float:
        """Longest time of a request in seconds: the deadlines of all tries and their waits."""
        waits = sum(self._backoff(attempt) for attempt in range(1, self.attempts))
        return self.attempts * self.timeout_secs + waits

    def post(self, path: str, payload: object, headers: Mapping[str, str] | None = None) -> object:
        """Returns the parsed JSON reply to `payload`, which is sent as JSON.

        Args:
          headers: additional headers of this request.

        Raises:
          TooLong: the server refused the request because of its length.
          SearchFailed: no reply, another error status, a reply that is too large or not JSON, or
            `close` was called.
        """
        content = json.dumps(payload, allow_nan=False).encode()
        headers = {"Content-Type": "application/json", **(headers or {})}
        return self._request("POST", path, headers=headers, content=content)

    def get(self, path: str, params: Mapping[str, str | int]) -> object:
        """Returns the parsed JSON reply to a GET with query parameters. Raises as `post` does."""
        return self._request("GET", path, headers={}, params=dict(params))

    def wrong_shape(self, path: str, trouble: str, method: str = "POST") -> SearchFailed:
        """Returns the failure of a request whose JSON reply cannot be used."""
        return self._failure(method, path, trouble, "wrong_shape")

    def no_reply(self) -> str:
        """Sends one GET and returns why the server did not reply; "" if it did, with any status."""
        reply = self._run("GET", self.base_url, self.timeout_secs, {"headers": {}})
        return "" if reply.replied else reply.trouble

    def close(self) -> None:
        """Ends all waiting requests at once; they and later requests raise `SearchFailed`."""
        if not self._closed.done():
            self._closed.set_result(None)
        self._disconnect()

    def _backoff(self, attempt: int) -> float:
        """Returns the wait before a try, counted from 0, in seconds."""
        return min(self.backoff_secs * 2 ** (attempt - 1), MAX_WAIT_SECS)

    def _request(self, method: str, path: str, **arguments: object) -> object:
        url = endpoint(self.base_url, path)
        ends = time.monotonic() + self.budget_secs + _GRACE_SECS
        reply = self._run(method, url, self.timeout_secs, arguments)
        tries = 1
        while reply.transient and tries < self.attempts:
            secs = max(self._backoff(tries), reply.retry_after_secs)
            left = ends - time.monotonic() - secs
            if left <= 0:
                break
            self._sleep(secs)
            reply = self._run(method, url, min(self.timeout_secs, left), arguments)
            tries += 1
        if reply.trouble:
            counted = f" in {tries} tries" if reply.transient else ""
            raise self._failure(method, path, reply.trouble + counted, reply.kind)
        values = sum(map(reply.content.count, (b",", b"[", b"{")))
        if values > MAX_REPLY_VALUES:  # each takes up to 200 bytes of memory
            trouble = f"the reply has more than {MAX_REPLY_VALUES} values"
            raise self._failure(method, path, trouble, "too_large")
        try:
            return parse_json(reply.content)
        except ValueError:  # raised below: this error contains text of the reply
            pass
        raise self._failure(method, path, "the reply is not JSON", "not_json")

    def _failure(self, method: str, path: str, trouble: str, kind: str) -> SearchFailed:
        reason, address = f"{method} {path}: {trouble}", endpoint(self.base_url, path)
        if kind == "too_long":
            return TooLong(reason, address)
        return SearchFailed(reason, kind, address)

    def _run(self, method: str, url: str, secs: float, arguments: dict[str, object]) -> _Reply:
        """Waits for one try of at most `secs` seconds, or for `close`."""
        if self._closed.done():
            return _CANCELLED
        future = asyncio.run_coroutine_threadsafe(
            self._try(method, url, secs, **arguments), self._loop
        )
        try:
            # The try ends itself; the second bound holds even if the event loop is busy.
            wait([future, self._closed], secs + _GRACE_SECS, FIRST_COMPLETED)
            if self._closed.done():  # a try that begins after `close` raises
                return _CANCELLED
            return future.result() if future.done() else _TIMEOUT
        finally:
            future.cancel()  # drops the connection after `close` or Ctrl-C

    async def _try(
        self, method: str, url: str, secs: float, headers: Mapping[str, str], **arguments: object
    ) -> _Reply:
        # httpcore closes the socket of a TLS handshake only if its own timeout ends the handshake.
        timeout = httpx.Timeout(None, connect=0.9 * secs)
        # Only the class of an exception is kept: its message may contain the address or a header.
        try:
            headers = {**self._headers, **headers}
            async with (
                asyncio.timeout(secs),
                self._http.stream(
                    method, url, headers=headers, timeout=timeout, **arguments
                ) as response,
            ):
                reply = await _read(response, self.max_reply_bytes)
        except (TimeoutError, httpx.TimeoutException):
            return _TIMEOUT
        except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
            return _Reply(
                trouble=type(error).__name__,
                kind="connection" if isinstance(error, httpx.TransportError) else "other",
                transient=isinstance(error, _TRANSIENT),
            )
        status = response.status_code
        if 200 <= status < 300:
            return reply
        too_long = status in (413, 414) or (
            status in (400, 422) and _CONTEXT_EXCEEDED.search(reply.content) is not None
        )
        return _Reply(
            trouble=f"HTTP {status}",
            kind="too_long" if too_long else _status_kind(status),
            transient=status in _RETRIED_STATUSES or status >= 500,
            retry_after_secs=retry_after_secs(response.headers.get("Retry-After", "")),
            replied=True,
        )


async def _read(response: httpx.Response, limit: int) -> _Reply:
    """Reads and decompresses a body of at most `limit` bytes, in steps that allocate no more.

    httpx would decompress each received piece whole, to a thousand times its size.
    """
    encoding = response.headers.get("Content-Encoding", "").strip().lower()
    if encoding not in ("", "identity", "gzip", "x-gzip"):
        return _Reply(trouble="the compression is unknown", kind="not_json", replied=True)
    inflate = zlib.decompressobj(zlib.MAX_WBITS | 16) if encoding.endswith("gzip") else None
    content, received = bytearray(), 0
    async for piece in response.aiter_raw():
        received += len(piece)
        try:
            content += inflate.decompress(piece, limit + 1 - len(content)) if inflate else piece
        except zlib.error:
            return _DAMAGED
        if max(received, len(content)) > limit:
            return _Reply(
                content, f"the reply is larger than {limit} bytes", "too_large", replied=True
            )
        if inflate and inflate.unused_data:
            break
    if inflate and (not inflate.eof or inflate.unused_data):
        return _DAMAGED
    return _Reply(content, replied=True)


def retry_after_secs(header: str) -> float:
    """Returns the wait of a Retry-After header (RFC 9110 §10.2.3), in seconds from now.

    The header is a number of seconds or a date. Any other text, and a date in the past, give 0.
    """
    if re.fullmatch("[0-9]{1,18}", header):
        return float(header)
    try:
        return max(0.0, parsedate_to_datetime(header[:64]).timestamp() - time.time())
    except (ValueError, TypeError, IndexError, OverflowError):
        return 0.0


def _status_kind(status: int) -> str:
    kind = "http_429" if status == 429 else f"http_{status // 100}xx"
    return kind if kind in FAILURE_KINDS else "other"


class _Loop(asyncio.SelectorEventLoop):
    """Event loop that looks hosts up in daemon threads.

    A look-up cannot be cancelled, and the threads that asyncio uses for it delay the exit of the
    process.
    """

    async def getaddrinfo(self, host, port, *, family=0, type=0, proto=0, flags=0):
        found: Future[list] = Future()
        found.set_running_or_notify_cancel()

        def look_up() -> None:
            try:
                found.set_result(socket.getaddrinfo(host, port, family, type, proto, flags))
            except (OSError, UnicodeError) as error:
                found.set_exception(error)

        threading.Thread(target=look_up, name="look_up", daemon=True).start()
        return await asyncio.wrap_future(found, loop=self)


_CLIENTS: weakref.WeakSet[JsonClient] = weakref.WeakSet()


@contextmanager
def closed_on_interrupt() -> Iterator[None]:
    """Closes all clients when Ctrl-C or SIGTERM interrupts the block, so that searches end.

    Enter it inside the `with` of the thread pool, whose exit waits for its threads.
    """
    try:
        yield
    except (KeyboardInterrupt, Terminated):
        for client in list(_CLIENTS):
            client.close()
        raise


@functools.cache
def _event_loop() -> asyncio.AbstractEventLoop:
    """Returns the event loop of all clients, which runs in a daemon thread."""
    loop = _Loop()
    threading.Thread(target=loop.run_forever, name="http_client", daemon=True).start()
    return loop


def _disconnect(http: httpx.AsyncClient, loop: asyncio.AbstractEventLoop) -> None:
    asyncio.run_coroutine_threadsafe(http.aclose(), loop)


def answer(request: SearchRequest, ask: Callable[[SearchRequest], Iterable[str]]) -> SearchResult:
    """Returns the documents that `ask` finds, or the reason of its `SearchFailed`."""
    try:
        return SearchResult(request.key, tuple(ask(request)))
    except SearchFailed as failure:
        return failed_result(request.key, failure)


def failed_result(key: tuple[int, int], failure: SearchFailed) -> SearchResult:
    """Returns the result of a failed search."""
    return SearchResult(key, (), str(failure), failure.kind, failure.address)


def answer_all(
    requests: Sequence[SearchRequest],
    ask: Callable[[SearchRequest], Iterable[str]],
    workers: int,
) -> list[SearchResult]:
    """Calls `answer` for each request, at most `workers` at once; returns results in order.

    Exceptions of `ask` other than `SearchFailed` are raised.
    """
    with ThreadPoolExecutor(workers) as pool, closed_on_interrupt():
        return list(pool.map(lambda request: answer(request, ask), requests))
