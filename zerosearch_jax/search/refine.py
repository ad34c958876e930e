"""Document refinement: a model extracts the helpful information from an engine's documents.

This is Search-o1's "reason in documents" (arXiv 2501.05366, section 3) as an engine that wraps an
engine. The paper's prompt also contains the reasoning so far. A search request has none, so this
prompt contains the question, the query and the documents.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

from zerosearch_jax.search.engine import SearchEngine, SearchRequest, SearchResult
from zerosearch_jax.search.http_client import SearchFailed, failed_result
from zerosearch_jax.text.prompts import NO_HELPFUL_INFORMATION, refine_prompt
from zerosearch_jax.text.thoughts import without_thoughts


class RefiningEngine:
    """Search engine that replaces the documents of each of `engine`'s results by a refined one.

    Args:
      generate: `(prompts, keys) -> texts`, as for `SimulatedEngine`.
    """

    def __init__(
        self,
        engine: SearchEngine,
        generate: Callable[[list[str], list[tuple[int, int]]], Sequence[str | SearchFailed]],
    ):
        self.name = f"refined {engine.name}"
        self.engine = engine
        self.generate = generate

    def search(self, requests: Sequence[SearchRequest]) -> list[SearchResult]:
        """Returns one result per request; failed and empty results are returned unchanged.

        The model's thoughts are removed. An empty rest becomes `NO_HELPFUL_INFORMATION`.
        """
        by_key = {request.key: request for request in requests}
        results = self.engine.search(requests)
        found = [result for result in results if result.documents]
        prompts = [
            refine_prompt(by_key[r.key].question, by_key[r.key].query, r.documents) for r in found
        ]
        texts = self.generate(prompts, [result.key for result in found])
        refined = {
            result.key: failed_result(result.key, text)
            if isinstance(text, SearchFailed)
            else replace(
                result, documents=(without_thoughts(text).strip() or NO_HELPFUL_INFORMATION,)
            )
            for result, text in zip(found, texts, strict=True)
        }
        return [refined.get(result.key, result) for result in results]
