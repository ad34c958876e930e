"""Tests of the simulator report, its metrics, and the gate that reads it."""

import json
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zerosearch_jax import config_flags
from zerosearch_jax.errors import UserError
from zerosearch_jax.jobs import simulator_report
from zerosearch_jax.search.engine import SearchResult
from zerosearch_jax.search.simulated import SimulatedEngine
from zerosearch_jax.simulator import gate, reader
from zerosearch_jax.simulator.pairs import Pair, save_pairs
from zerosearch_jax.text import prompts

ROOT = Path(__file__).parents[2]


def _pair(i: int, answer: str, label: str, last: bool = True, documents=("a b", "c d")) -> Pair:
    return Pair(f"p{i}", f"query {i}", documents, f"Who is {i}?", (answer, f"No. {i}"), label, last)


PAIRS = [_pair(i, "Peru" if i % 3 else "Chad", "useful" if i % 2 else "noisy") for i in range(6)]


def test_jensen_shannon_by_hand():
    divergence = simulator_report.jensen_shannon_bits
    assert divergence(Counter("aab"), Counter("aabaab")) == pytest.approx(0)
    assert divergence(Counter("aa"), Counter("b")) == pytest.approx(1)
    # M = (3/4, 1/4): log2(4/3) / 2 + (log2(2/3) / 2 + log2(2) / 2) / 2.
    assert divergence(Counter("a"), Counter("ab")) == pytest.approx(0.311278, abs=1e-6)
    assert divergence(Counter(), Counter("a")) is None


COUNTS = st.dictionaries(st.integers(0, 5), st.integers(1, 9), min_size=1).map(Counter)


@settings(deadline=None, max_examples=50)
@given(COUNTS, COUNTS)
def test_jensen_shannon_is_symmetric_and_at_most_one_bit(left, right):
    value = simulator_report.jensen_shannon_bits(left, right)
    assert -1e-12 <= value <= 1 + 1e-12
    assert value == pytest.approx(simulator_report.jensen_shannon_bits(right, left))
    assert (value < 1e-12) == all(
        left[key] * right.total() == right[key] * left.total() for key in left | right
    )


def test_source_row_by_hand():
    long = "Chad " * 20
    documents = [("Chad.", long), (), ("Perus", long), (long,)]
    pairs = [_pair(0, "Chad", "useful"), *PAIRS[1:3], _pair(3, "Chad", "noisy")]
    answers = ["chad", None, "Peru and Chad", "The Chad"]
    read = list(zip(pairs, documents, answers, strict=True))
    row = simulator_report.source_row("tuned", "useful", "noisy", read, 2)
    assert [*row.values()][:4] == ["tuned", "useful", "noisy", 4]
    assert row["reader_em"] == 0.5  # Containing the answer is not a match.
    assert row["reader_em_low"] == pytest.approx(0.15, abs=0.01)
    assert row["reader_em_high"] == pytest.approx(0.85, abs=0.01)
    assert row["gold_in_documents"] == 0.5  # Whole words only, so "Perus" does not count.
    assert row["exactly_topk"] == 0.5
    assert row["words_a_document"] == (1 + 20 + 1 + 20 + 20) / 5
    assert row["documents_15_to_60_words"] == 3 / 5
    empty = simulator_report.source_row("engine", "noisy", "noisy", [], None)
    assert empty.keys() == row.keys()
    assert empty["reader_em"] is empty["exactly_topk"] is empty["words_a_document"] is None


def _read(real: tuple[str, ...], written: tuple[str, ...]) -> list[simulator_report.ReadSearch]:
    """One search with the engine's and the simulator's documents, without an answer."""
    return [(_pair(0, "x", "useful", documents=real), written, None)]


def test_divergences_compare_words_and_lengths_with_the_engines():
    same = simulator_report.divergences(_read(("a a", "b b"), ("b a b a",)))
    # Lengths 2, 2 and 4 are all in the first bin of five words.
    assert same == {"word_jsd_bits": pytest.approx(0), "length_jsd_bits": pytest.approx(0)}
    other = simulator_report.divergences(_read(("far away " * 9,), ("a",)))
    assert other == {"word_jsd_bits": pytest.approx(1), "length_jsd_bits": pytest.approx(1)}
    # The histogram of lengths 2, 2 is [2, 0], that of lengths 4, 5 is [1, 1].
    halves = simulator_report.divergences(_read(("a a", "b b"), ("a b a b", "a a b b a")))
    assert halves["length_jsd_bits"] == pytest.approx(0.311278, abs=1e-6)
    none = simulator_report.divergences(_read(("a a",), ()))
    assert none == {"word_jsd_bits": None, "length_jsd_bits": None}


def test_held_out_draws_last_searches_by_seed(tmp_path):
    path = tmp_path / "pairs.jsonl"
    bridges = [_pair(10 + i, "Chad", "useful", last=False) for i in range(4)]
    save_pairs(path, PAIRS + bridges)
    drawn = simulator_report.held_out(str(path), 2, 0)
    assert [pair.label for pair in drawn] == ["useful"] * 2 + ["noisy"] * 2
    assert all(pair.last for pair in drawn)
    assert drawn == simulator_report.held_out(str(path), 2, 0)
    assert sorted(p.id for p in simulator_report.held_out(str(path), 99, 1)) == [
        pair.id for pair in PAIRS
    ]
    save_pairs(path, [pair for pair in PAIRS if pair.label == "noisy"] + bridges)
    with pytest.raises(UserError, match="no useful pair is an episode's last search"):
        simulator_report.held_out(str(path), 4, 0)


@pytest.mark.parametrize("label", ["useful", "noisy"])
def test_the_simulator_writes_documents_for_every_pair(label):
    texts_seen = []

    def write(texts, keys):
        texts_seen.extend(texts)
        return [f"Doc 1: {key[0]}" if key[0] else "nothing" for key in keys]

    engine = SimulatedEngine(write, form="finetuned", topk=2)
    documents = simulator_report.write_documents(engine, PAIRS, label)
    assert documents == [(), ("1",), ("2",), ("3",), ("4",), ("5",)]
    assert texts_seen == [
        prompts.simulator_prompt(
            p.question, p.golden_answers[0], p.query, label == "noisy", "finetuned", 2
        )
        for p in PAIRS
    ]


def test_a_failed_search_stops_the_report():
    class Down:
        name = "down"

        def search(self, requests):
            return [SearchResult(request.key, (), "no reply", "timeout") for request in requests]

    with pytest.raises(UserError, match="6 of 6 searches failed.*timeout 6"):
        simulator_report.write_documents(Down(), PAIRS, "useful")


@pytest.fixture(scope="module")
def report(tmp_path_factory, markov_model, compiled_once):
    """A report on six pairs. The reader always answers Chad; the simulators write no documents."""
    workdir = tmp_path_factory.mktemp("report")
    pairs = workdir / "pairs.jsonl"
    save_pairs(pairs, PAIRS)
    sizes = dict(slots=4, prefill_rows=4, decode_rows=(), chunk_tokens=8)
    sizes |= dict(max_tokens=832, window_tokens=832, prefill_buckets=(640,))
    config = config_flags.load(str(ROOT / "configs" / "simulator_report.py"))
    simulator = dict(simulator=dict(model=str(markov_model), max_new_tokens=8, generator=sizes))
    config.update(
        dict(
            pairs=str(pairs),
            reader=dict(model=str(markov_model), response_tokens=12, generator=sizes),
            simulators=dict(finetuned=simulator, prompted=simulator),
        )
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reader, "thoughts", SimpleNamespace(OPEN=""))  # it closes no thought
        simulator_report.run(config, str(workdir))
    return workdir / "report.json"


def test_the_report_holds_a_row_for_every_source(report):
    written = json.loads(report.read_text())
    rows = {(row["source"], row["label"], row["queries"]): row for row in written["rows"]}
    labels = ("useful", "noisy")
    expected = [(name, label, queries) for name in ("finetuned", "prompted")
                for label in labels for queries in labels]  # fmt: skip
    expected += [(name, label if name == "engine" else "", label)
                 for label in labels for name in ("engine", "none")]  # fmt: skip
    assert list(rows) == expected
    assert len({tuple(row) for row in rows.values()}) == 1  # All rows have the same columns.
    assert {row["questions"] for row in rows.values()} == {3}
    assert {row["reader_em"] for row in rows.values()} == {1 / 3}  # One of three answers is Chad.
    assert rows["engine", "useful", "useful"]["words_a_document"] == 2
    assert rows["prompted", "noisy", "useful"]["exactly_topk"] == 0
    assert len(written["examples"]["finetuned"]) == 5
    text = report.with_suffix(".md").read_text()
    assert text.count("\n| finetuned | ") == 4 and "## Examples: prompted" in text
    header = next(line for line in text.splitlines() if line.startswith("| query "))
    assert header.replace("|", " ").split() == ["query", "gold", "useful", "noisy"]


def test_markdown_escapes_cells_and_rounds_numbers():
    row = {"source": "tuned", "reader_em": 1 / 3, "questions": 3, "exactly_topk": None}
    simulator = {"model": "m", "form": "finetuned", "temperature": 0.8, "weights": "0" * 64}
    report = {"reader": "r", "pairs": "p", "simulators": {"tuned": simulator}, "rows": [row]}
    report["examples"] = {"tuned": [{"query": "a|b\nc", "gold": "g"}]}
    lines = simulator_report.markdown(report).splitlines()
    cells = next(line for line in lines if line.startswith("| tuned")).replace("|", " ").split()
    assert cells == ["tuned", "0.333", "3", "–"]
    assert any(line.startswith("| a\\|b c ") for line in lines)


def _check(path, markov_model, **changes):
    config = config_flags.load(str(ROOT / "configs" / "simulator_report.py")).unlock()
    search = config.simulators.finetuned
    search.simulator.update(dict(model=str(markov_model), max_new_tokens=8))  # As in `report`.
    bounds = dict(reader_em_useful_min=0.3, reader_em_noisy_max=0.4)
    bounds |= {key: value for key, value in changes.items() if key in bounds}
    search.update_from_flattened_dict({k: v for k, v in changes.items() if k not in bounds})
    gate.check(path, gate.simulator_identity(search), **bounds)


def test_the_gate_passes_a_simulator_within_the_bounds(report, markov_model):
    _check(report, markov_model)
    _check(report, markov_model, **{"simulator.form": "prompted"})
    _check(report, markov_model, reader_em_useful_min=1 / 3, reader_em_noisy_max=1 / 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(reader_em_useful_min=0.5), r"useful documents is 0\.333, 0\.167 below 0\.5 \("),
        (dict(reader_em_noisy_max=0.1), r"noisy documents is 0\.333, 0\.233 above 0\.1 \("),
        (
            dict(reader_em_useful_min=0.5, reader_em_noisy_max=0.1),
            r"below 0\.5; the reader's EM on noisy .* above 0\.1",
        ),
        ({"simulator.form": "chat"}, "no entry with form='chat'"),
        ({"simulator.temperature": 0.9, "topk": 3}, r"no entry with topk=3, temperature=0\.9;"),
    ],
)
def test_the_gate_names_every_failure(report, markov_model, change, message):
    with pytest.raises(UserError, match=message):
        _check(report, markov_model, **change)


def test_only_searches_with_useful_engine_documents_count(report, tmp_path, markov_model):
    written = json.loads(report.read_text())
    for row in written["rows"]:
        if row["queries"] == "noisy":
            row["reader_em"] = 1.0 if row["label"] == "noisy" else 0.0
    path = tmp_path / "report.json"
    path.write_text(json.dumps(written))
    _check(path, markov_model)


def test_the_gate_refuses_a_report_of_other_weights(report, tmp_path, markov_model):
    shutil.copy(markov_model / "config.json", tmp_path)
    with pytest.raises(UserError, match="holds no .safetensors file"):
        _check(report, tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"retrained")
    with pytest.raises(UserError, match="no entry with weights="):
        _check(report, tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "report.json: No such file.*create it"),
        ("{", "report.json: not JSON"),
        ("[]", "report.json: expected an object"),
        ("{}", "report.json: simulators is missing"),
        ('{"rows": [{"source": "finetuned"}], "simulators": {}}', r"rows\[0\]\.label is missing"),
    ],
)
def test_the_gate_refuses_a_malformed_report(tmp_path, markov_model, text, message):
    path = tmp_path / "report.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=message):
        _check(path, markov_model)


def test_a_real_engine_is_refused_as_simulator(tmp_path):
    config = config_flags.load(str(ROOT / "configs" / "simulator_report.py"))
    config.simulators.prompted.engine = "bm25"
    with pytest.raises(UserError, match="simulators.prompted.engine is 'bm25'"):
        simulator_report.run(config, str(tmp_path))
