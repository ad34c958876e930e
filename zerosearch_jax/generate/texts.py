"""Prompts to texts with a generator: what the simulated search engine calls."""

from collections import deque
from collections.abc import Sequence

import jax

from zerosearch_jax.generate.generator import MIN_FINISHED_FRACTION, Generator, slots_by_replica
from zerosearch_jax.generate.sampling import Sampling
from zerosearch_jax.text.tokenizer import decode, encode_prompt


class TextGenerator:
    """Completes prompts; a slot that has finished takes the next prompt at once.

    Args:
      key: a typed PRNG key; a prompt with key (a, b) samples from `key` folded with both.
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

    def __call__(self, prompts: Sequence[str], keys: Sequence[tuple[int, int]]) -> list[str]:
        """The completion of each prompt (user turn; the system turn is empty)."""
        texts = [""] * len(prompts)
        queue = deque(range(len(prompts)))
        free = [deque(slots) for slots in slots_by_replica(self.generator)]
        writing: dict[int, int] = {}  # slot -> which prompt
        while queue or writing:
            new = {}
            while queue and any(free):  # where least is written, so that no replica is idle
                new[max(free, key=len).popleft()] = queue.popleft()
            if new:
                self.generator.start(
                    list(new),
                    [encode_prompt(self.tokenizer, prompts[i], system="") for i in new.values()],
                )
                self.generator.start_decoding(
                    list(new),
                    streams=[keys[i] for i in new.values()],
                    max_new_tokens=self.max_new_tokens,
                )
                writing |= new
            # With nobody to take a free slot, coming back early would bring nothing.
            stopped = self.generator.decode_until(
                key=self.key, sampling=self.sampling, share=MIN_FINISHED_FRACTION if queue else 1.0
            )
            for slot, generation in stopped.items():
                texts[writing.pop(slot)] = decode(self.tokenizer, generation.tokens)
                free[self.generator.replica_of(slot)].append(slot)
        return texts
