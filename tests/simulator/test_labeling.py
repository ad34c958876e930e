"""The judge: what it is asked, how its answer is read, how far it agrees with the rule."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from zerosearch_jax import config_flags
from zerosearch_jax.errors import UserError
from zerosearch_jax.simulator.labeling import agreement, check_judge, make_judge, read_verdicts
from zerosearch_jax.text.prompts import labeling_prompt, parse_verdict

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


def test_the_prompt_holds_question_answers_and_harmless_documents():
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
        ("None of them", None),
        ("Not sure: yes", None),
        ("", None),
    ],
)
def test_verdicts_are_read(text, verdict):
    assert parse_verdict(text) is verdict


def test_agreement_by_hand():
    # Rule × judge: 20 both useful, 5 and 10 apart, 15 both noisy; p_o = 35/50,
    # p_e = (25 · 30 + 25 · 20) / 50² = 0.5, κ = 0.2 / 0.5.
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


def test_agreement_where_it_says_nothing():
    assert agreement([]) | {"table": None} == {
        "searches": 0, "unclear": 0, "share": None, "kappa": None, "table": None,
    }  # fmt: skip
    one_sided = agreement([("useful", "useful")] * 4)
    assert (one_sided["share"], one_sided["kappa"]) == (1.0, None)
    opposed = agreement([("useful", "noisy"), ("noisy", "useful")])
    assert (opposed["share"], opposed["kappa"]) == (0.0, -1.0)


class Server(ThreadingHTTPServer):
    """Says yes where the first document holds the first gold answer; records the headers."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.status = 200
        self.seen: list[tuple[dict, dict]] = []


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append((dict(self.headers), asked))
        text = asked["messages"][-1]["content"]
        gold = text.split("Correct answer: ")[1].split("\n")[0]
        reply = "Yes." if f"The {gold}" in text else "no" if "sand" in text else "perhaps"
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


def test_a_server_judges(config, server, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "secret")
    config.judge.update(
        kind="server", model="big", response_tokens=8, url=f"http://127.0.0.1:{server.server_port}"
    )
    config.judge.server.update(key_variable="JUDGE_KEY", attempts=1)
    check_judge(config.judge)
    judge = make_judge(config.judge, 0, config.mesh)
    assert judge(SEARCHES) == ["useful", "noisy", None]
    headers, asked = server.seen[0]
    assert headers["Authorization"] == "Bearer secret"
    assert (asked["model"], asked["temperature"], asked["max_tokens"]) == ("big", 0.0, 8)
    server.status = 500
    with pytest.raises(UserError, match="the judge's server failed .*HTTP 500"):
        judge(SEARCHES)


def test_a_local_model_judges(config, markov_model):
    config.judge.update(kind="local", model=str(markov_model), response_tokens=3)
    config.judge.generator.update(
        slots=2, max_tokens=512, prefill_buckets=(512,), prefill_rows=2, window_tokens=512
    )
    judge = make_judge(config.judge, 0, config.mesh)
    # The hand-written policy goes on with a tag, whatever it is asked.
    assert judge(SEARCHES) == [None] * 3


def test_a_reader_finds_documents_useful_when_it_answers_right_from_them():
    def reader(questions, queries, documents):
        assert (questions[1], queries[1]) == ("Which lake?", "lakes")
        return [found[0].split()[-2:][0] if found else None for found in documents]

    misread = ("Which lake?", ["Chad", "Tchad"], "lakes", ["Sand.", "Tchad is a lake."])
    assert read_verdicts(reader, [*SEARCHES, misread]) == ["useful", "noisy", "noisy", None]
