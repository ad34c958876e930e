"""A scripted search agent that writes the transcripts for fine-tuning the tiny policies.

The agent answers questions with a real engine. By default it writes the right format and searches
well. `Behaviours` makes it guess, search for a bare name or for the wrong attribute, or answer a
two-hop question with the result of the first hop.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from zerosearch_jax.data.embedded.phrasing import ATTRIBUTES
from zerosearch_jax.data.embedded.world import Entity, Hop, Question
from zerosearch_jax.ranges import Share
from zerosearch_jax.search.bm25 import BM25Engine
from zerosearch_jax.text import prompts
from zerosearch_jax.text.matching import mentions


@dataclass(frozen=True)
class Segment:
    """Part of an SFT example; `by_policy` marks the text that the policy learns to write."""

    text: str
    by_policy: bool


@dataclass(frozen=True)
class Behaviours:
    """Probabilities of the scripted agent's behaviours, each drawn wherever it applies."""

    guess: Share = 0.0
    """Answers without a search, with a random value of the right kind."""
    vague: Share = 0.0
    """Searches for the bare subject."""
    wrong_attribute: Share = 0.0
    """Searches for a random attribute of the subject."""
    stop_early: Share = 0.0
    """Answers a two-hop question with the result of the first hop."""
    misread: Share = 0.0
    """Answers with another fact of the entity."""
    malformed: Share = 0.0
    """Writes an empty search before the first one."""
    retry: Share = 1.0
    """Searches again if the documents do not contain the fact."""


class ScriptedAgent:
    """Writes transcripts on one world with one engine.

    Args:
      entities: the world; questions may only be about these.
      engine: searches the world's passages.
      behaviours: probabilities of the agent's behaviours.
      topk: documents per search.
    """

    def __init__(
        self, entities: Sequence[Entity], engine: BM25Engine, behaviours: Behaviours, topk: int
    ):
        self.by_id = {entity.id: entity for entity in entities}
        self.engine = engine
        self.behaviours = behaviours
        self.topk = topk
        self.values = {}
        for entity in entities:
            for attribute, value in entity.facts.items():
                self.values.setdefault((entity.kind, attribute), []).append(value)

    def transcript(self, question: Question, rng: Random) -> list[Segment]:
        """Returns the segments of one episode, without the prompt."""
        behaviours = self.behaviours
        if rng.random() < behaviours.guess:
            guess = rng.choice(self._values_like(question.hops[-1]))
            return [_own("I know this.", "answer", guess)]
        segments = []
        known = ""
        last = len(question.hops) - 1
        for number, hop in enumerate(question.hops):
            if number == 0 and rng.random() < behaviours.malformed:
                segments += [_own("I need to search.", "search", "")]
                segments += [Segment(prompts.INVALID_ACTION, False)]
            found, turns = self._look_up(hop, known, rng)
            segments += turns
            if number == last or rng.random() < behaviours.stop_early:
                return [*segments, self._answer(hop, found, rng)]
            if not found:
                return [*segments, _own("I did not find it.", "answer", self._wrong(hop, rng))]
            known = f"The {hop.query} is {hop.answer}. "
        return segments

    def _look_up(self, hop: Hop, known: str, rng: Random) -> tuple[bool, list[Segment]]:
        """Searches for one hop; returns whether the documents contain its answer."""
        behaviours = self.behaviours
        draw = rng.random()
        wanted = hop.query
        if draw < behaviours.vague:
            thought, wanted = f"I look up {hop.subject}.", hop.subject
        elif draw < behaviours.vague + behaviours.wrong_attribute:
            noun = rng.choice(list(ATTRIBUTES[self.by_id[hop.entity_id].kind].values())).noun
            wanted = f"{noun} of {hop.subject}"
            thought = f"I need the {wanted}."
        else:
            thought = f"I need the {wanted}."
        segments = [_own(known + thought, "search", wanted), self._documents(wanted, hop, rng)]
        found = mentions(segments[-1].text, hop.answer)
        if not found and rng.random() < behaviours.retry:
            retry = _own(f"It is not there. I need the {hop.query}.", "search", hop.query)
            segments += [retry, self._documents(hop.query, hop, rng)]
            found = mentions(segments[-1].text, hop.answer)
        return found, segments

    def _documents(self, query: str, hop: Hop, rng: Random) -> Segment:
        passages = self.engine.ranked(query, 3 * self.topk)
        if rng.random() < 0.25:  # Like a noisy engine: no document contains the answer.
            passages = [p for p in passages if not mentions(p.text, hop.answer)]
        text = prompts.format_documents([p.text for p in passages[: self.topk]])
        return Segment(prompts.information_block(text), False)

    def _answer(self, hop: Hop, found: bool, rng: Random) -> Segment:
        if not found:
            return _own("I did not find it.", "answer", self._wrong(hop, rng))
        if rng.random() < self.behaviours.misread:
            wrong = self._wrong(hop, rng)
            return _own(f"The {hop.query} is {wrong}.", "answer", wrong)
        return _own(f"The {hop.query} is {hop.answer}.", "answer", hop.answer)

    def _wrong(self, hop: Hop, rng: Random) -> str:
        entity = self.by_id[hop.entity_id]
        known = [entity.facts[a] for a in ATTRIBUTES[entity.kind] if a in entity.facts]
        return rng.choice([value for value in known if value != hop.answer] or [entity.name])

    def _values_like(self, hop: Hop) -> list[str]:
        kind, attribute = self.by_id[hop.entity_id].kind, hop.attribute.removesuffix("^-1")
        return self.values[kind, attribute]


def _own(thought: str, tag: str, content: str) -> Segment:
    """Returns a turn of the agent: a thought, then a search or an answer."""
    return Segment(f"<think> {thought} </think>\n<{tag}> {content} </{tag}>", True)
