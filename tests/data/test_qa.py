"""Question sources: the embedded world and files of three formats, valid and broken."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from zerosearch_jax.data.embedded.world import SPLITS, load_entities, write_questions
from zerosearch_jax.data.embedded.world_tfds import load_questions, prepare
from zerosearch_jax.data.qa import QARow, load_qa
from zerosearch_jax.errors import UserError


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("tfds")


def test_the_tfds_dataset_equals_the_written_questions(data_dir, capsys):
    world = load_entities()
    for split in SPLITS:
        assert load_questions(split, data_dir) == write_questions(world, split, 0)
    assert [p.name for p in data_dir.iterdir()] == [prepare(data_dir).name]
    assert list(data_dir.rglob("*.array_record*"))
    assert capsys.readouterr().out == ""


def test_rows_of_the_embedded_world(data_dir):
    rows = load_qa("world", "test", 5, data_dir)
    expected = write_questions(load_entities(), "test", 0)[:5]
    assert rows == [QARow(q.id, q.question, q.golden_answers, "world") for q in expected]
    with pytest.raises(UserError, match="split 'dev'"):
        load_qa("world", "dev", None, data_dir)


def test_flashrag_jsonl(tmp_path):
    path = tmp_path / "nq.jsonl"
    rows = [
        {"id": "a", "question": " Who? ", "golden_answers": ["X", "Y"], "metadata": {}},
        {"question": "Where?", "golden_answers": ["Z"]},
    ]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    assert load_qa(str(path), "test") == [
        QARow("a", " Who? ", ("X", "Y"), "nq"),
        QARow("nq/test/2", "Where?", ("Z",), "nq"),
    ]
    assert len(load_qa(str(path), "test", 1)) == 1


def test_zerosearch_parquet(tmp_path):
    path = tmp_path / "train.parquet"
    reward = {"style": "rule", "ground_truth": {"target": ["B"]}}
    rows = [
        {"id": "1", "question": "P?", "golden_answers": ["A"], "data_source": "hotpotqa",
         "reward_model": reward},
        {"id": "2", "question": "Q?", "golden_answers": None, "data_source": "nq",
         "reward_model": reward},
    ]  # fmt: skip
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    assert load_qa(str(path), "train") == [
        QARow("1", "P?", ("A",), "hotpotqa"),
        QARow("2", "Q?", ("B",), "nq"),
    ]
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match="not a readable parquet file"):
        load_qa(str(path), "train")


def test_dpr_tables(tmp_path):
    tsv = tmp_path / "nq.tsv"
    tsv.write_text("who sang it\t['A, B', \"C's\"]\n")
    assert load_qa(str(tsv), "dev")[0].golden_answers == ("A, B", "C's")
    table = tmp_path / "trivia.csv"
    table.write_text('"who, then?","[""A"", \'B\']"\n')
    assert load_qa(str(table), "dev") == [QARow("trivia/dev/1", "who, then?", ("A", "B"), "trivia")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "", "a.jsonl: the file has no rows"),
        ("a.jsonl", '{"question": "q", "golden_answers": ["x"]}\n{"que', "row 2: not JSON"),
        ("a.jsonl", '{"golden_answers": ["x"]}\n', "row 1: key 'question' is missing"),
        ("a.jsonl", '{"question": "q"}\n', "row 1: key 'golden_answers'"),
        ("a.jsonl", '{"question": "q", "golden_answers": []}\n', "row 1: key 'golden_answers'"),
        ("a.jsonl", "[1]\n", "row 1: expected an object"),
        ("a.tsv", "only a question\n", "row 1: 1 columns"),
        ("a.tsv", "q\tParis\n", "row 1: key 'golden_answers': 'Paris' is not a list"),
        ("a.txt", "q", "not a data source"),
    ],
)
def test_invalid_files_are_refused_with_row_and_key(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        load_qa(str(path), "test")


def test_missing_and_undecodable_files_are_refused(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        load_qa(str(tmp_path / "none.jsonl"), "test")
    path = tmp_path / "latin.jsonl"
    path.write_bytes(b'{"question": "\xe9"}')
    with pytest.raises(UserError, match="not UTF-8"):
        load_qa(str(path), "test")
    with pytest.raises(UserError, match="limit 0"):
        load_qa("world", "test", 0)
