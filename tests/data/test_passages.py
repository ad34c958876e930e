"""Corpora of the embedded world, of synthetic worlds and of files."""

import json

import pytest

from zerosearch_jax.data.embedded.synthetic import synthetic_world
from zerosearch_jax.data.embedded.world import load_entities
from zerosearch_jax.data.passages import load_passages
from zerosearch_jax.data.qa import load_qa
from zerosearch_jax.errors import UserError
from zerosearch_jax.search.bm25 import BM25Engine
from zerosearch_jax.search.engine import SearchRequest


def test_the_title_of_a_passage_is_searched_and_shown(tmp_path):
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


def test_byte_order_mark_and_blank_lines_are_skipped(tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_text('\ufeff{"id": 1.50, "contents": "a"}\n\n{"id": 2, "contents": "b"}\n \n')
    assert [(p.id, p.text) for p in load_passages(str(path))] == [("1.50", "a"), ("2", "b")]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "no rows"),
        ('{"id": 1}\n', "row 1: expected"),
        ('{"id": 1, "contents": "a"}\n\n{"id": 2, "con', "row 3: not JSON"),
        ('{"id": null, "contents": "a"}\n', "row 1: key 'id' is None"),
        ('{"id": 1, "contents": " "}\n', "row 1: key 'contents' is empty"),
    ],
)
def test_an_invalid_file_is_refused_with_the_row(tmp_path, text, complaint):
    path = tmp_path / "corpus.jsonl"
    path.write_text(text)
    with pytest.raises(UserError, match=complaint):
        load_passages(str(path))


@pytest.mark.parametrize("source", ["wrld", "made_up:40:5"])
def test_an_unknown_source_is_refused_with_the_known_ones(source):
    for load in (load_passages, lambda source: load_qa(source, "train")):
        with pytest.raises(UserError, match=f"{source}.*world.*synthetic:COUNT:SEED.*jsonl"):
            load(source)


def test_passages_of_a_synthetic_world_answer_its_questions():
    source = "synthetic:40:5"
    rows = load_qa(source, "train", 60)
    assert len(rows) == 60 and {row.data_source for row in rows} == {source}
    texts = {p.text for p in load_passages(source)}
    entities, seed = synthetic_world(source)
    assert seed == 5
    assert len({e.name for e in entities}) == len(entities)  # Names are unique.
    real = {e.name for e in load_entities()}
    assert not real & {e.name for e in entities}
    assert all(any(row.golden_answers[0] in text for text in texts) for row in rows)


@pytest.mark.parametrize("name", [
    "synthetic:", "synthetic:3", "synthetic:x:1", "synthetic:0:1", "synthetic:-3:1",
    "synthetic:3:-1", f"synthetic:{'1' * 5000}:1", f"synthetic:3:{'1' * 5000}",
    "synthetic:99999999999:1",
])  # fmt: skip
def test_a_misspelt_synthetic_world_is_refused(name):
    with pytest.raises(UserError, match="synthetic:COUNT:SEED|set COUNT from"):
        load_passages(name)


def test_a_synthetic_world_has_only_a_train_split():
    with pytest.raises(UserError, match="no split 'test'"):
        load_qa("synthetic:5:1", "test")
