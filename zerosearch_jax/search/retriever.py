"""Passage retrievers behind HTTP, in the two dialects that others already serve."""

from collections.abc import Sequence

from zerosearch_jax.errors import UserError
from zerosearch_jax.search.engine import SearchRequest, SearchResult
from zerosearch_jax.search.http_client import JsonClient, SearchFailed, answer, answer_all


class RetrieverEngine:
    """Documents of a retrieval server, best first, at most `topk`.

    A reply of the wrong shape fails the requests that it was to answer; a batch with the wrong
    number of results fails all of them, for nothing tells which result is whose.

    Args:
      client: of the server; its address has no `/retrieve`.
      topk: documents asked for.
      dialect: "search_r1", one batch for all queries, its passages' `contents` made plain by
        `plain`; or "zerosearch", one request a query, its `text` passed on as it is.
      workers: requests under way at once; "search_r1" sends one, whatever is given.
    """

    name = "retriever"

    def __init__(self, client: JsonClient, *, topk: int, dialect: str, workers: int):
        """Raises UserError for an unknown dialect, or topk or workers below 1."""
        if dialect not in ("search_r1", "zerosearch"):
            raise UserError(
                f"retriever: dialect is {dialect!r}; choose search_r1 (a batch of queries) or "
                "zerosearch (a query at a time)"
            )
        if topk < 1 or workers < 1:
            raise UserError(
                f"retriever: topk is {topk}, workers {workers}; both must be at least 1"
            )
        self.client = client
        self.topk = topk
        self.dialect = dialect
        self.workers = workers

    def search(self, requests: Sequence[SearchRequest]) -> list[SearchResult]:
        """One result a request, in order."""
        if self.dialect == "zerosearch":
            return answer_all(requests, self._ask_one, self.workers)
        if not requests:
            return []
        try:
            found = self._ask_batch([request.query for request in requests])
        except SearchFailed as failure:
            return [SearchResult(request.key, (), failure.reason) for request in requests]
        hits = {request.key: hits for request, hits in zip(requests, found, strict=True)}
        return [
            answer(request, lambda request: self._batch_documents(hits[request.key]))
            for request in requests
        ]

    def _ask_batch(self, queries: list[str]) -> list[object]:
        """What the server found for each query, not yet checked."""
        # With scores, as Search-R1's own rollouts ask; they are not read.
        payload = {"queries": queries, "topk": self.topk, "return_scores": True}
        reply = self.client.post("/retrieve", payload)
        found = reply.get("result") if isinstance(reply, dict) else None
        if not isinstance(found, list):
            raise SearchFailed('POST /retrieve: the reply has no list "result"')
        if len(found) != len(queries):
            raise SearchFailed(
                f'POST /retrieve: "result" has {len(found)} lists for {len(queries)} queries'
            )
        return found

    def _batch_documents(self, hits: object) -> list[str]:
        """Passages of one query, with scores (`{"document": …, "score": …}`) or bare."""
        if not isinstance(hits, list):
            raise SearchFailed('POST /retrieve: "result" holds something that is not a list')
        passages = [
            hit["document"] if isinstance(hit, dict) and "document" in hit else hit for hit in hits
        ]
        return [plain(contents) for contents in _strings(passages, "contents")[: self.topk]]

    def _ask_one(self, request: SearchRequest) -> list[str]:
        payload = {"query": request.query, "top_k": self.topk}
        reply = self.client.post("/retrieve", payload)
        if not isinstance(reply, list):
            raise SearchFailed("POST /retrieve: the reply is not a list")
        return _strings(reply, "text")[: self.topk]


def _strings(rows: list[object], key: str) -> list[str]:
    """The text under `key` of each row."""
    texts = [row.get(key) if isinstance(row, dict) else None for row in rows]
    if not all(isinstance(text, str) for text in texts):
        raise SearchFailed(f'POST /retrieve: a result has no text "{key}"')
    return texts


def plain(contents: str) -> str:
    """A passage's `"Title"\\ntext` as `Title: text`, like a web result; nothing is left out.

    Contents without a quoted first line are passed on as they are.
    """
    title, line_break, text = contents.partition("\n")
    title = title.strip()
    if not line_break or len(title) < 3 or title[0] != '"' or title[-1] != '"':
        return contents
    return f"{title[1:-1]}: {text}"
