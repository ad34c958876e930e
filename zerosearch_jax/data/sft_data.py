"""Fine-tuning examples of the embedded world as token sequences: the tiny base policy's and the
tiny simulator's."""

from collections.abc import Sequence
from random import Random

from zerosearch_jax.data.made_up import make_up_entities
from zerosearch_jax.data.transcripts import Habits, ScriptedAgent, Segment, simulator_pairs
from zerosearch_jax.data.world import Entity, corpus, load_entities, write_questions
from zerosearch_jax.rollout.packing import TokenSequence
from zerosearch_jax.search.bm25 import BM25Engine
from zerosearch_jax.text import prompts
from zerosearch_jax.text.tokenizer import encode, encode_prompt


def policy_transcripts(
    *,
    worlds: int,
    entities_per_world: int,
    questions_per_world: int,
    habits: Habits,
    topk: int,
    seed: int,
) -> list[list[Segment]]:
    """Transcripts, prompts included, over made-up worlds and (every tenth world) the real one.

    Only entities of the train split are used, as themselves or as models of made-up ones.
    """  # fmt: skip
    real = [entity for entity in load_entities() if entity.split == "train"]
    examples = []
    for number in range(worlds):
        world_seed = seed * 1_000_003 + number
        rng = Random(world_seed)
        entities = real
        if number % 10:
            entities = make_up_entities(real, entities_per_world, world_seed)
        agent = ScriptedAgent(
            entities, BM25Engine(corpus(entities, world_seed), topk), habits, topk
        )
        questions = write_questions(entities, "train", world_seed)
        for question in rng.sample(questions, min(questions_per_world, len(questions))):
            prompt = Segment(prompts.policy_prompt(question.question), False)
            examples.append([prompt, *agent.transcript(question, rng)])
    Random(seed).shuffle(examples)
    return examples


def simulator_examples(*, topk: int, seed: int) -> list[list[Segment]]:
    """The simulator's (prompt, documents) pairs over the real train entities."""
    entities = load_entities()
    known: list[Entity] = [entity for entity in entities if entity.split == "train"]
    rng = Random(seed)
    pairs = simulator_pairs(
        write_questions(entities, "train", 0), BM25Engine(corpus(known), topk), topk, rng
    )
    rng.shuffle(pairs)
    return [[Segment(prompt, False), Segment(" " + documents, True)] for prompt, documents in pairs]


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
