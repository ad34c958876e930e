"""Web search: live through Serper or SerpAPI, or from a recording of Serper's replies.

Results are filtered before they become documents: a page that publishes the benchmark's answers
would turn a test of searching into a test of finding that page. (Training on the live web:
DeepResearcher, arXiv 2504.03160.)
"""

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from urllib.parse import urldefrag, urlsplit

from zerosearch_jax.errors import UserError
from zerosearch_jax.search.bm25 import BM25Engine
from zerosearch_jax.search.engine import Passage, SearchRequest, SearchResult
from zerosearch_jax.search.http_client import JsonClient, SearchFailed, answer_all

Organic = dict[str, object]  # one result as Serper and SerpAPI give it: title, snippet, link, …
_KEYS = ("title", "snippet", "link")
_PAGE = 10  # results on a page of Google's, whatever is asked; the filter needs some to spare

SERVERS = {"serper": "https://google.serper.dev", "serpapi": "https://serpapi.com"}
"""Where each provider is; the address of a `WebEngine`'s client."""


def filter_results(
    organic: Iterable[Organic], *, blocked_domains: Collection[str], topk: int
) -> list[Organic]:
    """The first `topk` results that are worth reading, in their order.

    Left out are results without a title, a snippet or a link with a host; a link (whatever its
    `#fragment`) or a snippet that came before; and hosts that are one of `blocked_domains` or
    below it: "huggingface.co" blocks "datasets.huggingface.co", too.
    """
    blocked = [domain.lower().strip(".") for domain in blocked_domains]
    links, snippets, kept = set(), set(), []
    for result in organic:
        title, snippet, link = (" ".join(str(result.get(key) or "").split()) for key in _KEYS)
        link, host = urldefrag(link).url, _host(link)
        if not (title and snippet and host) or link in links or snippet in snippets:
            continue
        if any(host == domain or host.endswith(f".{domain}") for domain in blocked):
            continue
        links.add(link)
        snippets.add(snippet)
        kept.append(result)
    return kept[:topk]


def _host(link: str) -> str:
    """The lower-case host of an absolute link, "" when it has none."""
    try:
        return (urlsplit(link).hostname or "").strip(".")
    except ValueError:  # a bad port or IPv6 address
        return ""


def _document(result: Organic) -> str:
    return f"{result['title']}: {result['snippet']}"


class WebEngine:
    """Searches the web now; a document is `title: snippet`.

    Args:
      client: of the provider's server, see `SERVERS`.
      provider: "serper" or "serpapi".
      api_key: the user's; sent to the provider, never logged.
      topk: most documents of a search, after filtering.
      blocked_domains: see `filter_results`.
      workers: searches under way at once.
    """

    name = "web"

    def __init__(
        self,
        client: JsonClient,
        *,
        provider: str,
        api_key: str,
        topk: int,
        blocked_domains: Collection[str],
        workers: int,
    ):
        """Raises UserError: unknown provider, a bad key, or topk or workers below 1."""
        if provider not in SERVERS:
            raise UserError(f"web: provider is {provider!r}; choose {' or '.join(SERVERS)}")
        if not api_key or api_key != api_key.strip():
            raise UserError(
                f"web: the API key for {provider} is empty or has spaces or line breaks around it"
            )
        if topk < 1 or workers < 1:
            raise UserError(f"web: topk is {topk}, workers {workers}; both must be at least 1")
        self.client = client
        self.provider = provider
        self.topk = topk
        self.blocked_domains = tuple(blocked_domains)
        self.workers = workers
        self._api_key = api_key

    def search(self, requests: Sequence[SearchRequest]) -> list[SearchResult]:
        """One result a request, in order."""
        return answer_all(requests, self._ask, self.workers)

    def _ask(self, request: SearchRequest) -> list[str]:
        kept = filter_results(
            self.organic(request.query), blocked_domains=self.blocked_domains, topk=self.topk
        )
        return [_document(result) for result in kept]

    def organic(self, query: str) -> list[Organic]:
        """The provider's results, unfiltered; `record_of` makes a row of a recording of them.

        Raises:
          SearchFailed: no reply after the client's retries, or not a reply of the provider's.
        """
        results = max(self.topk, _PAGE)
        if self.provider == "serper":
            payload, headers = {"q": query, "num": results}, {"X-API-KEY": self._api_key}
            return _organic(self.client.post("/search", payload, headers), "organic")
        params = {"engine": "google", "q": query, "num": results, "api_key": self._api_key}
        reply = self.client.get("/search", params)
        # The list is left out when Google found nothing; then the search was a success.
        if isinstance(reply, dict) and "organic_results" not in reply:
            metadata = reply.get("search_metadata")
            if isinstance(metadata, dict) and metadata.get("status") == "Success":
                return []
        return _organic(reply, "organic_results")


def _organic(reply: object, key: str) -> list[Organic]:
    found = reply.get(key) if isinstance(reply, dict) else None
    if not isinstance(found, list) or not all(isinstance(result, dict) for result in found):
        raise SearchFailed(f'/search: the reply has no list of results "{key}"')
    return found


class RecordedWeb:
    """Answers from recorded Serper replies, the same for ever and without a network.

    A query that was recorded, letter for letter, gets its recorded results; of two recordings of
    a query the later counts. Any other query is answered by BM25 over the title and snippet of
    every recorded result, which is NOT what the web would have found: only where all queries were
    recorded does a score stand for web search. Both ways `filter_results` comes first.
    """

    name = "recorded_web"

    def __init__(
        self, responses: Iterable[Mapping], *, topk: int, blocked_domains: Collection[str]
    ):
        """Indexes `responses`, rows as `load_recording` gives them.

        Raises:
          UserError: topk < 1, or no result is left after filtering.
        """
        recorded = {row["searchParameters"]["q"]: row["organic"] for row in responses}
        everything = [result for organic in recorded.values() for result in organic]
        pool = filter_results(everything, blocked_domains=blocked_domains, topk=len(everything))
        if not pool:
            raise UserError(
                "recorded_web: no result has a title, a snippet and a link that is not blocked; "
                "check the recording and blocked_domains"
            )
        self._recorded = {
            query: tuple(
                _document(result)
                for result in filter_results(organic, blocked_domains=blocked_domains, topk=topk)
            )
            for query, organic in recorded.items()
        }
        passages = [
            Passage(r["link"], _host(r["link"]), r["title"], _document(r), ()) for r in pool
        ]
        self._other = BM25Engine(passages, topk)

    def search(self, requests: Sequence[SearchRequest]) -> list[SearchResult]:
        """One result a request, in order."""
        return [
            SearchResult(request.key, self._recorded[request.query])
            if request.query in self._recorded
            else self._other.search([request])[0]
            for request in requests
        ]


def record_of(query: str, organic: Iterable[Organic]) -> dict:
    """One row of a recording: what Serper's `/search` replied, cut to what is read here."""
    results = [{key: result[key] for key in _KEYS if key in result} for result in organic]
    return {"searchParameters": {"q": query}, "organic": results}


def load_recording(path: str | Path) -> list[dict]:
    """The rows of a .jsonl file of Serper's replies; other keys than `record_of`'s are ignored.

    Raises:
      UserError: the file is missing, empty or not UTF-8, or a row is not such a reply.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot read the recording ({error})") from error
    rows = [_row(path, n, line) for n, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise UserError(f"{path}: the recording has no rows; record at least one search")
    return rows


def _row(path: str | Path, number: int, line: str) -> dict:
    where = f"{path}: row {number}"
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where}: not JSON ({error})") from error
    parameters = row.get("searchParameters") if isinstance(row, dict) else None
    query = parameters.get("q") if isinstance(parameters, dict) else None
    if not isinstance(query, str):
        raise UserError(f"{where}: searchParameters.q, the query, is not there or not text")
    organic = row.get("organic")
    if not isinstance(organic, list) or not all(isinstance(result, dict) for result in organic):
        raise UserError(f"{where}: organic is not there or not a list of results")
    for rank, result in enumerate(organic):
        bad = [key for key in _KEYS if not isinstance(result.get(key, ""), str)]
        if bad:
            raise UserError(f"{where}: organic[{rank}].{bad[0]} is not text")
    return record_of(query, organic)
