"""Synthetic entities look like real ones, and their facts are new."""

from random import Random

from zerosearch_jax.data.embedded.synthetic import scramble, synthetic_entities
from zerosearch_jax.data.embedded.world import corpus, load_entities, write_questions

TRAIN = [entity for entity in load_entities() if entity.split == "train"]


def shape(text):
    """Maps letters and digits to their class and keeps other characters."""
    signs = []
    for c in text:
        if c.isascii() and c.isalpha():
            vowel = c.lower() in "aeiou"
            # `scramble` keeps q and x, which are in no class.
            signs.append(c if c.lower() in "qx" else ("V" if vowel else "C") + str(c.isupper()))
        else:
            signs.append("0" if c.isdigit() else c)
    return signs


def test_scramble_keeps_the_class_of_each_character():
    rng = Random(0)
    for text in ("N'Djamena", "Mount Fuji 3776", "14 July", ".td", "Xi'an-Quito"):
        for kept in (0.0, 0.5):
            assert shape(scramble(text, rng, kept)) == shape(text)
    assert scramble("Ouagadougou", rng, 0.0) != "Ouagadougou"


def test_scramble_keeps_words_sometimes_and_numbers_never():
    rng = Random(1)
    results = [scramble("Mount 37761234", rng, kept_words=1.0).split() for _ in range(20)]
    assert {word for word, _ in results} == {"Mount"}
    assert all(number != "37761234" for _, number in results)
    results = [scramble("Kilimanjaro", rng) for _ in range(400)]
    assert 0.2 < results.count("Kilimanjaro") / 400 < 0.4


def test_entities_are_deterministic_in_the_seed():
    assert synthetic_entities(TRAIN, 20, 3) == synthetic_entities(TRAIN, 20, 3)
    assert synthetic_entities(TRAIN, 20, 3) != synthetic_entities(TRAIN, 20, 4)


def test_entities_are_new_and_have_questions_and_passages():
    entities = synthetic_entities(TRAIN, 60, 5)
    assert len({entity.id for entity in entities}) == 60
    assert {entity.kind for entity in entities} == {entity.kind for entity in TRAIN}
    real = {entity.name for entity in load_entities()}
    assert sum(entity.name in real for entity in entities) == 0
    assert all(entity.split == "train" and not entity.value_aliases for entity in entities)
    questions = write_questions(entities, "train", 0)
    assert {len(question.hops) for question in questions} == {1, 2}
    assert {p.entity_id for p in corpus(entities)} <= {entity.id for entity in entities}
    # Most facts of a synthetic world do not occur in the real one.
    facts = [value for entity in entities for value in entity.facts.values()]
    known = {value for entity in TRAIN for value in entity.facts.values()}
    assert sum(value in known for value in facts) / len(facts) < 0.4
