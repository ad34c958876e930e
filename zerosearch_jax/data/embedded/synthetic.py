"""Synthetic entities: real ones with scrambled letters and digits.

Nothing can be known about them, so a model must read the documents. Training on them teaches a
tiny model to copy strings that it has never seen.
"""

import re
from collections.abc import Sequence
from random import Random

from zerosearch_jax.data.embedded.world import ATTRIBUTES, Entity, load_entities
from zerosearch_jax.errors import UserError, shown

PREFIX = "synthetic:"
MAX_ENTITIES = 1_000_000

_CLASSES = (
    "aeiou",
    "bcdfghjklmnprstvwyz",
    "0123456789",
    "AEIOU",
    "BCDFGHJKLMNPRSTVWYZ",
)
_KEPT_WORDS = 0.3  # share of the words of a value ("Mount", "dollar") that are not scrambled


def scramble(text: str, rng: Random, kept_words: float = _KEPT_WORDS) -> str:
    """Replaces each letter and digit by a random one of its class, word by word.

    A word without digits is kept with probability `kept_words`.
    """
    return " ".join(
        word if rng.random() < kept_words and not any(c.isdigit() for c in word)
        else "".join(_replace(c, rng) for c in word)
        for word in text.split(" ")
    )  # fmt: skip


def _replace(character: str, rng: Random) -> str:
    for members in _CLASSES:
        if character in members:
            return rng.choice(members)
    return character


def synthetic_entities(models: Sequence[Entity], count: int, seed: int) -> list[Entity]:
    """Returns `count` entities of the train split that imitate random ones of `models`.

    The value of a fact is scrambled from that of a random model of the same kind.
    """
    rng = Random(seed)
    made = []
    for number in range(count):
        model = rng.choice(models)
        facts = dict(model.facts)
        for attribute in ATTRIBUTES[model.kind]:
            donors = [e for e in models if e.kind == model.kind and attribute in e.facts]
            if donors and (attribute in facts or rng.random() < 0.3):
                facts[attribute] = scramble(rng.choice(donors).facts[attribute], rng)
        name = scramble(model.name, rng, kept_words=0.0)
        # The id seeds the wording of passages and questions: another form changes all texts.
        made.append(Entity(f"made-up-{seed}-{number}", model.kind, name, (), facts, "train"))
    return made


def synthetic_numbers(name: str) -> tuple[int, int]:
    """Returns COUNT and SEED of "synthetic:COUNT:SEED", numbers of at most 18 digits.

    Raises:
      UserError: `name` does not have that form, or COUNT is not in 1 to `MAX_ENTITIES`.
    """
    matched = re.fullmatch(rf"{PREFIX}([0-9]{{1,18}}):([0-9]{{1,18}})", name)
    if not matched:
        raise UserError(f"{shown(name)} is not a synthetic world; write {PREFIX}COUNT:SEED")
    count, seed = map(int, matched.groups())
    if not 1 <= count <= MAX_ENTITIES:
        raise UserError(f"{name!r} has {count} entities; set COUNT from 1 to {MAX_ENTITIES}")
    return count, seed


def synthetic_world(name: str) -> tuple[list[Entity], int]:
    """Returns the entities of the world "synthetic:COUNT:SEED", and its seed.

    The entities imitate those of the train split. An entity whose name is already taken is left
    out, so that every question has one answer.

    Raises:
      UserError: as `synthetic_numbers`.
    """
    count, seed = synthetic_numbers(name)
    real = [entity for entity in load_entities() if entity.split == "train"]
    named = {entity.name: entity for entity in reversed(synthetic_entities(real, count, seed))}
    return list(reversed(named.values())), seed
