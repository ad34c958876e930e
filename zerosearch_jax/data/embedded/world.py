"""The embedded world: true facts of countries and elements, told as passages and asked about.

An entity belongs to one split. Passages and questions are made from entities by templates, so
the same functions serve made-up entities. This module knows no model, tokenizer or engine.
"""

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from random import Random

from zerosearch_jax.data.embedded.phrasing import (
    ATTRIBUTES,
    FILLERS,
    OVERVIEW,
    capitalise,
    guessable,
)
from zerosearch_jax.errors import UserError
from zerosearch_jax.search.engine import Passage
from zerosearch_jax.text.matching import mentions, padded, words

FACTS_PATH = Path(__file__).with_name("facts.jsonl")
SPLITS = ("train", "validation", "test", "compositions")
MIN_WORDS, MAX_WORDS = 25, 35
# Words that engines ignore; a value made of one (the symbol of indium) cannot be searched for.
_UNSEARCHABLE = frozenset(
    "a an and are as at be but by for has have he i if in into is it its no not of on or so such "
    "that the their then there these they this to was what which who whose will with".split()
)
_WITHHELD_PAIRS = 0.15  # share of (inverse, final) attribute pairs kept for "compositions"
_FACTS_A_PASSAGE = (2, 2, 3)  # at most; drawn for each passage
_INVERSES_A_FACT = 2  # two-hop questions for each fact of an entity


@dataclass(frozen=True)
class Entity:
    """A country or an element, real or made up.

    Attributes:
      id: unique in the world, e.g. "country-cd".
      kind: a key of `ATTRIBUTES`.
      name: as passages and questions write it, ASCII.
      aliases: other names.
      facts: attribute -> value, ASCII and at most four words.
      split: "train", "validation" or "test".
      value_aliases: attribute -> other right spellings of its value.
    """

    id: str
    kind: str
    name: str
    aliases: tuple[str, ...]
    facts: dict[str, str]
    split: str
    value_aliases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Hop:
    """One step to the answer: a good query, what it is about, what it should bring.

    `attribute` is a key of `ATTRIBUTES`, with "^-1" when the value is given and the entity is
    sought; `subject` is then the value.
    """

    query: str
    subject: str
    attribute: str
    answer: str
    entity_id: str


@dataclass(frozen=True)
class Question:
    """A question with exactly one right answer, in any of the `golden_answers` spellings."""

    id: str
    question: str
    golden_answers: tuple[str, ...]
    split: str
    hops: tuple[Hop, ...]


def _unit_interval(*key: object) -> float:
    """A number in [0, 1) that depends on `key` alone, on every machine."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return int.from_bytes(digest[:7], "big") / 2**56


def _rng(*key: object) -> Random:
    return Random(hashlib.sha256(repr(key).encode()).digest())


# ---- the facts file ------------------------------------------------------------------------


def dump_entities(entities: Sequence[Entity], provenance: Mapping[str, object]) -> bytes:
    """The facts file: a first line with provenance, count and checksum, then one line each."""
    rows = "".join(json.dumps(asdict(e), sort_keys=True) + "\n" for e in entities)
    head = {"provenance": provenance, "rows": len(entities), "sha256": _checksum(rows)}
    return (json.dumps(head, sort_keys=True) + "\n" + rows).encode()


def _checksum(rows: str) -> str:
    return hashlib.sha256(rows.encode()).hexdigest()


def load_entities(path: str | Path = FACTS_PATH) -> tuple[Entity, ...]:
    """All entities of a facts file.

    Raises:
      UserError: the file is missing, cut short, altered, or a line is not an entity.
    """
    try:
        text = Path(path).read_bytes().decode("ascii")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot read the facts file ({error})") from error
    head, _, rows = text.partition("\n")
    try:
        count, checksum = json.loads(head)["rows"], json.loads(head)["sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: line 1: not the provenance line; restore the file or run build_facts"
        ) from error
    entities = [_parse(f"{path}: line {n}", row) for n, row in enumerate(rows.splitlines(), 2)]
    if len(entities) != count or _checksum(rows) != checksum:
        raise UserError(
            f"{path}: line {len(entities) + 1}: {len(entities)} rows where line 1 promises {count}"
            " and their checksum differs; the file was cut or altered: restore it"
        )
    return tuple(entities)


def _parse(where: str, row: str) -> Entity:
    try:
        raw = json.loads(row)
        aliases = {a: tuple(v) for a, v in raw.pop("value_aliases").items()}
        return Entity(**{**raw, "aliases": tuple(raw["aliases"]), "value_aliases": aliases})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{where}: not an entity ({error}); the file was cut or altered") from error


def assign_splits(entities: Sequence[Entity]) -> list[Entity]:
    """Entities with a split from a hash of their id: about 70 / 10 / 20 %.

    A held-out entity whose name or alias occurs in a name or value of a train entity is moved
    to train, until none is left: "Guinea" cannot be held out while "Papua New Guinea" is read.
    """

    def draw(entity_id: str) -> str:
        u = _unit_interval("split", entity_id)
        return "test" if u < 0.21 else "validation" if u < 0.315 else "train"

    splits = {e.id: draw(e.id) for e in entities}
    pools = {e.id: " | ".join(_strings(e)) for e in entities}
    changed = True
    while changed:
        train_text = padded(" | ".join(p for i, p in pools.items() if splits[i] == "train"))
        moved = [
            e.id
            for e in entities
            if splits[e.id] != "train"
            and any(padded(n) in train_text for n in (e.name, *e.aliases))
        ]
        splits.update(dict.fromkeys(moved, "train"))
        changed = bool(moved)
    return [replace(e, split=splits[e.id]) for e in entities]


def _strings(entity: Entity) -> Iterable[str]:
    yield from (entity.name, *entity.aliases, *entity.facts.values())
    for aliases in entity.value_aliases.values():
        yield from aliases


# ---- passages ------------------------------------------------------------------------------


def write_passages(entity: Entity, seed: int) -> list[Passage]:
    """Passages of about 30 words that state each fact twice, in different phrasings,
    and one passage that states none, which a query of the name alone finds first.

    The same (seed, entity id, facts) gives the same passages. Only `entity` is mentioned.
    """
    rng = _rng("passages", seed, entity.id)
    table = {a: v for a, v in ATTRIBUTES[entity.kind].items() if a in entity.facts}
    first = {a: rng.randrange(4) for a in table}
    groups: list[list[tuple[str, str]]] = []
    for round_ in range(2):
        order = rng.sample(sorted(table), len(table))
        group: list[tuple[str, str]] = []
        size = rng.choice(_FACTS_A_PASSAGE)
        for attribute in order:
            text = table[attribute].statement(
                first[attribute] + round_, entity.name, entity.facts[attribute]
            )
            used = sum(len(t.split()) for _, t in group)
            if group and (len(group) == size or used + len(text.split()) > MAX_WORDS):
                groups.append(group)
                group, size = [], rng.choice(_FACTS_A_PASSAGE)
            group.append((attribute, text))
        if group:
            groups.append(group)
    told = [(_fill(entity, [text for _, text in group], rng), group) for group in groups]
    return [
        Passage(
            id=f"{entity.id}/{number}",
            entity_id=entity.id,
            title=entity.name,
            text=text,
            attributes=tuple(attribute for attribute, _ in group),
        )
        for number, (text, group) in enumerate([*told, (_overview(entity), [])])
    ]


def _overview(entity: Entity) -> str:
    text = ""
    for sentence in OVERVIEW[entity.kind]:
        longer = f"{text} {capitalise(sentence.format(e=entity.name))}".strip()
        if len(longer.split()) <= MAX_WORDS:
            text = longer
    return text


def _fill(entity: Entity, sentences: list[str], rng: Random) -> str:
    """Adds filler sentences until there are enough words, or none fits any more."""
    fillers = [
        capitalise(text.format(e=entity.name, **entity.facts))
        for needs, text in FILLERS[entity.kind]
        if not needs or needs in entity.facts
    ]
    rng.shuffle(fillers)
    text = " ".join(sentences)
    for filler in fillers:
        total = len(text.split())
        if total < MIN_WORDS and total + len(filler.split()) <= MAX_WORDS:
            text = f"{filler} {text}" if rng.random() < 0.5 else f"{text} {filler}"
    return text


def corpus(entities: Sequence[Entity], seed: int = 0) -> list[Passage]:
    """The passages of all `entities`, in their order."""
    return [passage for entity in entities for passage in write_passages(entity, seed)]


# ---- questions -----------------------------------------------------------------------------


def withheld(inverse: str, final: str) -> bool:
    """Whether two-hop questions by this pair of attributes are kept for "compositions"."""
    return _unit_interval("composition", inverse, final) < _WITHHELD_PAIRS


def write_questions(entities: Sequence[Entity], split: str, seed: int) -> list[Question]:
    """One-hop and two-hop questions on the entities of `split`, in a fixed mixed order.

    `entities` is the whole world, so that a value which should name one entity can be checked
    against all. "compositions" asks train entities two-hop questions by pairs of attributes
    that no other split uses. A fact that its entity's name gives away is not asked.

    Raises:
      UserError: unknown split.
    """
    if split not in SPLITS:
        raise UserError(f"split {split!r}: choose one of {', '.join(SPLITS)}")
    owners = Counter((e.kind, a, " ".join(words(v))) for e in entities for a, v in e.facts.items())
    home = "train" if split == "compositions" else split
    questions = []
    for entity in entities:
        if entity.split != home:
            continue
        askable = [
            a
            for a in ATTRIBUTES[entity.kind]
            if a in entity.facts
            and not any(guessable(entity.name, answer) for answer in _answers(entity, a))
        ]
        inverses = [a for a in askable if _points_back(entity, a, owners)]
        if split != "compositions":
            questions += [q for a in askable for q in _one_hop(entity, a, split, seed)]
        questions += _two_hop(entity, askable, inverses, split, seed)
    return sorted(questions, key=lambda q: order(seed, q.id))


def order(seed: int, question_id: str) -> float:
    """Sort key of a question: any first part of the sorted questions is a fair sample of all."""
    return _unit_interval("order", seed, question_id)


def _points_back(entity: Entity, attribute: str, owners: Mapping) -> bool:
    """Whether the value belongs to this entity alone and an engine can look it up."""
    value = words(entity.facts[attribute])
    return (
        ATTRIBUTES[entity.kind][attribute].inverse is not None
        and owners[entity.kind, attribute, " ".join(value)] == 1
        and not set(value) <= _UNSEARCHABLE
    )


def _answers(entity: Entity, attribute: str) -> tuple[str, ...]:
    value, unit = entity.facts[attribute], ATTRIBUTES[entity.kind][attribute].unit
    aliases = entity.value_aliases.get(attribute, ())
    return tuple(dict.fromkeys((value, *([value + unit] if unit else []), *aliases)))


def _forward(entity: Entity, attribute: str) -> Hop:
    query = ATTRIBUTES[entity.kind][attribute].query(entity.name)
    return Hop(query, entity.name, attribute, entity.facts[attribute], entity.id)


def _one_hop(entity: Entity, attribute: str, split: str, seed: int) -> list[Question]:
    """Both phrasings for train, one of them elsewhere."""
    noun, answers = ATTRIBUTES[entity.kind][attribute].noun, _answers(entity, attribute)
    texts = [f"What is the {noun} of {entity.name}?", f"Which {noun} does {entity.name} have?"]
    picks = range(2) if split == "train" else [_rng("ask", seed, entity.id, attribute).randrange(2)]
    hops = (_forward(entity, attribute),)
    return [
        Question(f"{entity.id}/{attribute}/{i}", texts[i], answers, split, hops)
        for i in picks
        if not _gives_away(texts[i], answers)
    ]


def _gives_away(text: str, answers: Iterable[str]) -> bool:
    """Whether an answer stands in the question: "337 K" is no way to ask for potassium's symbol."""
    return any(mentions(text, answer) for answer in answers)


def _two_hop(
    entity: Entity, askable: Sequence[str], inverses: Sequence[str], split: str, seed: int
) -> list[Question]:
    table, questions = ATTRIBUTES[entity.kind], []
    for final in askable:
        keep = split == "compositions"
        usable = [a for a in inverses if a != final and withheld(a, final) == keep]
        rng = _rng("two-hop", seed, entity.id, final)
        for inverse in rng.sample(usable, min(_INVERSES_A_FACT, len(usable))):
            value = entity.facts[inverse]
            query = table[inverse].inverse.format(v=value)
            texts = [
                f"What is the {table[final].noun} of the {query}?",
                f"Which {table[final].noun} does the {query} have?",
            ]
            text, answers = texts[rng.randrange(2)], _answers(entity, final)
            if _gives_away(text, answers):
                continue
            bridge = Hop(query, value, f"{inverse}^-1", entity.name, entity.id)
            questions.append(
                Question(
                    id=f"{entity.id}/{inverse}>{final}",
                    question=text,
                    golden_answers=answers,
                    split=split,
                    hops=(bridge, _forward(entity, final)),
                )
            )
    return questions


def counts(questions: Iterable[Question]) -> dict[str, int]:
    """Number of questions by "split/hops", for people."""
    found: dict[str, int] = defaultdict(int)
    for q in questions:
        found[f"{q.split}/{len(q.hops)}-hop"] += 1
    return dict(found)
