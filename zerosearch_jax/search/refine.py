"""Document refinement: a model extracts the helpful information from an engine's documents.

This is Search-o1's "reason in documents" (arXiv 2501.05366, section 3) as an engine that wraps an
engine. The paper's prompt also contains the reasoning so far. A search request has none, so this
prompt contains the question, the query and the documents.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from zerosearch_jax.search.engine import SearchEngine, SearchRequest, SearchResult
from zerosearch_jax.search.http_client import SearchFailed, failed_result
from zerosearch_jax.text.prompts import NO_HELPFUL_INFORMATION, format_documents, refine_prompt
from zerosearch_jax.text.thoughts import without_thoughts


class Refiner(Protocol):
    """The model that refines documents, such as a `generate.texts.TextGenerator`."""

    def __call__(
        self, prompts: list[str], keys: list[tuple[int, int]]
    ) -> Sequence[str | SearchFailed]:
        """Completes the prompts, like `generate` of `SimulatedEngine`."""
        ...

    def cut(self, text: str, prompt: str) -> str:
        """Returns the start of `text` that fits the model next to `prompt` and its completion."""
        ...


class RefiningEngine:
    """Search engine that replaces the documents of each result of `engine` by a refined one."""

    def __init__(self, engine: SearchEngine, refiner: Refiner):
        self.name = f"refined {engine.name}"
        self.engine = engine
        self.refiner = refiner

    def search(self, requests: Sequence[SearchRequest]) -> list[SearchResult]:
        """Returns one result per request; failed and empty results are returned unchanged.

        Documents that are too long for the model are cut to fit. The model's thoughts are removed.
        An empty rest becomes `NO_HELPFUL_INFORMATION`.
        """
        by_key = {request.key: request for request in requests}
        results = self.engine.search(requests)
        found = [result for result in results if result.documents]
        prompts = [self._prompt(by_key[result.key], result) for result in found]
        texts = self.refiner(prompts, [result.key for result in found])
        refined = {
            result.key: failed_result(result.key, text)
            if isinstance(text, SearchFailed)
            else replace(
                result, documents=(without_thoughts(text).strip() or NO_HELPFUL_INFORMATION,)
            )
            for result, text in zip(found, texts, strict=True)
        }
        return [refined.get(result.key, result) for result in results]

    def _prompt(self, request: SearchRequest, result: SearchResult) -> str:
        empty = refine_prompt(request.question, request.query, "")
        documents_text = self.refiner.cut(format_documents(result.documents), empty)
        return refine_prompt(request.question, request.query, documents_text)
