"""A real engine with noisy results, to measure how a policy handles misleading searches.

Unlike a real engine it reads the gold answers, but only to keep them out of noisy results.
"""

import sys
from collections.abc import Sequence
from itertools import islice

from zerosearch_jax.search.bm25 import BM25Engine
from zerosearch_jax.search.curriculum import check_probability, draw_noisy
from zerosearch_jax.search.engine import SearchRequest, SearchResult
from zerosearch_jax.text.matching import mentions


class NoisyEngine:
    """BM25 engine that withholds passages with a gold answer in a share of the searches.

    A noisy search returns the best of the other passages: on the subject, but useless.
    Only (seed, episode, turn) decides which searches are noisy. A search that is noisy at one share
    is noisy at every higher share, so that results at different shares are comparable. The
    request's `noisy` flag has no effect.

    Args:
      engine: engine of the searches that are not noisy, and source of the noisy passages.
      share: expected share of noisy searches, in [0, 1].
      seed: seed of the draws.
    """

    name = "bm25+noise"

    def __init__(self, engine: BM25Engine, share: float, seed: int):
        """Raises UserError for a share outside [0, 1]."""
        check_probability("noisy engine: share", share)
        self.engine = engine
        self.share = share
        self.seed = seed

    def search(self, requests: Sequence[SearchRequest]) -> list[SearchResult]:
        """Returns one result per request, in order; noisy ones may lack documents."""
        return [
            self._noisy_result(request)
            if draw_noisy(self.seed, 0, request.episode, request.turn, self.share)
            else self.engine.search([request])[0]
            for request in requests
        ]

    def _noisy_result(self, request: SearchRequest) -> SearchResult:
        useless = (
            passage.text
            for passage in self.engine.ranked(request.query, sys.maxsize)
            if not any(mentions(passage.text, answer) for answer in request.golden_answers)
        )
        return SearchResult(request.key, tuple(islice(useless, self.engine.topk)))
