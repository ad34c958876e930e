"""Fine-tuning examples of policies, and examples as token sequences."""

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
from zerosearch_jax.text import prompts
from zerosearch_jax.text.tokenizer import encode, encode_prompt

REAL_EVERY = 10  # of the worlds of transcripts


def policy_transcripts(
    *,
    worlds: int,
    entities_per_world: int,
    questions_per_world: int,
    behaviours: Behaviours,
    topk: int,
    seed: int,
) -> list[list[Segment]]:
    """Transcripts, prompts included, over `_worlds` of which every tenth is the real one."""
    examples = []
    for world in _worlds(worlds, entities_per_world, questions_per_world, topk, seed):
        agent = ScriptedAgent(world.entities, world.engine, behaviours, topk)
        for question in world.questions:
            prompt = Segment(prompts.policy_prompt(question.question), False)
            examples.append([prompt, *agent.transcript(question, world.rng)])
    Random(seed).shuffle(examples)
    return examples


def answer_examples(rows: Sequence[QARow]) -> list[list[Segment]]:
    """Questions with their first gold answers, given at once: the SFT baseline of the field."""
    return [
        [
            Segment(prompts.policy_prompt(row.question), False),
            Segment(f"{prompts.FORCED_ANSWER} {row.golden_answers[0]} </answer>", True),
        ]
        for row in rows
    ]


@dataclass(frozen=True)
class _World:
    """Entities, a sample of the questions on them, an engine over them, and further draws."""

    entities: Sequence[Entity]
    questions: list[Question]
    engine: BM25Engine
    rng: Random


def _worlds(count: int, entities: int, questions: int, topk: int, seed: int) -> Iterator[_World]:
    """Worlds of `entities` made-up entities; every tenth, from the first, is the real one, told
    anew. Each has at most `questions` questions.

    Only entities of the train split are used, as themselves or as models of made-up ones.
    """
    real = [entity for entity in load_entities() if entity.split == "train"]
    for number in range(count):
        world_seed = seed * 1_000_003 + number
        rng = Random(world_seed)
        members = real
        if number % REAL_EVERY:
            members = synthetic_entities(real, entities, world_seed)
        engine = BM25Engine(corpus(members, world_seed), topk)
        asked = write_questions(members, "train", world_seed)
        yield _World(members, rng.sample(asked, min(questions, len(asked))), engine, rng)


def tokenise(
    segments: Sequence[Segment],
    tokenizer,
    *,
    system: str | None,
    inserted_weight: float,
    end_of_text: bool,
) -> TokenSequence:
    """One example's ids and loss weights, segment by segment, exactly as rollouts append them.

    Args:
      system: the system turn of a chat template (the simulator's is ""); None: without one.
      inserted_weight: loss weight of what the model would not write itself.
      end_of_text: whether the model is to end the text after the last segment.
    """
    tokens = encode_prompt(tokenizer, segments[0].text, system)
    mask = [inserted_weight] * len(tokens)
    for segment in segments[1:]:
        ids = encode(tokenizer, segment.text)
        tokens += ids
        mask += [1.0 if segment.by_policy else inserted_weight] * len(ids)
    if end_of_text:
        tokens.append(tokenizer.eos_token_id)
        mask.append(1.0)
    return TokenSequence(tokens, mask)
