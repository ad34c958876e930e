"""A fixed model that answers from documents: what searches and simulators are judged by."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
from ml_collections import ConfigDict

from zerosearch_jax.generate.generator import Generator
from zerosearch_jax.generate.sampling import GREEDY
from zerosearch_jax.parallel.mesh import make_mesh
from zerosearch_jax.rollout.scheduler import STOP_STRINGS
from zerosearch_jax.text import prompts
from zerosearch_jax.text.actions import parse_action
from zerosearch_jax.text.tokenizer import decode, encode, encode_prompt
from zerosearch_jax.training import factory


@dataclass(frozen=True)
class Reader:
    """A fixed model that answers, greedily, from documents that are put before it.

    It sees the policy's prompt, the documents between the information tags and the opening of a
    thought, and has one turn: a further search is no answer.

    Attributes:
      response_tokens: of its turn, at most.
      observation_tokens: of the documents; what is longer loses its end.
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
        """The answer to each question from the documents of its query; None: no answer."""
        shown = [self._tokens(*one) for one in zip(questions, queries, documents, strict=True)]
        answers = []
        for start in range(0, len(shown), self.generator.slots):
            batch = shown[start : start + self.generator.slots]
            slots = list(range(len(batch)))
            self.generator.start(slots, batch)
            turns = self.generator.decode(
                slots,
                key=jax.random.key(0),
                streams=[(start + slot, 0) for slot in slots],
                max_new_tokens=self.response_tokens,
                sampling=GREEDY,
            )
            for turn in turns:
                action = parse_action(decode(self.tokenizer, turn.tokens))
                answers.append(action.content if action.kind == "answer" else None)
        return answers

    def _tokens(self, question: str, query: str, documents: Sequence[str]) -> list[int]:
        text = encode(self.tokenizer, prompts.format_documents(documents))
        block = prompts.information_block(decode(self.tokenizer, text[: self.observation_tokens]))
        prompt = encode_prompt(self.tokenizer, prompts.policy_prompt(question))
        return prompt + encode(self.tokenizer, block + prompts.READER_OPENING.format(query=query))


def make_reader(config: ConfigDict, mesh_config: ConfigDict) -> Reader:
    """The reader of a `reader` section: model, generator and how long texts may be."""
    mesh = make_mesh(**mesh_config)
    model = factory.load_model(config.model, mesh, config.generator.dtype)
    return Reader(
        factory.make_generator(model, config.generator, mesh, STOP_STRINGS),
        model.tokenizer,
        response_tokens=config.response_tokens,
        observation_tokens=config.observation_tokens,
    )
