"""Client of a simulator on an OpenAI-compatible server (vLLM, SGLang, or ours)."""

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from zerosearch_jax.search.http_client import JsonClient, SearchFailed, closed_on_interrupt

_PATH = "/v1/chat/completions"


class ChatClient:
    """Callable that completes prompts on a chat server; `generate` of a `SimulatedEngine`.

    Args:
      client: client of the server, with an address without `/v1` and any API key in its headers.
      model: name of the simulator on the server.
      temperature: sampling temperature; 0 is greedy.
      top_p: nucleus of sampling, in (0, 1].
      max_tokens: maximum number of tokens in a reply.
      workers: maximum number of concurrent requests.
      seed: seed of the run. It determines a request's seed together with the request's key, so a
        repeated request sends the same seed. The server may not guarantee the same text.
    """

    def __init__(
        self,
        client: JsonClient,
        *,
        model: str,
        temperature: float,
        top_p: float,
        max_tokens: int,
        workers: int,
        seed: int,
    ):
        self.client = client
        self.model = model
        self.temperature = temperature
        self.top_p = top_p
        self.max_tokens = max_tokens
        self.workers = workers
        self.seed = seed

    def __call__(
        self, prompts: Sequence[str], keys: Sequence[tuple[int, int]]
    ) -> list[str | SearchFailed]:
        """Returns the completion of each prompt, or its `SearchFailed`, in order.

        A prompt is the user turn; the system turn is empty.
        """
        with ThreadPoolExecutor(self.workers) as pool, closed_on_interrupt():
            return list(pool.map(self._complete, zip(prompts, keys, strict=True)))

    def _complete(self, request: tuple[str, tuple[int, int]]) -> str | SearchFailed:
        prompt, key = request
        payload = {
            "model": self.model,
            "messages": [
                {"role": "system", "content": ""},
                {"role": "user", "content": prompt},
            ],
            "temperature": self.temperature,
            "top_p": self.top_p,
            "max_tokens": self.max_tokens,
            "seed": request_seed(self.seed, key),
        }
        try:
            reply = self.client.post(_PATH, payload)
        except SearchFailed as failure:
            return failure
        text = completion_text(reply)
        if text is None:
            trouble = 'the reply has no text "choices[0].message.content"'
            return self.client.wrong_shape(_PATH, trouble)
        return text


def completion_text(reply: object) -> str | None:
    """Returns the text of a chat completion, or None if it has none.

    The content is a text, or a list of parts whose texts are joined. It is null in a refusal, in a
    tool call, or if the model's thoughts used up `max_tokens`. A text that was cut at `max_tokens`
    is returned.
    """
    try:
        content = reply["choices"][0]["message"]["content"]
        if isinstance(content, list):
            return "".join(part["text"] for part in content if part["type"] == "text")
    except (TypeError, KeyError, IndexError):
        return None
    return content if isinstance(content, str) else None


def request_seed(seed: int, key: tuple[int, int]) -> int:
    """Returns a seed in [0, 2^31) for the request (episode, turn) of a run with `seed`."""
    text = f"chat/{int(seed)}/{int(key[0])}/{int(key[1])}"
    digest = hashlib.blake2b(text.encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") >> 1
