"""The embedded world: true facts about countries and elements, as passages and questions.

Every entity belongs to one split. Templates turn entities into passages and questions, so the same
functions serve synthetic entities.
"""

import hashlib
import json
from collections import Counter
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
from zerosearch_jax.files import parse_json
from zerosearch_jax.search.engine import Passage
from zerosearch_jax.text.matching import mentions, padded, words

FACTS_PATH = Path(__file__).with_name("facts.jsonl")
SPLITS = ("train", "validation", "test", "compositions")
MIN_WORDS, MAX_WORDS = 25, 35
# Words that engines ignore. A search cannot find a value made of them (indium's symbol is "In").
_UNSEARCHABLE = frozenset(
    "a an and are as at be but by for has have he i if in into is it its no not of on or so such "
    "that the their then there these they this to was what which who whose will with".split()
)
_WITHHELD_PAIRS = 0.15  # share of (inverse, final) attribute pairs reserved for "compositions"
_FACTS_PER_PASSAGE = (2, 2, 3)  # upper limits; one is drawn for each passage
_INVERSES_PER_FACT = 2  # two-hop questions per fact of an entity


@dataclass(frozen=True)
class Entity:
    """A country or an element, real or synthetic.

    Attributes:
      id: unique in the world, e.g. "country-cd".
      kind: a key of `ATTRIBUTES`.
      name: the ASCII name in passages and questions.
      aliases: other names.
      facts: attribute → value, ASCII and at most four words.
      split: "train", "validation" or "test".
      value_aliases: attribute → other correct spellings of its value.
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
    """One step to the answer of a question.

    Attributes:
      query: a good search query for this step.
      subject: the given entity's name, or the given value.
      attribute: a key of `ATTRIBUTES`. It ends in "^-1" if the value is given and the entity is
        the answer.
      answer: the result of the step.
      entity_id: the entity that has the attribute.
    """

    query: str
    subject: str
    attribute: str
    answer: str
    entity_id: str


@dataclass(frozen=True)
class Question:
    """A question with exactly one correct answer; `golden_answers` are its spellings."""

    id: str
    question: str
    golden_answers: tuple[str, ...]
    split: str
    hops: tuple[Hop, ...]


def _unit_interval(*key: object) -> float:
    """Hashes `key` to a number in [0, 1), the same on every machine."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return int.from_bytes(digest[:7], "big") / 2**56


def _rng(*key: object) -> Random:
    return Random(hashlib.sha256(repr(key).encode()).digest())


# ---- the facts file ------------------------------------------------------------------------


def dump_entities(entities: Sequence[Entity], provenance: Mapping[str, object]) -> bytes:
    """Returns the bytes of a facts file.

    The first line holds provenance, count and checksum. Every other line is one entity.
    """
    rows = "".join(json.dumps(asdict(e), sort_keys=True) + "\n" for e in entities)
    head = {"provenance": provenance, "rows": len(entities), "sha256": _checksum(rows)}
    return (json.dumps(head, sort_keys=True) + "\n" + rows).encode()


def _checksum(rows: str) -> str:
    return hashlib.sha256(rows.encode()).hexdigest()


def load_entities(path: str | Path = FACTS_PATH) -> tuple[Entity, ...]:
    """Reads all entities of a facts file.

    Raises:
      UserError: the file is missing, truncated or altered, or a line is not an entity.
    """
    try:
        text = Path(path).read_bytes().decode("ascii")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot read the facts file ({error})") from error
    head, _, rows = text.partition("\n")
    try:
        provenance = parse_json(head)
        count, checksum = provenance["rows"], provenance["sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: line 1: not the provenance line; restore the file or run build_facts"
        ) from error
    entities = [_parse(f"{path}: line {n}", row) for n, row in enumerate(rows.splitlines(), 2)]
    if len(entities) != count or _checksum(rows) != checksum:
        raise UserError(
            f"{path}: line {len(entities) + 1}: the file has {len(entities)} rows, line 1 says "
            f"{count}, and the checksum differs; restore the file or run build_facts"
        )
    return tuple(entities)


def _parse(where: str, row: str) -> Entity:
    try:
        raw = parse_json(row)
        aliases = {a: tuple(v) for a, v in raw.pop("value_aliases").items()}
        return Entity(**{**raw, "aliases": tuple(raw["aliases"]), "value_aliases": aliases})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{where}: not an entity ({error}); restore the file or run build_facts"
        ) from error


def assign_splits(entities: Sequence[Entity]) -> list[Entity]:
    """Assigns train, validation or test by a hash of the entity's id: about 70 / 10 / 20 %.

    A held-out entity moves to train if its name or alias occurs in a name or value of a train
    entity: "Guinea" cannot be held out while train texts mention "Papua New Guinea". This repeats
    until no such entity remains.
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
    """Writes passages of about 30 words that state each fact twice, in different phrasings.

    The last passage states no fact; a search for the bare name finds it first. No passage
    mentions another entity. The passages are deterministic in (seed, entity id, facts).
    """
    rng = _rng("passages", seed, entity.id)
    table = {a: v for a, v in ATTRIBUTES[entity.kind].items() if a in entity.facts}
    first = {a: rng.randrange(4) for a in table}
    groups: list[list[tuple[str, str]]] = []
    for round_ in range(2):
        group: list[tuple[str, str]] = []
        shuffled = rng.sample(sorted(table), len(table))
        size = rng.choice(_FACTS_PER_PASSAGE)
        for attribute in shuffled:
            text = table[attribute].statement(
                first[attribute] + round_, entity.name, entity.facts[attribute]
            )
            used = sum(len(t.split()) for _, t in group)
            if group and (len(group) == size or used + len(text.split()) > MAX_WORDS):
                groups.append(group)
                group, size = [], rng.choice(_FACTS_PER_PASSAGE)
            group.append((attribute, text))
        if group:
            groups.append(group)
    filled = [(_fill(entity, [text for _, text in group], rng), group) for group in groups]
    return [
        Passage(
            id=f"{entity.id}/{number}",
            entity_id=entity.id,
            title=entity.name,
            text=text,
            attributes=tuple(attribute for attribute, _ in group),
        )
        for number, (text, group) in enumerate([*filled, (_overview(entity), [])])
    ]


def _overview(entity: Entity) -> str:
    text = ""
    for sentence in OVERVIEW[entity.kind]:
        longer = f"{text} {capitalise(sentence.format(e=entity.name))}".strip()
        if len(longer.split()) <= MAX_WORDS:
            text = longer
    return text


def _fill(entity: Entity, sentences: list[str], rng: Random) -> str:
    """Adds filler sentences until there are enough words or no sentence fits."""
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
    """Returns the passages of all `entities`, in their order."""
    return [passage for entity in entities for passage in write_passages(entity, seed)]


# ---- questions -----------------------------------------------------------------------------


def withheld(inverse: str, final: str) -> bool:
    """Whether two-hop questions on this pair of attributes are reserved for "compositions"."""
    return _unit_interval("composition", inverse, final) < _WITHHELD_PAIRS


def write_questions(entities: Sequence[Entity], split: str, seed: int) -> list[Question]:
    """Writes one-hop and two-hop questions on the entities of `split`, in a fixed mixed order.

    "compositions" are two-hop questions on train entities whose pairs of attributes no other
    split uses. No question asks for a fact that the entity's name gives away.

    Args:
      entities: the whole world, to check that a value identifies one entity.
      split: one of `SPLITS`.
      seed: decides wording, pairs of attributes and order.

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
    """Sort key of a question. Any prefix of the sorted questions is a uniform random sample."""
    return _unit_interval("order", seed, question_id)


def _points_back(entity: Entity, attribute: str, owners: Mapping) -> bool:
    """Whether the value belongs to this entity only and a search can find it."""
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
    """Both phrasings in train, one of them in the other splits."""
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
    """Whether `text` contains an answer: "337 K" gives away the symbol of potassium."""
    return any(mentions(text, answer) for answer in answers)


def _two_hop(
    entity: Entity, askable: Sequence[str], inverses: Sequence[str], split: str, seed: int
) -> list[Question]:
    table, questions = ATTRIBUTES[entity.kind], []
    for final in askable:
        keep = split == "compositions"
        usable = [a for a in inverses if a != final and withheld(a, final) == keep]
        rng = _rng("two-hop", seed, entity.id, final)
        for inverse in rng.sample(usable, min(_INVERSES_PER_FACT, len(usable))):
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
