"""Made-up entities: real ones with scrambled letters and digits, so that nothing can be known of
them and a reader can only read. They teach a tiny model to copy what it has never seen."""

from collections.abc import Sequence
from random import Random

from zerosearch_jax.data.embedded.world import ATTRIBUTES, Entity, load_entities
from zerosearch_jax.errors import UserError

PREFIX = "made_up:"

_CLASSES = (
    "aeiou",
    "bcdfghjklmnprstvwyz",
    "0123456789",
    "AEIOU",
    "BCDFGHJKLMNPRSTVWYZ",
)
_KEPT_WORDS = 0.3  # share of a value's words ("Mount", "dollar") that stay as they are


def scramble(text: str, rng: Random, kept_words: float = _KEPT_WORDS) -> str:
    """`text` with each letter or digit replaced by one of its class, word by word."""
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
    """`count` entities that look like `models` and do not exist.

    Each fact's value is scrambled from that of a random model of the same kind.
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
        made.append(Entity(f"made-up-{seed}-{number}", model.kind, name, (), facts, "train"))
    return made


def synthetic_world(name: str) -> tuple[list[Entity], int]:
    """The entities of the world called "made_up:COUNT:SEED", and its seed.

    They are modelled on the train split's; those whose name another has already are left out, so
    that each question has one answer.

    Raises:
      UserError: the name is not of that form.
    """
    numbers = name.removeprefix(PREFIX).split(":")
    if not (name.startswith(PREFIX) and len(numbers) == 2 and all(n.isdecimal() for n in numbers)):
        raise UserError(f"{name!r} is not a made-up world; write {PREFIX}COUNT:SEED")
    count, seed = map(int, numbers)
    if count < 1:
        raise UserError(f"{name!r} has no entities; raise COUNT")
    real = [entity for entity in load_entities() if entity.split == "train"]
    named = {entity.name: entity for entity in reversed(synthetic_entities(real, count, seed))}
    return list(reversed(named.values())), seed
