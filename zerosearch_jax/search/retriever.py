"""Client of passage retrieval servers, in the dialects of Search-R1 and ZeroSearch."""

import re
from collections.abc import Sequence

from zerosearch_jax.errors import UserError
from zerosearch_jax.search.engine import SearchRequest, SearchResult
from zerosearch_jax.search.http_client import (
    JsonClient,
    SearchFailed,
    TooLong,
    answer,
    answer_all,
    failed_result,
)

_PATH = "/retrieve"
DIALECTS = ("search_r1", "zerosearch")
_QUOTED_LINE = re.compile(r'\A[^\S\n]*"([^\n]+)"[^\S\n]*\n')


class RetrieverEngine:
    """Search engine that returns up to `topk` documents of a retrieval server.

    A reply of the wrong shape fails its requests. A batch with the wrong number of results fails
    all of its requests, because results cannot be assigned to queries.

    Args:
      client: client of the server, with an address without `/retrieve`.
      topk: number of documents to request.
      dialect: "search_r1" sends one batch of all queries and converts `contents` with `plain`;
        "zerosearch" sends one request per query and returns each `text` unchanged.
      workers: maximum number of concurrent requests; "search_r1" always sends one.
    """

    name = "retriever"

    def __init__(self, client: JsonClient, *, topk: int, dialect: str, workers: int):
        """Raises UserError for an unknown dialect."""
        if dialect not in DIALECTS:
            raise UserError(
                f"retriever: dialect is {dialect!r}; choose search_r1 (one batch of queries) or "
                "zerosearch (one request per query)"
            )
        self.client = client
        self.topk = topk
        self.dialect = dialect
        self.workers = workers

    def search(self, requests: Sequence[SearchRequest]) -> list[SearchResult]:
        """Returns one result per request, in order."""
        if self.dialect == "zerosearch":
            return answer_all(requests, self._ask_one, self.workers)
        if not requests:
            return []
        try:
            found = self._ask_batch([request.query for request in requests])
        except TooLong as failure:
            if len(requests) == 1:
                return [failed_result(requests[0].key, failure)]
            # One long query must not fail the others.
            return [self.search([request])[0] for request in requests]
        except SearchFailed as failure:
            return [failed_result(request.key, failure) for request in requests]
        return [
            answer(request, lambda _, hits=hits: self._batch_documents(hits))
            for request, hits in zip(requests, found, strict=True)
        ]

    def _ask_batch(self, queries: list[str]) -> list[object]:
        """Returns the server's hits of each query; their contents are not checked yet."""
        # Like Search-R1's own rollouts, request scores; they are not read.
        payload = {"queries": queries, "topk": self.topk, "return_scores": True}
        reply = self.client.post(_PATH, payload)
        found = reply.get("result") if isinstance(reply, dict) else None
        if not isinstance(found, list):
            raise self._wrong_shape('the reply has no list "result"')
        if len(found) != len(queries):
            raise self._wrong_shape(f'"result" has {len(found)} lists for {len(queries)} queries')
        return found

    def _batch_documents(self, hits: object) -> list[str]:
        """Returns the texts of one query's hits: `{"document": …, "score": …}` or bare passages."""
        if not isinstance(hits, list):
            raise self._wrong_shape('"result" holds something that is not a list')
        passages = [
            hit["document"] if isinstance(hit, dict) and "document" in hit else hit for hit in hits
        ]
        return [plain(contents) for contents in self._strings(passages, "contents")[: self.topk]]

    def _ask_one(self, request: SearchRequest) -> list[str]:
        payload = {"query": request.query, "top_k": self.topk}
        reply = self.client.post(_PATH, payload)
        if not isinstance(reply, list):
            raise self._wrong_shape("the reply is not a list")
        return self._strings(reply, "text")[: self.topk]

    def _strings(self, rows: list[object], key: str) -> list[str]:
        """Returns the text under `key` of each row."""
        texts = [row.get(key) if isinstance(row, dict) else None for row in rows]
        if not all(isinstance(text, str) for text in texts):
            raise self._wrong_shape(f'a result has no text "{key}"')
        return texts

    def _wrong_shape(self, trouble: str) -> SearchFailed:
        return self.client.wrong_shape(_PATH, trouble)


def plain(contents: str) -> str:
    """Converts a passage `"Title"\\ntext` to `Title: text`, the format of a web result.

    Contents without a quoted first line are returned unchanged.
    """
    return _QUOTED_LINE.sub(r"\1: ", contents)
