"""Fixed model that answers from given documents; it measures searches and simulators."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax

from zerosearch_jax.generate.generator import Generator
from zerosearch_jax.generate.sampling import GREEDY
from zerosearch_jax.parallel.mesh import make_mesh
from zerosearch_jax.rollout.scheduler import STOP_STRINGS
from zerosearch_jax.text import prompts, thoughts
from zerosearch_jax.text.actions import parse_action
from zerosearch_jax.text.tokenizer import cut_text, decode, encode, encode_prompt, opens_thought
from zerosearch_jax.training import factory
from zerosearch_jax.training.job_configs import LabelingConfig, ReaderConfig
from zerosearch_jax.training.sections import MeshConfig


@dataclass(frozen=True)
class Reader:
    """Fixed model that answers questions greedily from given documents.

    Its prompt is the policy's prompt, the documents between the information tags, and the opening
    of a thought. It has one turn, so a further search counts as no answer.

    Attributes:
      response_tokens: most tokens of its turn.
      observation_tokens: most tokens of the documents; the rest is cut.
    """

    generator: Generator
    tokenizer: object
    response_tokens: int
    observation_tokens: int

    def __call__(
        self,
        questions: Sequence[str],
        queries: Sequence[str],
        documents: Sequence[Sequence[str]],
    ) -> list[str | None]:
        """Returns the answer to each question from the documents of its query, or None.

        A prompt that leaves no room in a slot, because of its question or query, has no answer.
        """
        rows = zip(questions, queries, documents, strict=True)
        token_rows = [self._prompt(*row) for row in rows]
        fitting = [i for i, t in enumerate(token_rows) if len(t) < self.generator.max_tokens]
        answers: list[str | None] = [None] * len(token_rows)
        for start in range(0, len(fitting), self.generator.slots):
            batch = fitting[start : start + self.generator.slots]
            slots = list(range(len(batch)))
            self.generator.start(slots, [token_rows[i] for i in batch])
            generations = self.generator.decode(
                slots,
                key=jax.random.key(0),
                streams=[(i, 0) for i in batch],
                max_new_tokens=self.response_tokens,
                sampling=GREEDY,
            )
            for i, generation in zip(batch, generations, strict=True):
                # The inserted opening began a thought.
                text = thoughts.OPEN + decode(self.tokenizer, generation.tokens)
                action = parse_action(text)
                answers[i] = action.content if action.kind == "answer" else None
        return answers

    def _prompt(self, question: str, query: str, documents: Sequence[str]) -> list[int]:
        text = prompts.format_documents(documents)
        cut = cut_text(self.tokenizer, text, self.observation_tokens)
        block = prompts.information_block(cut)
        prompt = encode_prompt(self.tokenizer, prompts.policy_prompt(question))
        text = block + prompts.reader_opening(query)
        if opens_thought(self.tokenizer):
            text = thoughts.continue_thought(text)
        return prompt + encode(self.tokenizer, text)


def make_reader(config: ReaderConfig | LabelingConfig, mesh_config: MeshConfig) -> Reader:
    """Builds the reader of a config section with `model`, `generator` and the token limits."""
    mesh = make_mesh(mesh_config.data, mesh_config.fsdp, mesh_config.tensor)
    model = factory.load_model(config.model, mesh, config.generator.dtype)
    return Reader(
        factory.make_generator(model, config.generator, mesh, STOP_STRINGS),
        model.tokenizer,
        response_tokens=config.response_tokens,
        observation_tokens=config.observation_tokens,
    )
