"""SFT examples for policies, and their tokenisation."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random

from zerosearch_jax.data.embedded.scripted_agent import Behaviours, ScriptedAgent, Segment
from zerosearch_jax.data.embedded.synthetic import synthetic_entities
from zerosearch_jax.data.embedded.world import (
    Entity,
    Question,
    corpus,
    load_entities,
    write_questions,
)
from zerosearch_jax.data.packing import TokenSequence
from zerosearch_jax.data.qa import QARow
from zerosearch_jax.search.bm25 import BM25Engine
from zerosearch_jax.text import prompts, thoughts
from zerosearch_jax.text.tokenizer import encode, encode_prompt, opens_thought

REAL_EVERY = 10  # Every tenth world of the transcripts is the real one.


def policy_transcripts(
    *,
    worlds: int,
    entities_per_world: int,
    questions_per_world: int,
    behaviours: Behaviours,
    topk: int,
    seed: int,
) -> list[list[Segment]]:
    """Writes transcripts of a scripted agent, with prompts, in random order.

    Args:
      worlds: number of worlds. Every tenth, from the first, is the real one; the others are
        synthetic.
      entities_per_world: entities of a synthetic world.
      questions_per_world: upper limit of the questions of one world.
      behaviours: probabilities of the agent's behaviours.
      topk: documents per search.
      seed: decides everything that is random.
    """
    examples = []
    for world in _worlds(worlds, entities_per_world, questions_per_world, topk, seed):
        agent = ScriptedAgent(world.entities, world.engine, behaviours, topk)
        for question in world.questions:
            prompt = Segment(prompts.policy_prompt(question.question), False)
            examples.append([prompt, *agent.transcript(question, world.rng)])
    Random(seed).shuffle(examples)
    return examples


def answer_examples(rows: Sequence[QARow]) -> list[list[Segment]]:
    """Examples that answer with the first gold answer, without a search: the SFT baseline."""
    return [
        [
            Segment(prompts.policy_prompt(row.question), False),
            Segment(f"{prompts.FORCED_ANSWER} {row.golden_answers[0]} </answer>", True),
        ]
        for row in rows
    ]


@dataclass(frozen=True)
class _World:
    """Entities, a sample of the questions on them, a search engine, and a random generator."""

    entities: Sequence[Entity]
    questions: list[Question]
    engine: BM25Engine
    rng: Random


def _worlds(count: int, entities: int, questions: int, topk: int, seed: int) -> Iterator[_World]:
    """Yields `count` worlds with at most `questions` questions each.

    Every tenth world, from the first, has the real entities, with new wording. The others have
    `entities` synthetic entities. Only entities of the train split are used, directly or as models
    of synthetic ones.
    """
    real = [entity for entity in load_entities() if entity.split == "train"]
    for number in range(count):
        world_seed = seed * 1_000_003 + number
        rng = Random(world_seed)
        members = real
        if number % REAL_EVERY:
            members = synthetic_entities(real, entities, world_seed)
        engine = BM25Engine(corpus(members, world_seed), topk)
        found = write_questions(members, "train", world_seed)
        yield _World(members, rng.sample(found, min(questions, len(found))), engine, rng)


def tokenise(
    segments: Sequence[Segment],
    tokenizer,
    *,
    system: str | None,
    inserted_weight: float,
    end_of_text: bool,
) -> TokenSequence:
    """Tokenises one example segment by segment, exactly as rollouts append tokens.

    Args:
      segments: the prompt first.
      system: system turn of the chat template ("" for the simulator); None: no system turn.
      inserted_weight: loss weight of the tokens that the model does not write.
      end_of_text: whether to append an end-of-text token with loss weight 1.

    Returns:
      Token ids and loss weights.
    """
    tokens = encode_prompt(tokenizer, segments[0].text, system)
    mask = [inserted_weight] * len(tokens)
    in_thought = opens_thought(tokenizer, system)
    for segment in segments[1:]:
        ids = encode(
            tokenizer, thoughts.continue_thought(segment.text) if in_thought else segment.text
        )
        in_thought = False
        tokens += ids
        mask += [1.0 if segment.by_policy else inserted_weight] * len(ids)
    if end_of_text:
        tokens.append(tokenizer.eos_token_id)
        mask.append(1.0)
    return TokenSequence(tokens, mask)
