"""JSON over HTTP with bounded waits, counted retries and failures that give a reason.

A reason becomes text of an episode, so it never contains an address, a key or text of a reply.
"""

import asyncio
import functools
import json
import logging
import re
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import NamedTuple

import httpx

from zerosearch_jax.errors import Terminated, UserError
from zerosearch_jax.search.engine import FAILURE_KINDS, SearchRequest, SearchResult

# Both libraries log whole addresses, and SerpAPI takes its key in the address.
logging.getLogger("httpx").setLevel(logging.WARNING)
logging.getLogger("httpcore").setLevel(logging.WARNING)

MAX_REPLY_BYTES = 32 * 2**20
# uvicorn (vLLM, SGLang) closes idle connections after 5 seconds. Dropping them earlier avoids a
# request on a connection that the server is about to close.
_KEEP_ALIVE_SECS = 4.0
_TRANSIENT = (
    httpx.NetworkError,
    httpx.TimeoutException,
    httpx.RemoteProtocolError,
    httpx.ProxyError,
    httpx.DecodingError,
)


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
      replied: the server sent a status.
    """

    content: bytes = b""
    trouble: str = ""
    kind: str = ""
    transient: bool = False
    replied: bool = False


_CANCELLED = _Reply(trouble="cancelled", kind="cancelled")


class JsonClient:
    """Client of one server that keeps its connections alive; safe for use by many threads.

    A request gets up to `attempts` tries, with a wait of `backoff_secs * 2**i` between try i and
    the next. Connection errors, timeouts, HTTP 429 and HTTP 5xx are retried; any other error
    fails at once. Redirects are not followed, so that an API key reaches no other server. Proxy
    settings of the environment apply.

    Args:
      base_url: "http://host:port" or "https://host", optionally followed by a path.
      timeout_secs: total time of one try, from connecting to the end of the body.
      attempts: number of tries, at least 1.
      backoff_secs: wait after the first try, in seconds.
      headers: headers of every request, for example an API key. They are never logged.
      max_reply_bytes: limit of a reply's decompressed body; a larger reply fails at once.
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
        if not base_url.startswith(("http://", "https://")):
            raise UserError(f"server address {base_url!r}: it must begin with http:// or https://")
        if attempts < 1 or timeout_secs <= 0 or backoff_secs < 0:
            raise UserError(
                f"server {base_url}: attempts={attempts}, timeout_secs={timeout_secs}, "
                f"backoff_secs={backoff_secs}; they must be >= 1, > 0 and >= 0"
            )
        self.base_url = base_url.rstrip("/")
        self.timeout_secs = timeout_secs
        self.attempts = attempts
        self.backoff_secs = backoff_secs
        self.max_reply_bytes = max_reply_bytes
        self._headers = dict(headers or {})
        self._closed: Future[None] = Future()
        self._sleep = sleep or functools.partial(wait, [self._closed])
        self._loop = _event_loop()
        # httpx's timeouts bound each read, not their sum: `_try` has the one deadline. The number
        # of connections is bounded by the callers' threads; a limit here would make them queue
        # within their deadline. An explicit transport would switch the environment's proxies off.
        limits = httpx.Limits(keepalive_expiry=_KEEP_ALIVE_SECS)
        try:
            self._http = httpx.AsyncClient(timeout=None, limits=limits, follow_redirects=False)
        except (ImportError, ValueError) as error:
            raise UserError(
                f"server {base_url}: the environment's proxy settings are not supported ({error}); "
                "fix or unset HTTP_PROXY, HTTPS_PROXY and ALL_PROXY"
            ) from error
        # Also closes the connections of a client that is dropped without `close`.
        self._disconnect = weakref.finalize(self, _disconnect, self._http, self._loop)
        self._disconnect.atexit = False
        _CLIENTS.add(self)

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
        reply = self._run("GET", "", {"headers": {}})
        return "" if reply.replied else reply.trouble

    def close(self) -> None:
        """Ends all waiting requests at once; they and later requests raise `SearchFailed`."""
        if not self._closed.done():
            self._closed.set_result(None)
        self._disconnect()

    def _request(self, method: str, path: str, **arguments: object) -> object:
        for attempt in range(self.attempts):
            if attempt:
                self._sleep(self.backoff_secs * 2 ** (attempt - 1))
            reply = self._run(method, path, arguments)
            if not reply.trouble:
                try:
                    return json.loads(reply.content)
                except ValueError:
                    trouble = "the reply is not JSON"
                    raise self._failure(method, path, trouble, "not_json") from None
            if not reply.transient:
                break
        tries = f" in {attempt + 1} tries" if reply.transient else ""
        raise self._failure(method, path, reply.trouble + tries, reply.kind)

    def _failure(self, method: str, path: str, trouble: str, kind: str) -> SearchFailed:
        reason, address = f"{method} {path}: {trouble}", self.base_url + path
        if kind == "too_long":
            return TooLong(reason, address)
        return SearchFailed(reason, kind, address)

    def _run(self, method: str, path: str, arguments: dict[str, object]) -> _Reply:
        """Waits for one try, or for `close`."""
        if self._closed.done():
            return _CANCELLED
        future = asyncio.run_coroutine_threadsafe(self._try(method, path, **arguments), self._loop)
        try:
            wait([future, self._closed], return_when=FIRST_COMPLETED)
            return future.result() if future.done() else _CANCELLED
        finally:
            future.cancel()  # drops the connection after `close` or Ctrl-C

    async def _try(
        self, method: str, path: str, headers: Mapping[str, str], **arguments: object
    ) -> _Reply:
        # Only the class of an exception is kept: its message may contain the address or a header.
        try:
            headers = {**self._headers, **headers}
            async with (
                asyncio.timeout(self.timeout_secs),
                self._http.stream(
                    method, self.base_url + path, headers=headers, **arguments
                ) as response,
            ):
                content = bytearray()
                async for piece in response.aiter_bytes():
                    content += piece
                    if len(content) > self.max_reply_bytes:
                        trouble = f"the reply is larger than {self.max_reply_bytes} bytes"
                        return _Reply(trouble=trouble, kind="too_large", replied=True)
        except TimeoutError:
            return _Reply(trouble="Timeout", kind="timeout", transient=True)
        except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
            kind = "not_json" if isinstance(error, httpx.DecodingError) else "connection"
            return _Reply(
                trouble=type(error).__name__, kind=kind, transient=isinstance(error, _TRANSIENT)
            )
        status = response.status_code
        if 200 <= status < 300:
            return _Reply(bytes(content), replied=True)
        too_long = status in (413, 414) or (
            status in (400, 422) and _CONTEXT_EXCEEDED.search(content) is not None
        )
        transient = status in (408, 429) or status >= 500
        kind = "too_long" if too_long else _status_kind(status)
        return _Reply(trouble=f"HTTP {status}", kind=kind, transient=transient, replied=True)


def _status_kind(status: int) -> str:
    kind = "http_429" if status == 429 else f"http_{status // 100}xx"
    return kind if kind in FAILURE_KINDS else "other"


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
    loop = asyncio.new_event_loop()
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
