"""Asks servers that speak JSON over HTTP: bounded waits, counted retries, failures with a reason.

A reason becomes text of an episode, so it says little: never a reply's text, an address or a key.
"""

import json
import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import requests
import urllib3

from zerosearch_jax.errors import UserError
from zerosearch_jax.search.engine import SearchRequest, SearchResult

# urllib3 writes whole addresses to its debug log, and SerpAPI wants its key in the address.
logging.getLogger("urllib3.connectionpool").setLevel(logging.INFO)

_READ_BYTES = 65_536
_TRANSIENT = (requests.ConnectionError, requests.Timeout, urllib3.exceptions.HTTPError)


class SearchFailed(Exception):
    """One search could not be answered, after its retries; `reason` is a short phrase."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


class JsonClient:
    """Posts to and gets from one server; may be used by many threads at once.

    Connection errors, time-outs, HTTP 429 and 5xx are tried again, `attempts` tries in all, with
    `backoff_secs * 2**i` between try i and the next. Any other trouble fails at once. Redirects
    are not followed: an API key goes to no other server.

    Args:
      base_url: "http://host:port" or "https://host"; a path may follow.
      timeout_secs: of one try, the longest wait for the connection, for the reply to begin, and
        for its body to be complete.
      attempts: tries in all, at least 1.
      headers: sent with every request (an API key, say). They are never logged.
      sleep: waits the given seconds.

    Attributes:
      retries: tries beyond the first of each request, so far.
    """

    def __init__(
        self,
        base_url: str,
        *,
        timeout_secs: float,
        attempts: int,
        backoff_secs: float,
        headers: Mapping[str, str] | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ):
        """Connects to nothing yet.

        Raises:
          UserError: not an HTTP address, or a number out of its range.
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
        self.retries = 0
        self._headers = dict(headers or {})
        self._sleep = sleep
        self._lock = threading.Lock()

    def post(self, path: str, payload: object, headers: Mapping[str, str] | None = None) -> object:
        """The parsed JSON reply to `payload`, sent as JSON; `headers` go with this request only.

        Raises:
          SearchFailed: no reply, a reply that is an error, or one that is not JSON.
        """
        return self._ask("POST", path, headers, json=payload)

    def get(self, path: str, params: Mapping[str, str | int]) -> object:
        """The parsed JSON reply to a GET with `params` in the address. Raises as `post` does."""
        return self._ask("GET", path, None, params=params)

    def _ask(
        self, method: str, path: str, headers: Mapping[str, str] | None, **body: object
    ) -> object:
        trouble = ""
        for attempt in range(self.attempts):
            if attempt:
                with self._lock:
                    self.retries += 1
                self._sleep(self.backoff_secs * 2 ** (attempt - 1))
            # Of an exception only its class is kept: its message holds the address.
            try:
                status, content = self._try(method, path, headers, body)
            except _TRANSIENT as error:
                trouble = f"{type(error).__name__} in {attempt + 1} tries"
                continue
            except requests.RequestException as error:
                trouble = type(error).__name__
                break
            if 200 <= status < 300:
                return _parsed(f"{method} {path}", content)
            trouble = f"HTTP {status}"
            if status != 429 and status < 500:
                break
            trouble += f" in {attempt + 1} tries"
        raise SearchFailed(f"{method} {path}: {trouble}")  # here no exception is its context

    def _try(
        self, method: str, path: str, headers: Mapping[str, str] | None, body: dict[str, object]
    ) -> tuple[int, bytes]:
        """One try: the reply's status and content."""
        with requests.request(
            method,
            self.base_url + path,
            headers={**self._headers, **(headers or {})},
            timeout=self.timeout_secs,
            allow_redirects=False,
            stream=True,
            **body,
        ) as response:
            # `timeout` is for each read, so a body that drips in would take for ever.
            deadline = time.monotonic() + self.timeout_secs
            content = b""
            while piece := response.raw.read1(_READ_BYTES, decode_content=True):
                content += piece
                if time.monotonic() > deadline:
                    raise requests.Timeout
            return response.status_code, content


def _parsed(what: str, content: bytes) -> object:
    try:
        return json.loads(content)
    except ValueError as error:
        raise SearchFailed(f"{what}: the reply is not JSON") from error


def answer(request: SearchRequest, ask: Callable[[SearchRequest], Iterable[str]]) -> SearchResult:
    """The documents that `ask` finds for one request, or why it could not (`SearchFailed`)."""
    try:
        return SearchResult(request.key, tuple(ask(request)))
    except SearchFailed as failure:
        return SearchResult(request.key, (), failure.reason)


def answer_all(
    requests: Sequence[SearchRequest],
    ask: Callable[[SearchRequest], Iterable[str]],
    workers: int,
) -> list[SearchResult]:
    """`answer` for each request, in order, at most `workers` under way at once.

    Any exception of `ask` but `SearchFailed` is raised.
    """
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(lambda request: answer(request, ask), requests))
