"""Text completion with a `Generator`, as the simulated search engine uses it."""

from collections import deque
from collections.abc import Sequence

import jax

from zerosearch_jax.generate.generator import MIN_FINISHED_FRACTION, Generator, slots_by_replica
from zerosearch_jax.generate.sampling import Sampling
from zerosearch_jax.search.http_client import TooLong
from zerosearch_jax.text import thoughts
from zerosearch_jax.text.tokenizer import cut_text, decode, encode_prompt, opens_thought

_MARGIN_TOKENS = 16  # tokens may split where texts join or are cut


class TextGenerator:
    """Completes prompts; a slot that has finished takes the next prompt at once.

    Args:
      sampling: how tokens are drawn.
      max_new_tokens: longest completion.
      key: a typed PRNG key. A prompt with keys (a, b) samples from `key` folded with a and b.
    """

    def __init__(
        self,
        generator: Generator,
        tokenizer,
        *,
        sampling: Sampling,
        max_new_tokens: int,
        key: jax.Array,
    ):
        self.generator = generator
        self.tokenizer = tokenizer
        self.sampling = sampling
        self.max_new_tokens = max_new_tokens
        self.key = key

    def __call__(
        self, prompts: Sequence[str], keys: Sequence[tuple[int, int]]
    ) -> list[str | TooLong]:
        """Returns the completion of each prompt, given as the user turn with an empty system turn.

        If the chat template opens a thought, each completion begins with the template's `<think>`.
        A prompt that leaves no room in a slot gets `TooLong` in place of a completion, and the
        other prompts are completed.

        Args:
          keys: two numbers per prompt. A completion depends only on its prompt and keys.
        """
        encoded = [encode_prompt(self.tokenizer, prompt, system="") for prompt in prompts]
        opening = thoughts.OPEN if opens_thought(self.tokenizer, system="") else ""
        most = self.generator.max_tokens - 1
        texts: list[str | TooLong] = [
            opening
            if len(tokens) <= most
            else TooLong(f"too long: {len(tokens)} tokens, at most {most}")
            for tokens in encoded
        ]
        queue = deque(i for i, tokens in enumerate(encoded) if len(tokens) <= most)
        free = [deque(slots) for slots in slots_by_replica(self.generator)]
        active: dict[int, int] = {}  # slot -> index of its prompt
        while queue or active:
            new = {}
            # Take the replica with the most free slots, so that none is idle.
            while queue and any(free):
                new[max(free, key=len).popleft()] = queue.popleft()
            if new:
                self.generator.start(list(new), [encoded[i] for i in new.values()])
                self.generator.start_decoding(
                    list(new),
                    streams=[keys[i] for i in new.values()],
                    max_new_tokens=self.max_new_tokens,
                )
                active |= new
            # Without a waiting prompt, free slots have no use, so decode until all have stopped.
            stopped = self.generator.decode_until(
                key=self.key,
                sampling=self.sampling,
                min_finished_fraction=MIN_FINISHED_FRACTION if queue else 1.0,
            )
            for slot, generation in stopped.items():
                # An end token need not be a special token, which `decode` would leave out.
                written = generation.tokens[: -1 if generation.finish == "end" else None]
                texts[active.pop(slot)] += decode(self.tokenizer, written)
                free[self.generator.replica_of(slot)].append(slot)
        return texts

    def cut(self, text: str, prompt: str) -> str:
        """Returns the start of `text` that fits a slot with `prompt` and `max_new_tokens`.

        If `prompt` leaves no room, `text` is returned whole, so that its completion is `TooLong`.
        """
        used = len(encode_prompt(self.tokenizer, prompt, system="")) + self.max_new_tokens
        room = self.generator.max_tokens - used - _MARGIN_TOKENS
        return cut_text(self.tokenizer, text, room) if room > 0 else text
