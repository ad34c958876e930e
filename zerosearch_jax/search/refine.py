"""Document refinement: a model reads an engine's documents and hands on what helps.

Search-o1's "reason in documents" (arXiv 2501.05366, section 3) as an engine around an engine. The
paper's request also holds the reasoning so far; a search request carries none, so here it holds
the question, the query and the documents. No jax here: the model is a `generate` callable.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

from zerosearch_jax.search.engine import SearchEngine, SearchRequest, SearchResult
from zerosearch_jax.text.prompts import NO_HELPFUL_INFORMATION, refine_prompt


class RefiningEngine:
    """Puts one refined document in the place of each of `engine`'s results.

    Args:
      generate: `(prompts, keys) -> texts`, as `SimulatedEngine`'s.
    """

    def __init__(
        self,
        engine: SearchEngine,
        generate: Callable[[list[str], list[tuple[int, int]]], list[str]],
    ):
        self.name = f"refined {engine.name}"
        self.engine = engine
        self.generate = generate

    def search(self, requests: Sequence[SearchRequest]) -> list[SearchResult]:
        """One result a request. What failed or found nothing is handed on as it is.

        A model that writes nothing has found nothing helpful.
        """
        asked = {request.key: request for request in requests}
        results = self.engine.search(requests)
        found = [result for result in results if result.documents]
        prompts = [
            refine_prompt(asked[r.key].question, asked[r.key].query, r.documents) for r in found
        ]
        texts = self.generate(prompts, [result.key for result in found])
        refined = {
            result.key: replace(result, documents=(text.strip() or NO_HELPFUL_INFORMATION,))
            for result, text in zip(found, texts, strict=True)
        }
        return [refined.get(result.key, result) for result in results]
