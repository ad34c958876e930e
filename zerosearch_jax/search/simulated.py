"""The simulated search engine: a language model writes useful or noisy documents."""

from collections.abc import Callable, Sequence

from zerosearch_jax.search.engine import SearchRequest, SearchResult
from zerosearch_jax.search.http_client import SearchFailed, failed_result
from zerosearch_jax.text.prompts import cut_documents, simulator_prompt


class SimulatedEngine:
    """Search engine that writes documents from question, gold answer and query (paper §3.2).

    Args:
      generate: `(prompts, keys) -> texts`; each text depends only on its prompt and key. A
        `SearchFailed` in place of a text makes that request's result a failure. A prompt with a
        long query may be `TooLong` for the model, which fails only this search.
      form: "finetuned" or "prompted", see `text.prompts.simulator_prompt`.
      topk: number of documents to request.
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
        """Returns one result per request, in order.

        A result has no documents if its text has no `Doc i:` line.
        """
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
            failed_result(request.key, text)
            if isinstance(text, SearchFailed)
            else SearchResult(request.key, tuple(cut_documents(text, self.topk)))
            for request, text in zip(requests, texts, strict=True)
        ]
