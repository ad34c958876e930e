"""Web search: live through Serper or SerpAPI, or from a recording of Serper's replies.

Results are filtered before they become documents. Otherwise a page that publishes a benchmark's
answers would turn a test of searching into a test of finding that page. DeepResearcher
(arXiv 2504.03160) trains on the live web.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from urllib.parse import urldefrag, urlsplit

from zerosearch_jax.errors import UserError
from zerosearch_jax.search.bm25 import BM25Engine
from zerosearch_jax.search.engine import Passage, SearchRequest, SearchResult
from zerosearch_jax.search.http_client import JsonClient, answer_all

Organic = dict[str, object]  # one result of Serper or SerpAPI: title, snippet, link, …
KEYS = ("title", "snippet", "link")
"""Keys of a result that are read; the values are texts."""
_MAX_LINK = 8_192  # characters; `urlsplit` is quadratic in a host of combining characters
_PAGE = 10  # results on one page of Google; the filter needs more than topk

_PATH = "/search"
SERVERS = {"serper": "https://google.serper.dev", "serpapi": "https://serpapi.com"}
"""Server address of each provider, for the client of a `WebEngine`."""
KEY_VARIABLES = {"serper": "SERPER_API_KEY", "serpapi": "SERPAPI_API_KEY"}
"""Environment variable with the API key of each provider."""


def filter_results(
    organic: Iterable[Organic], *, blocked_domains: Collection[str], topk: int
) -> list[Organic]:
    """Returns the first `topk` acceptable results, in order.

    These results are dropped:
      - results without a title, a snippet, or a link with a host and at most 8,192 characters;
      - results with the link (ignoring its `#fragment`) or the snippet of an earlier result;
      - results whose host is one of `blocked_domains` or a subdomain of it: "huggingface.co" also
        blocks "datasets.huggingface.co".
    """
    blocked = [domain.lower().strip(".") for domain in blocked_domains]
    links, snippets, kept = set(), set(), []
    for result in organic:
        title, snippet, link = (" ".join(str(result.get(key) or "").split()) for key in KEYS)
        host = _host(link)
        link = urldefrag(link).url if host else ""
        if not (title and snippet and host) or link in links or snippet in snippets:
            continue
        if any(host == domain or host.endswith(f".{domain}") for domain in blocked):
            continue
        links.add(link)
        snippets.add(snippet)
        kept.append(result)
    return kept[:topk]


def _host(link: str) -> str:
    """Returns the lower-case host of an absolute link, or "" without one."""
    if len(link) > _MAX_LINK:
        return ""
    try:
        return (urlsplit(link).hostname or "").strip(".")
    except ValueError:  # an invalid IPv6 address, or characters that no host may have
        return ""


def _document(result: Organic) -> str:
    return f"{result['title']}: {result['snippet']}"


class WebEngine:
    """Search engine of the live web; a document is `title: snippet`.

    Args:
      client: client of the provider's server, see `SERVERS`.
      provider: "serper" or "serpapi".
      api_key: the user's key; sent to the provider, never logged.
      topk: maximum number of documents per search, after filtering.
      blocked_domains: see `filter_results`.
      workers: maximum number of concurrent searches.
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
        """Raises UserError for an unknown provider or a bad key."""
        if provider not in SERVERS:
            raise UserError(f"web: provider is {provider!r}; choose {' or '.join(SERVERS)}")
        if not api_key or api_key != api_key.strip():
            raise UserError(
                f"web: the API key for {provider} is empty or has spaces or line breaks around it"
            )
        self.client = client
        self.provider = provider
        self.topk = topk
        self.blocked_domains = tuple(blocked_domains)
        self.workers = workers
        self._api_key = api_key

    def search(self, requests: Sequence[SearchRequest]) -> list[SearchResult]:
        """Returns one result per request, in order."""
        return answer_all(requests, self._ask, self.workers)

    def _ask(self, request: SearchRequest) -> list[str]:
        kept = filter_results(
            self.organic(request.query), blocked_domains=self.blocked_domains, topk=self.topk
        )
        return [_document(result) for result in kept]

    def organic(self, query: str) -> list[Organic]:
        """Returns the provider's unfiltered results, reduced to the texts under `KEYS`.

        Raises:
          SearchFailed: no reply after the client's retries, or a reply of the wrong shape.
        """
        results = max(self.topk, _PAGE)
        if self.provider == "serper":
            payload, headers = {"q": query, "num": results}, {"X-API-KEY": self._api_key}
            reply = self.client.post(_PATH, payload, headers)
            # Serper may omit the list if Google found nothing; only search replies have parameters.
            if isinstance(reply, dict) and isinstance(reply.get("searchParameters"), dict):
                reply.setdefault("organic", [])
            return self._results(reply, "organic", "POST")
        params = {"engine": "google", "q": query, "num": results, "api_key": self._api_key}
        reply = self.client.get(_PATH, params)
        # SerpAPI omits the list if Google found nothing; such a search is successful.
        if isinstance(reply, dict) and "organic_results" not in reply:
            metadata = reply.get("search_metadata")
            if isinstance(metadata, dict) and metadata.get("status") == "Success":
                return []
        return self._results(reply, "organic_results", "GET")

    def _results(self, reply: object, key: str, method: str) -> list[Organic]:
        found = reply.get(key) if isinstance(reply, dict) else None
        if not isinstance(found, list) or not all(isinstance(result, dict) for result in found):
            trouble = f'the reply has no list of results "{key}"'
            raise self.client.wrong_shape(_PATH, trouble, method)
        return [
            {key: result[key] for key in KEYS if isinstance(result.get(key), str)}
            for result in found
        ]


class RecordedWeb:
    """Search engine that answers from recorded Serper replies, deterministically and offline.

    A query that equals a recorded query exactly gets its recorded results; the latest recording of
    a query counts. BM25 over the title and snippet of all recorded results answers any other query.
    Such an answer is NOT that of the web, so a score represents web search only if all queries were
    recorded. All results pass `filter_results`.
    """

    name = "recorded_web"

    def __init__(
        self, responses: Iterable[Mapping], *, topk: int, blocked_domains: Collection[str]
    ):
        """Indexes `responses`, rows of `data.recordings.load_recording`.

        Raises:
          UserError: filtering drops all results.
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
        self._fallback = BM25Engine(passages, topk)

    def search(self, requests: Sequence[SearchRequest]) -> list[SearchResult]:
        """Returns one result per request, in order."""
        return [
            SearchResult(request.key, self._recorded[request.query])
            if request.query in self._recorded
            else self._fallback.search([request])[0]
            for request in requests
        ]


def record_of(query: str, organic: Iterable[Organic]) -> dict:
    """Returns one row of a recording: a reply of Serper's `/search`, reduced to the keys in use."""
    results = [{key: result[key] for key in KEYS if key in result} for result in organic]
    return {"searchParameters": {"q": query}, "organic": results}
