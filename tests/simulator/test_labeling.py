"""Tests of the labelers: their prompt, their verdicts, and their agreement with the rule."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from zerosearch_jax import config_flags
from zerosearch_jax.errors import UserError
from zerosearch_jax.search.http_client import TooLong
from zerosearch_jax.simulator.labeling import (
    agreement,
    choose_label,
    chosen_labels,
    make_labeler,
    model_labels,
    reader_labels,
)
from zerosearch_jax.text.prompts import labeling_prompt, parse_verdict
from zerosearch_jax.training.job_configs import LabelingConfig

ROOT = Path(__file__).parents[2]
SEARCHES = (
    ("Which river?", ["Chari"], "rivers", ["The Chari flows."]),
    ("Which lake?", ["Chad", "Tchad"], "lakes", ["Sand.", "More sand."]),
    ("Which sea?", ["Red"], "seas", []),
)


@pytest.fixture
def config():
    with config_flags.load(str(ROOT / "configs" / "collect.py")).unlocked() as config:
        return config


def test_the_prompt_holds_question_answers_and_neutralised_documents():
    text = labeling_prompt("Which\nriver?", list("abcdefg"), ["One {answer}", "</answer> yes"])
    assert "Question: Which river?\nCorrect answer: a or b or c or d or e\n" in text
    assert "\nDoc 1: One {answer}\nDoc 2: (/answer) yes\n" in text
    assert text.endswith("yes or no.")


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("yes", True),
        (" **Yes.** They do", True),
        ("NO", False),
        ("\nNo, because yes", False),
        ("<think>No? yes!</think>\n\nno", False),
        ("<think> yes", None),
        ("yes it may be </think> no", False),
        ("no <think> or yes? </think>", False),
        ("None of them", None),
        ("Not sure: yes", None),
        ("", None),
    ],
)
def test_parse_verdict_reads_yes_and_no(text, verdict):
    assert parse_verdict(text) is verdict


def test_agreement_by_hand():
    # Rule × labeler: 20 both useful, 5 and 10 different, 15 both noisy.
    # p_o = 35/50, p_e = (25 · 30 + 25 · 20) / 50² = 0.5, κ = 0.2 / 0.5.
    labels = [("useful", "useful")] * 20 + [("useful", "noisy")] * 5
    labels += [("noisy", "useful")] * 10 + [("noisy", "noisy")] * 15 + [("noisy", None)] * 3
    agreed = agreement(labels)
    assert (agreed["searches"], agreed["unclear"]) == (50, 3)
    assert agreed["share"] == pytest.approx(0.7)
    assert agreed["kappa"] == pytest.approx(0.4)
    assert agreed["table"] == {
        "useful/useful": 20,
        "useful/noisy": 5,
        "noisy/useful": 10,
        "noisy/noisy": 15,
    }


def test_agreement_is_none_where_it_is_undefined():
    assert agreement([]) | {"table": None} == {
        "searches": 0, "unclear": 0, "share": None, "kappa": None, "table": None,
    }  # fmt: skip
    one_label = agreement([("useful", "useful")] * 4)
    assert (one_label["share"], one_label["kappa"]) == (1.0, None)
    opposed = agreement([("useful", "noisy"), ("noisy", "useful")])
    assert (opposed["share"], opposed["kappa"]) == (0.0, -1.0)


class Server(ThreadingHTTPServer):
    """A chat server that answers by the documents of `SEARCHES` and records its requests.

    Yes if they mention the first gold answer, no if they mention sand, otherwise "perhaps".
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.status = 200
        self.requests: list[tuple[dict, dict]] = []  # headers, body


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append((dict(self.headers), request))
        text = request["messages"][-1]["content"]
        golden_answer = text.split("Correct answer: ")[1].split("\n")[0]
        reply = "Yes." if f"The {golden_answer}" in text else "no" if "sand" in text else "perhaps"
        body = json.dumps({"choices": [{"message": {"content": reply}}]}).encode()
        self.send_response(self.server.status)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_a_server_labels_searches(config, server, monkeypatch):
    monkeypatch.setenv("LABELER_KEY", "secret")
    config.labeling.update(
        kind="server", model="big", response_tokens=8, url=f"http://127.0.0.1:{server.server_port}"
    )
    config.labeling.server.update(key_variable="LABELER_KEY", attempts=1)
    config_flags.typed(LabelingConfig, config.labeling)
    labeler = make_labeler(config.labeling, 0, config.mesh)
    assert labeler(SEARCHES) == ["useful", "noisy", None]
    headers, request = server.requests[0]
    # HTTP header names are case-insensitive.
    assert {name.lower(): value for name, value in headers.items()}["authorization"] == (
        "Bearer secret"
    )
    assert (request["model"], request["temperature"], request["max_tokens"]) == ("big", 0.0, 8)
    server.status = 500
    with pytest.raises(UserError, match="config.labeling.url.* failed.*HTTP 500"):
        labeler(SEARCHES)


def test_documents_too_long_for_the_model_give_no_label():
    def complete(prompts, keys):
        return ["yes", TooLong("too long"), "no"]

    assert model_labels(complete, SEARCHES) == ["useful", None, "noisy"]


def test_a_local_model_labels_searches(config, markov_model):
    config.labeling.update(kind="local", model=str(markov_model), response_tokens=3)
    config.labeling.generator.update(
        slots=2, max_tokens=512, prefill_buckets=(512,), prefill_rows=2, window_tokens=512
    )
    labeler = make_labeler(config.labeling, 0, config.mesh)
    # The Markov policy writes a tag after any prompt, so it decides nothing.
    assert labeler(SEARCHES) == [None] * 3


def test_a_reader_labels_useful_if_right_and_noisy_if_no_answer_is_mentioned():
    def reader(questions, queries, documents):
        assert (questions[1], queries[1]) == ("Which lake?", "lakes")
        return [found[0].split()[-2:][0] if found else None for found in documents]

    misread = ("Which lake?", ["Chad", "Tchad"], "lakes", ["Sand.", "Tchad is a lake."])
    assert reader_labels(reader, [*SEARCHES, misread]) == ["useful", "noisy", "noisy", None]


@pytest.mark.parametrize(
    ("rule", "labeler", "last", "by_rule", "by_labeler", "by_both"),
    [
        ("useful", "useful", True, "useful", "useful", "useful"),
        ("useful", "noisy", True, "useful", "noisy", None),
        ("useful", "noisy", False, "useful", "noisy", "useful"),
        ("noisy", None, True, "noisy", None, None),
        ("noisy", None, False, "noisy", None, "noisy"),
    ],
)
def test_label_by_chooses_the_label(rule, labeler, last, by_rule, by_labeler, by_both):
    record = {"rule": rule, "labeler": labeler}
    assert choose_label(record, "rule", last) == by_rule
    assert choose_label(record, "labeler", last) == by_labeler
    assert choose_label(record, "both", last) == by_both


def test_chosen_labels_finds_the_last_search_of_each_episode():
    records = [
        {"id": f"{episode}/{turn}", "episode": episode, "rule": "useful", "labeler": "noisy"}
        for episode, turn in (("a", 0), ("a", 1), ("b", 0))
    ]
    assert chosen_labels(records, "both") == {"a/0": "useful", "a/1": None, "b/0": None}
