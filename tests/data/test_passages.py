"""Corpora: the embedded world's, a made-up world's, a file's."""

import json

import pytest

from zerosearch_jax.data.embedded.synthetic import synthetic_world
from zerosearch_jax.data.embedded.world import load_entities
from zerosearch_jax.data.passages import load_passages
from zerosearch_jax.data.qa import load_qa
from zerosearch_jax.errors import UserError
from zerosearch_jax.search.bm25 import BM25Engine
from zerosearch_jax.search.engine import SearchRequest


def test_a_files_title_is_shown_and_searched(tmp_path):
    path = tmp_path / "corpus.jsonl"
    rows = [
        {"id": 7, "contents": '"Chad"\nIts capital is N\'Djamena.'},
        {"id": "b", "contents": "Only a title"},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    passages = load_passages(str(path))
    assert [(p.id, p.title, p.text) for p in passages] == [
        ("7", "Chad", "Chad: Its capital is N'Djamena."),
        ("b", "Only a title", "Only a title"),
    ]
    (found,) = BM25Engine(passages, 1).search([SearchRequest(0, 0, "chad", "q", ("a",))])
    assert found.documents == ("Chad: Its capital is N'Djamena.",)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "no passages"),
        ('{"id": 1}\n', "row 1: expected"),
        ('{"id": 1, "contents": "a"}\n{"id": 2, "con', "row 2: expected"),
        ('{"id": 1, "contents": " "}\n', "row 1: key 'contents' is empty"),
    ],
)
def test_a_bad_file_is_refused_with_the_row(tmp_path, text, complaint):
    path = tmp_path / "corpus.jsonl"
    path.write_text(text)
    with pytest.raises(UserError, match=complaint):
        load_passages(str(path))


def test_an_unknown_corpus_is_refused():
    with pytest.raises(UserError, match="choose world, made_up:COUNT:SEED or an existing .jsonl"):
        load_passages("wrld")


def test_a_made_up_worlds_questions_are_answered_by_its_own_passages_alone():
    source = "made_up:40:5"
    rows = load_qa(source, "train", 60)
    assert len(rows) == 60 and {row.data_source for row in rows} == {source}
    texts = {p.text for p in load_passages(source)}
    entities, seed = synthetic_world(source)
    assert seed == 5
    assert len({e.name for e in entities}) == len(entities)  # a name has one owner
    real = {e.name for e in load_entities()}
    assert not real & {e.name for e in entities}
    held = sum(any(row.golden_answers[0] in text for text in texts) for row in rows)
    assert held == len(rows)


@pytest.mark.parametrize("name", ["made_up:", "made_up:3", "made_up:x:1", "made_up:0:1"])
def test_a_misspelt_made_up_world_is_refused(name):
    with pytest.raises(UserError, match="made-up world|no entities"):
        load_passages(name)


def test_a_made_up_world_has_only_training_questions():
    with pytest.raises(UserError, match="no split 'test'"):
        load_qa("made_up:5:1", "test")
