"""The simulated search engine: a language model writes the documents, useful or noisy.

It is given a `generate` callable and knows neither jax nor how the text is made.
"""

from collections.abc import Callable, Sequence

from zerosearch_jax.search.engine import SearchRequest, SearchResult
from zerosearch_jax.search.http_client import SearchFailed
from zerosearch_jax.text.prompts import cut_documents, simulator_prompt


class SimulatedEngine:
    """Answers each request from its own question, gold answer and query (paper §3.2).

    Args:
      generate: `(prompts, keys) -> texts`; each text depends on its prompt and key alone. A
        `SearchFailed` in the place of a text fails that request.
      form: "finetuned" or "prompted", see `text.prompts.simulator_prompt`.
      topk: documents asked for.
    """

    name = "simulated"

    def __init__(
        self,
        generate: Callable[[list[str], list[tuple[int, int]]], Sequence[str | SearchFailed]],
        *,
        form: str,
        topk: int,
    ):
        self.generate = generate
        self.form = form
        self.topk = topk

    def search(self, requests: Sequence[SearchRequest]) -> list[SearchResult]:
        """One result a request. A text without any `Doc i:` line is a result with no documents."""
        prompts = [
            simulator_prompt(
                request.question,
                request.golden_answers[0],
                request.query,
                request.noisy,
                self.form,
                self.topk,
            )
            for request in requests
        ]
        texts = self.generate(prompts, [request.key for request in requests])
        return [
            SearchResult(request.key, (), text.reason)
            if isinstance(text, SearchFailed)
            else SearchResult(request.key, tuple(cut_documents(text, self.topk)))
            for request, text in zip(requests, texts, strict=True)
        ]
