"""A real engine made unreliable: to measure what a policy does when searches mislead it.

Unlike a real engine it reads the gold answers, but only to keep them out of noisy results.
"""

import sys
from collections.abc import Sequence
from itertools import islice

from zerosearch_jax.errors import UserError
from zerosearch_jax.search.bm25 import BM25Engine
from zerosearch_jax.search.curriculum import draw_noisy
from zerosearch_jax.search.engine import SearchRequest, SearchResult
from zerosearch_jax.text.matching import mentions


class NoisyEngine:
    """BM25, of which a share of the searches finds the best passages that hold no gold answer.

    Noisy documents are what such an engine would rank next: on the subject, without the answer.
    Which searches are noisy depends on (seed, episode, turn) alone, and a search that is noisy
    at one share is noisy at every higher one, so that shares can be compared. A request's own
    `noisy` is not read.

    Args:
      engine: answers the other searches; with share 0, all of them.
      share: expected share of noisy searches, in [0, 1].
      seed: of the draws.
    """

    name = "bm25+noise"

    def __init__(self, engine: BM25Engine, share: float, seed: int):
        """Raises UserError for a share outside [0, 1]."""
        if not 0 <= share <= 1:
            raise UserError(f"noisy engine: share is {share}; it must be in [0, 1]")
        self.engine = engine
        self.share = share
        self.seed = seed

    def search(self, requests: Sequence[SearchRequest]) -> list[SearchResult]:
        """One result a request, in order; a noisy one may have fewer documents than asked for."""
        return [
            self._mislead(request) if self._is_noisy(request) else self.engine.search([request])[0]
            for request in requests
        ]

    def _is_noisy(self, request: SearchRequest) -> bool:
        return draw_noisy(self.seed, 0, request.episode, request.turn, self.share)

    def _mislead(self, request: SearchRequest) -> SearchResult:
        useless = (
            passage.text
            for passage in self.engine.ranked(request.query, sys.maxsize)
            if not any(mentions(passage.text, answer) for answer in request.golden_answers)
        )
        return SearchResult(request.key, tuple(islice(useless, self.engine.topk)))
