"""Transcripts that the tiny models are fine-tuned on.

A scripted agent walks through questions with a real engine. As the *base policy* it knows the
format and can read, but its search habits are poor: it guesses, searches for a bare name or the
wrong thing, answers with the bridge of a two-hop question. As the *collecting agent* of the
simulator's data (paper §3.2) it issues good and bad queries and keeps what the engine returned.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from zerosearch_jax.data.phrasing import ATTRIBUTES, mentions, padded
from zerosearch_jax.data.world import Entity, Hop, Passage, Question
from zerosearch_jax.search.bm25 import BM25Engine
from zerosearch_jax.text import prompts


@dataclass(frozen=True)
class Segment:
    """A stretch of an SFT example; the loss falls on what `by_policy` marks."""

    text: str
    by_policy: bool


@dataclass(frozen=True)
class Habits:
    """Probabilities of the scripted agent's choices, each drawn where it applies.

    Attributes:
      guess: answers at once with a value of the right kind that is not looked up.
      vague: searches for the bare subject.
      astray: searches for another attribute of the subject.
      stop_early: takes the answer of a two-hop question's first hop for the last.
      misread: answers with another fact from the documents.
      malformed: an empty search, then a good one.
      retry: searches once more when the documents do not hold the fact.
    """

    guess: float = 0.0
    vague: float = 0.0
    astray: float = 0.0
    stop_early: float = 0.0
    misread: float = 0.0
    malformed: float = 0.0
    retry: float = 1.0


class ScriptedAgent:
    """Writes transcripts over one world with one engine."""

    def __init__(self, entities: Sequence[Entity], engine: BM25Engine, habits: Habits, topk: int):
        self.by_id = {entity.id: entity for entity in entities}
        self.engine = engine
        self.habits = habits
        self.topk = topk
        self.values = {}
        for entity in entities:
            for attribute, value in entity.facts.items():
                self.values.setdefault((entity.kind, attribute), []).append(value)

    def transcript(self, question: Question, rng: Random) -> list[Segment]:
        """One episode's segments, without the prompt."""
        habits = self.habits
        if rng.random() < habits.guess:
            guess = rng.choice(self._values_like(question.hops[-1]))
            return [_own("I know this.", "answer", guess)]
        segments = []
        known = ""
        last = len(question.hops) - 1
        for number, hop in enumerate(question.hops):
            if number == 0 and rng.random() < habits.malformed:
                segments += [_own("I need to search.", "search", "")]
                segments += [Segment(prompts.INVALID_ACTION, False)]
            found, turns = self._look_up(hop, known, rng)
            segments += turns
            if number == last or rng.random() < habits.stop_early:
                return [*segments, self._answer(hop, found, rng)]
            if not found:
                return [*segments, _own("I did not find it.", "answer", self._wrong(hop, rng))]
            known = f"The {hop.query} is {hop.answer}. "
        return segments

    def _look_up(self, hop: Hop, known: str, rng: Random) -> tuple[bool, list[Segment]]:
        """Searches for one hop; returns whether the documents hold the answer."""
        habits = self.habits
        draw = rng.random()
        wanted = hop.query
        if draw < habits.vague:
            thought, wanted = f"I look up {hop.subject}.", hop.subject
        elif draw < habits.vague + habits.astray:
            noun = rng.choice(list(ATTRIBUTES[self.by_id[hop.entity_id].kind].values())).noun
            wanted = f"{noun} of {hop.subject}"
            thought = f"I need the {wanted}."
        else:
            thought = f"I need the {wanted}."
        segments = [_own(known + thought, "search", wanted), self._documents(wanted, hop, rng)]
        found = mentions(segments[-1].text, hop.answer)
        if not found and rng.random() < habits.retry:
            retry = _own(f"It is not there. I need the {hop.query}.", "search", hop.query)
            segments += [retry, self._documents(hop.query, hop, rng)]
            found = mentions(segments[-1].text, hop.answer)
        return found, segments

    def _documents(self, query: str, hop: Hop, rng: Random) -> Segment:
        passages = self.engine.ranked(query, 3 * self.topk)
        if rng.random() < 0.25:  # as a noisy engine would: nothing that holds the answer
            passages = [p for p in passages if not mentions(p.text, hop.answer)]
        text = prompts.format_documents([p.text for p in passages[: self.topk]])
        return Segment(prompts.information_block(text), False)

    def _answer(self, hop: Hop, found: bool, rng: Random) -> Segment:
        if not found:
            return _own("I did not find it.", "answer", self._wrong(hop, rng))
        if rng.random() < self.habits.misread:
            return _own(f"The {hop.query} is here.", "answer", self._wrong(hop, rng))
        return _own(f"The {hop.query} is {hop.answer}.", "answer", hop.answer)

    def _wrong(self, hop: Hop, rng: Random) -> str:
        entity = self.by_id[hop.entity_id]
        known = [entity.facts[a] for a in ATTRIBUTES[entity.kind] if a in entity.facts]
        return rng.choice([value for value in known if value != hop.answer] or [entity.name])

    def _values_like(self, hop: Hop) -> list[str]:
        kind, attribute = self.by_id[hop.entity_id].kind, hop.attribute.removesuffix("^-1")
        return self.values[kind, attribute]


def _own(thought: str, tag: str, content: str) -> Segment:
    return Segment(f"<think> {thought} </think>\n<{tag}> {content} </{tag}>", True)


def simulator_pairs(
    questions: Sequence[Question],
    entities: Sequence[Entity],
    engine: BM25Engine,
    topk: int,
    rng: Random,
) -> list[tuple[str, str]]:
    """(prompt, documents) pairs for the simulator, in its fine-tuned form.

    Every hop of every question is searched for with the good query and with one poor one.
    Useful: the engine's documents, for the good query with those first that state the hop's fact
    (`_facts_first`). Noisy: what the engine returns when it holds no passage that states the
    hop's answer or the question's. A pair with fewer than `topk` documents is left out.

    Args:
      entities: those that the questions are about.
    """
    kinds = {entity.id: entity.kind for entity in entities}
    pairs = []
    for question in questions:
        answer = question.golden_answers[0]
        for hop in question.hops:
            nouns = [a.noun for a in ATTRIBUTES[kinds[hop.entity_id]].values()]
            poor = rng.choice(
                [hop.subject, question.question, f"{rng.choice(nouns)} of {hop.subject}"]
            )
            for query in (hop.query, poor):
                ranked = engine.ranked(query, 20 + topk)
                useful = _facts_first(ranked[: 3 * topk], hop) if query == hop.query else ranked
                barren = [
                    p for p in ranked
                    if not mentions(p.text, hop.answer) and not mentions(p.text, answer)
                ]  # fmt: skip
                for noisy, passages in ((False, useful), (True, barren)):
                    documents = [p.text for p in passages[:topk]]
                    if len(documents) == topk:
                        prompt = prompts.simulator_prompt(
                            question.question, answer, query, noisy, "finetuned", topk
                        )
                        pairs.append((prompt, prompts.format_documents(documents)))
    return pairs


def _facts_first(passages: Sequence[Passage], hop: Hop) -> list[Passage]:
    """Those that state the hop's fact before the others, and the earlier in its text a passage
    gives the hop's answer, the earlier it comes; otherwise the given order."""
    attribute = hop.attribute.removesuffix("^-1")

    def place(passage: Passage) -> float:
        if passage.entity_id != hop.entity_id or attribute not in passage.attributes:
            return math.inf
        return padded(passage.text).index(padded(hop.answer))

    return sorted(passages, key=place)
