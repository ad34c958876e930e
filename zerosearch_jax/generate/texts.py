"""Prompts to texts with a generator: what the simulated search engine calls."""

from collections.abc import Sequence

import jax

from zerosearch_jax.generate.generator import Generator
from zerosearch_jax.generate.sampling import Sampling
from zerosearch_jax.text.tokenizer import decode, encode_prompt


class TextGenerator:
    """Completes prompts, in waves of the generator's slots.

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
        texts = []
        for start in range(0, len(prompts), self.generator.slots):
            wave = prompts[start : start + self.generator.slots]
            slots = range(len(wave))
            self.generator.start(
                slots, [encode_prompt(self.tokenizer, prompt, system="") for prompt in wave]
            )
            generations = self.generator.decode(
                slots,
                key=self.key,
                streams=keys[start : start + len(wave)],
                max_new_tokens=self.max_new_tokens,
                sampling=self.sampling,
            )
            texts += [decode(self.tokenizer, generation.tokens) for generation in generations]
        return texts
