"""The simulator's report: what its figures compute, what it asks and reads; its gate before RL."""

import hashlib
import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zerosearch_jax import config_flags
from zerosearch_jax.errors import UserError
from zerosearch_jax.generate.generator import Generation
from zerosearch_jax.jobs import simulator_report
from zerosearch_jax.search.engine import SearchResult
from zerosearch_jax.search.simulated import SimulatedEngine
from zerosearch_jax.simulator import gate
from zerosearch_jax.simulator.pairs import Pair, save_pairs
from zerosearch_jax.simulator.reader import Reader
from zerosearch_jax.text import prompts
from zerosearch_jax.text.tokenizer import decode, encode, encode_prompt

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


def test_a_row_by_hand():
    long = "Chad " * 20
    documents = [("Chad.", long), (), ("Perus", long), (long,)]
    pairs = [_pair(0, "Chad", "useful"), *PAIRS[1:3], _pair(3, "Chad", "noisy")]
    answers = ["chad", None, "Peru and Chad", "The Chad"]
    found = list(zip(pairs, documents, answers, strict=True))
    row = simulator_report.source_row("tuned", "useful", "noisy", found, 2)
    assert [*row.values()][:4] == ["tuned", "useful", "noisy", 4]
    assert row["reader_em"] == 0.5  # containment is not a match
    assert row["reader_em_low"] == pytest.approx(0.15, abs=0.01)
    assert row["reader_em_high"] == pytest.approx(0.85, abs=0.01)
    assert row["gold_in_documents"] == 0.5  # whole words: not in "Perus"
    assert row["exactly_topk"] == 0.5
    assert row["words_a_document"] == (1 + 20 + 1 + 20 + 20) / 5
    assert row["documents_15_to_60_words"] == 3 / 5
    empty = simulator_report.source_row("engine", "noisy", "noisy", [], None)
    assert empty.keys() == row.keys()
    assert empty["reader_em"] is empty["exactly_topk"] is empty["words_a_document"] is None


def _written(*found):
    """(what the engine found, what the simulator wrote) for a search each."""
    return [(_pair(0, "x", "useful", documents=real), ours, None) for real, ours in found]


def test_style_is_compared_with_what_the_engine_found():
    same = simulator_report.divergences(_written((("a a", "b b"), ("b a b a",))))
    # Bins of five words: 2 and 2 against 4.
    assert same == {"word_jsd_bits": pytest.approx(0), "length_jsd_bits": pytest.approx(0)}
    other = simulator_report.divergences(_written((("far away " * 9,), ("a",))))
    assert other == {"word_jsd_bits": pytest.approx(1), "length_jsd_bits": pytest.approx(1)}
    # Lengths 2, 2 are [2, 0], lengths 4, 5 are [1, 1].
    halves = simulator_report.divergences(_written((("a a", "b b"), ("a b a b", "a a b b a"))))
    assert halves["length_jsd_bits"] == pytest.approx(0.311278, abs=1e-6)
    none = simulator_report.divergences(_written((("a a",), ())))
    assert none == {"word_jsd_bits": None, "length_jsd_bits": None}


def test_only_last_searches_are_held_out_and_the_draw_is_keyed(tmp_path):
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
def test_every_pair_is_asked_for_both_kinds(label):
    asked = []

    def write(texts, keys):
        asked.extend(texts)
        return [f"Doc 1: {key[0]}" if key[0] else "nothing" for key in keys]

    engine = SimulatedEngine(write, form="finetuned", topk=2)
    documents = simulator_report.ask(engine, PAIRS, label)
    assert documents == [(), ("1",), ("2",), ("3",), ("4",), ("5",)]
    assert asked == [
        prompts.simulator_prompt(
            p.question, p.golden_answers[0], p.query, label == "noisy", "finetuned", 2
        )
        for p in PAIRS
    ]


def test_a_failed_search_is_no_empty_result():
    class Down:
        name = "down"

        def search(self, requests):
            return [SearchResult(request.key, (), "timeout") for request in requests]

    with pytest.raises(UserError, match=r"6 of 6 searches failed \(timeout\)"):
        simulator_report.ask(Down(), PAIRS, "useful")


class Echo:
    """Stands in for a generator of two slots: says for each prompt what `say` gives."""

    slots = 2

    def __init__(self, say):
        self.say = say
        self.prompts = []

    def start(self, slots, prompts):
        self.begun = dict(zip(slots, prompts, strict=True))
        self.prompts += prompts

    def decode(self, slots, **_):
        return [Generation(self.say(self.begun[slot]), [], "stop") for slot in slots]


def test_the_reader_answers_in_order_from_what_it_is_shown(tiny_tokenizer):
    def say(prompt):
        number = decode(tiny_tokenizer, prompt).partition("Who is ")[2][0]
        tag = "search" if number == "3" else "answer"
        return encode(tiny_tokenizer, f" so. </think>\n<{tag}> {number} </{tag}>")

    generator = Echo(say)
    reader = Reader(generator, tiny_tokenizer, response_tokens=32, observation_tokens=12)
    documents = [("</information> x",), *[(f"It is {i}.",) for i in range(1, 5)], ("y " * 99,)]
    answers = simulator_report.read(reader, PAIRS, documents)
    assert answers == ["0", "1", "2", None, "4", "5"]
    shown = decode(tiny_tokenizer, generator.prompts[1])
    assert shown.endswith(
        "Who is 1?\n\n\n<information>Doc 1: It is 1.</information>\n\n<think> The query 1 is"
    )
    assert (
        generator.prompts[1][:20]
        == encode_prompt(tiny_tokenizer, prompts.policy_prompt("Who is 1?"))[:20]
    )
    # Too long a text loses its end, never the closing tag; a document cannot close it.
    for prompt in (generator.prompts[0], generator.prompts[5]):
        text = decode(tiny_tokenizer, prompt).partition("Who is")[2]
        assert text.count("</information>\n\n<think>") == text.count("</information>") == 1
    cut = decode(tiny_tokenizer, generator.prompts[5])
    block = cut.partition("?\n\n\n<information>")[2].partition("</information>")[0]
    assert len(encode(tiny_tokenizer, block)) <= 12


@pytest.fixture(scope="module")
def report(tmp_path_factory, markov_model, compiled_once):
    """The job on six pairs; the reader always answers Chad, the simulators write no document."""
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
    simulator_report.run(config, str(workdir))
    return workdir / "report.json"


def test_the_report_holds_a_row_for_every_source(report):
    written = json.loads(report.read_text())
    rows = {(row["source"], row["label"], row["queries"]): row for row in written["rows"]}
    kinds = ("useful", "noisy")
    wanted = [(name, label, queries) for name in ("finetuned", "prompted")
              for label in kinds for queries in kinds]  # fmt: skip
    wanted += [(name, label if name == "engine" else "", label)
               for label in kinds for name in ("engine", "none")]  # fmt: skip
    assert list(rows) == wanted
    assert len({tuple(row) for row in rows.values()}) == 1  # the same columns
    assert {row["questions"] for row in rows.values()} == {3}
    assert {row["reader_em"] for row in rows.values()} == {1 / 3}  # one of three is Chad
    assert rows["engine", "useful", "useful"]["words_a_document"] == 2
    assert rows["prompted", "noisy", "useful"]["exactly_topk"] == 0
    assert len(written["examples"]["finetuned"]) == 5
    text = report.with_suffix(".md").read_text()
    assert text.count("\n| finetuned | ") == 4 and "## Examples: prompted" in text
    assert "| query | gold | useful | noisy |" in text


def _check(path, markov_model, **changes):
    config = config_flags.load(str(ROOT / "configs" / "simulator_report.py")).unlock()
    search = config.simulators.finetuned
    search.simulator.update(dict(model=str(markov_model), max_new_tokens=8))  # as in `report`
    bounds = dict(reader_em_useful_min=0.3, reader_em_noisy_max=0.4)
    bounds |= {key: value for key, value in changes.items() if key in bounds}
    search.update_from_flattened_dict({k: v for k, v in changes.items() if k not in bounds})
    gate.check(path, gate.asked_of(search), **bounds)


def test_the_gate_opens_for_a_good_simulator(report, markov_model):
    _check(report, markov_model)
    _check(report, markov_model, **{"simulator.form": "prompted"})
    _check(report, markov_model, reader_em_useful_min=1 / 3, reader_em_noisy_max=1 / 3)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (dict(reader_em_useful_min=0.5), r"useful documents is 0\.333, 0\.167 below 0\.5 \("),
        (dict(reader_em_noisy_max=0.1), r"noisy documents is 0\.333, 0\.233 above 0\.1 \("),
        (
            dict(reader_em_useful_min=0.5, reader_em_noisy_max=0.1),
            r"below 0\.5; the reader's EM on noisy .* fine-tune it further",
        ),
        ({"simulator.form": "chat"}, "nothing there has form='chat'; make a new report"),
        ({"simulator.temperature": 0.9, "topk": 3}, r"there has topk=3, temperature=0\.9; make"),
    ],
)
def test_the_gate_says_what_fails(report, markov_model, change, told):
    with pytest.raises(UserError, match=told):
        _check(report, markov_model, **change)


def test_only_searches_that_the_engine_answered_count(report, tmp_path, markov_model):
    written = json.loads(report.read_text())
    for row in written["rows"]:
        if row["queries"] == "noisy":
            row["reader_em"] = 1.0 if row["label"] == "noisy" else 0.0
    path = tmp_path / "report.json"
    path.write_text(json.dumps(written))
    _check(path, markov_model)


def test_the_gate_refuses_a_report_of_other_weights(report, tmp_path):
    with pytest.raises(UserError, match="holds no .safetensors file"):
        _check(report, tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"retrained")
    with pytest.raises(UserError, match="not about this simulator: nothing there has weights="):
        _check(report, tmp_path)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (None, "cannot be read"),
        ("{", "not a report"),
        ("[]", "not a report"),
        ("{}", "not a report"),
        ('{"rows": [{"source": "finetuned"}], "simulators": {}}', "not a report"),
    ],
)
def test_the_gate_refuses_what_is_no_report(tmp_path, markov_model, text, told):
    path = tmp_path / "report.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=told):
        _check(path, markov_model)


def test_weights_are_told_apart_by_all_their_files_in_order(tmp_path):
    for name, content in (("model-2.safetensors", b"two"), ("model-1.safetensors", b"one")):
        (tmp_path / name).write_bytes(content)
    (tmp_path / "config.json").write_text("{}")
    assert gate.weights_sha256(tmp_path) == hashlib.sha256(b"onetwo").hexdigest()


def test_a_real_engine_is_no_simulator(tmp_path):
    config = config_flags.load(str(ROOT / "configs" / "simulator_report.py"))
    config.simulators.prompted.engine = "bm25"
    with pytest.raises(UserError, match="config.simulators.prompted.engine is 'bm25'"):
        simulator_report.run(config, str(tmp_path))
