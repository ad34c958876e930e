"""Question sources: the embedded world and files of three formats, valid and broken."""

import csv
import io
import json
import shutil

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
        {"id": "1", "question": "P?", "golden_answers": ["Aa"], "data_source": "hotpotqa",
         "reward_model": reward},
        {"id": "2", "question": "Q?", "golden_answers": None, "data_source": "nq",
         "reward_model": reward},
    ]  # fmt: skip
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    assert load_qa(str(path), "train") == [
        QARow("1", "P?", ("Aa",), "hotpotqa"),
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
    table.write_text('"who, then?","[""Aa"", \'B\']"\n')
    assert load_qa(str(table), "dev") == [
        QARow("trivia/dev/1", "who, then?", ("Aa", "B"), "trivia")
    ]


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
        ("a.txt", "q", "not a data source"),
    ],
)
def test_invalid_files_are_refused_with_row_and_key(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        load_qa(str(path), "test")


BOM = "\ufeff"
ANSWERS = [
    # golden answers as JSON, as a cell of a table, and as loaded
    ('["Paris", "City of Light"]', "['Paris', 'City of Light']", ("Paris", "City of Light")),
    ('"[\'Paris\', \\"City\\"]"', '["Paris", "City"]', ("Paris", "City")),
    ('"Paris"', "Paris", ("Paris",)),
    ("5", "5", ("5",)),
    ("1.50", "1.50", ("1.50",)),
    ('[-7, 2.50, "x", 1e3]', "[-7, 2.50, 'x', 1e3]", ("-7", "2.50", "x", "1e3")),
    ('"[sic] Paris"', "[sic] Paris", ("[sic] Paris",)),
    ('["C\'s, \\"D\\""]', "['C\\'s, \"D\"']", ('C\'s, "D"',)),
    ('["The", "!", "Lima"]', "['The', '!', 'Lima']", ("Lima",)),
    ('["北京", "。"]', "['北京', '。']", ("北京",)),
]


def _write_as(path, rows):
    """Writes (question, answers as JSON, answers as a cell) in the file's format."""
    if path.suffix == ".jsonl":
        lines = [f'{{"question": {json.dumps(q)}, "golden_answers": {a}}}' for q, a, _ in rows]
    elif path.suffix in (".tsv", ".csv"):
        text = io.StringIO()
        delimiter = "\t" if path.suffix == ".tsv" else ","
        csv.writer(text, delimiter=delimiter, lineterminator="\n").writerows(
            (q, cell) for q, _, cell in rows
        )
        lines = text.getvalue().splitlines()
    else:  # a parquet column has one type, so each row is a text or a list of texts
        table = [{"question": q, "golden_answers": cell} for q, _, cell in rows]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), path)
        return
    path.write_text(BOM + "\n\n".join(lines) + "\n\n", encoding="utf-8")


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".tsv", ".csv"])
def test_the_same_rows_load_alike_from_every_format(tmp_path, suffix, capsys):
    path = tmp_path / f"data{suffix}"
    questions = ['who, "then"?', "wo?", "日本?"]
    rows = [(questions[i % 3], *answers[:2]) for i, answers in enumerate(ANSWERS)]
    _write_as(path, rows)
    loaded = load_qa(str(path), "test")
    expected = [(q, answers[2]) for (q, *_), answers in zip(rows, ANSWERS, strict=True)]
    assert [(row.question, row.golden_answers) for row in loaded] == expected
    assert "3 gold answers without a word dropped" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("value", "loaded"), [(5, "5"), (2.5, "2.5"), (["x", "y"], "x y"), ([3, 4], "3 4")]
)
def test_parquet_columns_of_numbers_and_lists(tmp_path, value, loaded):
    path = tmp_path / "a.parquet"
    table = pyarrow.Table.from_pylist([{"question": "q", "golden_answers": value}])
    pyarrow.parquet.write_table(table, path)
    assert load_qa(str(path), "test")[0].golden_answers == tuple(loaded.split())


@pytest.mark.parametrize(
    "answers",
    ["null", "true", "[null]", '["x", false]', "NaN", "[[1]]", '{"a": 1}', "[]", '["The", "!"]',
     '""', '"[\'Paris\', x]"', '"[\'Paris\' \'Lima\']"', '"[\'Paris\'"'],
)  # fmt: skip
def test_answers_that_are_no_text_are_refused_with_the_row(tmp_path, answers):
    path = tmp_path / "a.jsonl"
    good = '{"question": "q", "golden_answers": "x"}\n'
    path.write_text(good + f'{{"question": "q", "golden_answers": {answers}}}\n' + good)
    with pytest.raises(UserError, match=r"a\.jsonl: row 2: "):
        load_qa(str(path), "test")


@pytest.mark.parametrize("suffix", [".tsv", ".csv"])
@pytest.mark.parametrize(
    "row",
    [
        '"who sang it{}x',  # swallowed the next rows up to their first mark
        "who sang it{}\"['x']",
        '"Hello" by whom{}x',  # the marks of the text would be lost
    ],
)
def test_an_unclosed_quote_is_refused_where_it_opens(tmp_path, suffix, row):
    delimiter = "\t" if suffix == ".tsv" else ","
    path = tmp_path / f"a{suffix}"
    good = f'"a ""b"" c"{delimiter}x\n'
    path.write_text(good + "\n" + row.format(delimiter) + "\n" + good * 2)
    with pytest.raises(UserError, match=rf"a\{suffix}: row 3: a quotation mark"):
        load_qa(str(path), "test")


def test_tables_with_a_header_and_dprs_csv_with_tabs(tmp_path):
    path = tmp_path / "nq.csv"
    path.write_text("Question\tanswers\nwho, then?\t['x']\n")
    (row,) = load_qa(str(path), "dev")
    assert (row.question, row.golden_answers, row.where) == ("who, then?", ("x",), f"{path}: row 2")


def test_missing_and_undecodable_files_are_refused(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        load_qa(str(tmp_path / "none.jsonl"), "test")
    path = tmp_path / "latin.jsonl"
    path.write_bytes(b'{"question": "\xe9"}')
    with pytest.raises(UserError, match="not UTF-8"):
        load_qa(str(path), "test")
    with pytest.raises(UserError, match="limit 0"):
        load_qa("world", "test", 0)


GOOD = b'{"question": "q", "golden_answers": ["x"]}\n'


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("a.jsonl", rb'{"question": "\ud800", "golden_answers": ["x"]}', "surrogate"),
        ("a.jsonl", rb'{"question": "q", "golden_answers": ["x\udfff"]}', "surrogate"),
        ("a.jsonl", rb'{"id": "\ud800", "question": "q", "golden_answers": ["x"]}', "surrogate"),
        ("a.jsonl", rb'{"question": "q", "golden_answers": "[\"\\ud800\"]"}', "readable list"),
        ("a.jsonl", rb'{"question": "q", "golden_answers": "[\u0027\\ud800\u0027]"}', "readable"),
        ("a.jsonl", b'{"question": "\xe9"}', "not UTF-8"),
        ("a.jsonl", b'{"question": "\xed\xa0\x80"}', "not UTF-8"),
        ("a.jsonl", GOOD.decode().encode("utf-16"), "not UTF-8"),
        ("a.jsonl", b"1" * 5000, "4300 digits"),
        ("a.jsonl", b"[" * 100_000, "nested too deeply"),
        ("a.jsonl", b'{"question": "q", "golden_answers": "' + b"[" * 100_000 + b']"}', "readable"),
        ("a.tsv", b"q\0\tx", "not UTF-8"),
        ("a.csv", b"q," + b"x" * 200_000, "shorten the cell"),
    ],
)
def test_hostile_rows_are_refused_by_number_in_one_short_line(tmp_path, name, row, message):
    path = tmp_path / name
    path.write_bytes((GOOD if name == "a.jsonl" else b"q,x\tx\n") * 2 + row + b"\n")
    if name == "a.csv":
        path.write_bytes(b"q,x\nq,x\n" + row)
    with pytest.raises(UserError, match=rf"{name}: row 3: .*{message}") as error:
        load_qa(str(path), "test")
    assert len(str(error.value)) < 300 + len(str(path)) and "\n" not in str(error.value)


def test_numbers_beyond_float64_are_read_as_texts(tmp_path):
    path, number = tmp_path / "a.jsonl", "1" * 400
    path.write_text(f'{{"id": {number}, "question": "q", "golden_answers": [{number}]}}\n')
    (row,) = load_qa(str(path), "test")
    assert (row.id, row.golden_answers) == (number, (number,))


@pytest.mark.parametrize(
    "column",
    [
        pyarrow.array([1, 2], pyarrow.timestamp("ns")),
        pyarrow.array([1, 2**60], pyarrow.timestamp("us")),
        pyarrow.array([1, 2], pyarrow.timestamp("s", "No/Zone")),
        pyarrow.array([b"a", b"\xff"]).view(pyarrow.string()),
    ],
    ids=["nanoseconds", "far future", "unknown zone", "not UTF-8"],
)
def test_parquet_values_that_python_lacks_are_refused_with_the_file(tmp_path, column):
    path = tmp_path / "a.parquet"
    columns = {"question": ["q", "r"], "golden_answers": ["x", "y"], "other": column}
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    with pytest.raises(UserError, match=r"a\.parquet: row 1 or later: not readable: "):
        load_qa(str(path), "test")


@pytest.mark.parametrize("position", [4, 10, 0.5, -10])
def test_a_parquet_file_with_a_flipped_byte_is_refused_with_a_reason(tmp_path, position):
    path = tmp_path / "a.parquet"
    table = pyarrow.table({"question": ["q"], "golden_answers": ["x"]})
    pyarrow.parquet.write_table(table, path)
    content = bytearray(path.read_bytes())
    content[int(position * len(content)) if position == 0.5 else position] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"a\.parquet: .*readable.*: [A-Z]") as error:
        load_qa(str(path), "test")
    assert "None" not in str(error.value)


@pytest.mark.parametrize(
    ("pattern", "content"),
    [("dataset_info.json", b"[" * 100_000), ("dataset_info.json", b""), ("*-test.*", b""),
     ("*-test.*", b"\0" * 1000), ("dataset_info.json", None)],
)  # fmt: skip
def test_a_damaged_tfds_dataset_is_refused_with_its_folder(
    data_dir, tmp_path, monkeypatch, pattern, content
):
    place = prepare(data_dir)
    copy = shutil.copytree(place, tmp_path / place.name)
    (damaged,) = copy.rglob(pattern)
    if content is None:
        damaged.unlink()
    else:
        damaged.write_bytes(content)
    with pytest.raises(UserError, match=f"{place.name}: .*delete this folder"):
        load_questions("test", tmp_path)
