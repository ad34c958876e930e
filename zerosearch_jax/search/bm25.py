"""BM25 over a fixed set of passages, the real search engine of the embedded world.

It reads only the query of a request.
"""

import logging
from collections.abc import Sequence

import numpy as np

from zerosearch_jax.errors import UserError
from zerosearch_jax.search.engine import Passage, SearchRequest, SearchResult
from zerosearch_jax.text.matching import words

# Grammatical words only, so that most two-letter symbols and domains can be found. The symbols
# "no", "as" and "in" cannot: BM25 does not distinguish nobelium's symbol from the word.
STOPWORDS = frozenset(
    "a an and are as at be but by for has have if in into is it its no not of on or such that the "
    "their then there these they this to was what which who whose will with".split()
)


def tokens(text: str) -> list[str]:
    """Splits `text` into lower-case words without accents and stop words; keeps single letters."""
    return [word for word in words(text) if word not in STOPWORDS]


class BM25Engine:
    """Search engine that ranks passages by BM25 (k1 = 1.5, b = 0.75, Lucene's idf, by bm25s).

    Ties go to the earlier passage, so that a ranking is the same on every machine.
    """

    name = "bm25"

    def __init__(self, passages: Sequence[Passage], topk: int = 3):
        """Indexes `passages`. A search returns up to `topk` documents.

        Raises:
          UserError: there are no passages, or none has a word.
        """
        # Imported here, because bm25s imports jax and this module is imported before configs are
        # checked. At import it sets its logger to DEBUG, and it logs whenever an index is built.
        import bm25s

        logging.getLogger("bm25s").setLevel(logging.WARNING)
        if not passages:
            raise UserError("BM25 engine: the corpus is empty; give at least one passage")
        self.topk = topk
        self._passages = tuple(passages)
        self._vocabulary: dict[str, int] = {}
        ids = [
            [self._vocabulary.setdefault(t, len(self._vocabulary)) for t in tokens(p.text)]
            for p in self._passages
        ]
        if not self._vocabulary:
            raise UserError("BM25 engine: no passage has a word; give a corpus of texts")
        self._index = bm25s.BM25(k1=1.5, b=0.75, method="lucene")
        self._index.index((ids, self._vocabulary), show_progress=False, create_empty_token=False)

    def search(self, requests: Sequence[SearchRequest]) -> list[SearchResult]:
        """Returns one result per request, in order.

        A result has no documents if no word of its query is in the corpus.
        """
        return [
            SearchResult(r.key, tuple(p.text for p in self.ranked(r.query, self.topk)))
            for r in requests
        ]

    def ranked(self, query: str, n: int) -> list[Passage]:
        """Returns the `n` best passages for `query` among those that share a word with it."""
        ids = [self._vocabulary[t] for t in tokens(query) if t in self._vocabulary]
        if not ids:
            return []
        scores = self._index.get_scores_from_ids(ids)  # [passages]
        best = np.argsort(-scores, kind="stable")[:n]
        return [self._passages[i] for i in best if scores[i] > 0]
