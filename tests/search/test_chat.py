"""Tests of the simulator on a chat server, alone and within the simulated engine."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zerosearch_jax.search.chat import ChatClient, request_seed
from zerosearch_jax.search.engine import SearchRequest, SearchResult
from zerosearch_jax.search.http_client import JsonClient, SearchFailed
from zerosearch_jax.search.simulated import SimulatedEngine
from zerosearch_jax.text.prompts import simulator_prompt


def chat(url, seed=7, attempts=1, **changes):
    client = JsonClient(
        url, timeout_secs=10, attempts=attempts, backoff_secs=0, headers={"Authorization": "B k"}
    )
    settings = {"max_tokens": 600, "workers": 4} | changes
    return ChatClient(client, model="sim", temperature=0.8, top_p=0.95, seed=seed, **settings)


def completion(text):
    message = {"role": "assistant", "content": text}
    return {"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}


def prompt_of(call):
    return call.payload["messages"][-1]["content"]


def test_request_has_prompt_sampling_and_seed(serve):
    url, calls = serve(lambda call: (200, completion(f"about {prompt_of(call)}")))
    keys = [(3, 0), (3, 1), (8, 0)]
    texts = chat(url)(["a", "b", "c"], keys)
    assert texts == ["about a", "about b", "about c"]
    sent = {prompt_of(call): call for call in calls}
    assert sent["b"].payload == {
        "model": "sim",
        "messages": [{"role": "system", "content": ""}, {"role": "user", "content": "b"}],
        "temperature": 0.8,
        "top_p": 0.95,
        "max_tokens": 600,
        "seed": request_seed(7, (3, 1)),
    }
    assert (sent["b"].method, sent["b"].path) == ("POST", "/v1/chat/completions")
    assert sent["b"].headers["authorization"] == "B k"
    assert len({call.payload["seed"] for call in calls}) == 3
    assert chat(url)([], []) == []
    with pytest.raises(ValueError, match="zip"):
        chat(url)(["a", "b"], [(0, 0)])


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 2**40), st.integers(0, 2**40), st.integers(0, 20))
def test_seed_depends_on_run_episode_and_turn(seed, episode, turn):
    drawn = request_seed(seed, (episode, turn))
    assert 0 <= drawn < 2**31
    assert drawn == request_seed(seed, (episode, turn))
    others = [(seed + 1, (episode, turn)), (seed, (episode + 1, turn)), (seed, (episode, turn + 1))]
    assert all(request_seed(*other) != drawn for other in others)


@pytest.mark.parametrize(
    ("status", "body", "reason"),
    [
        (500, {}, "HTTP 500"),
        (200, {"choices": []}, "choices"),
        (200, {"error": "?"}, "choices"),
        (200, [], "choices"),
        (200, completion(None), "choices"),
        (200, completion(7), "choices"),
        (200, completion([{"type": "text"}]), "choices"),
        (200, completion([7]), "choices"),
        (200, {"choices": [None]}, "choices"),
        (200, {"choices": {"0": 1}}, "choices"),
        (200, {"choices": [{"message": "text"}]}, "choices"),
    ],
)
def test_failed_request_fails_only_its_own_search(serve, status, body, reason):
    def reply(call):
        good = (200, completion("Doc 1: one\nDoc 2: two\nDoc 3: three"))
        return (status, body) if "Query: bad" in prompt_of(call) else good

    generate = chat(serve(reply)[0])
    good, bad = generate(["Query: fine", "Query: bad"], [(0, 0), (1, 0)])
    assert good.startswith("Doc 1") and isinstance(bad, SearchFailed) and reason in str(bad)

    requests = [
        SearchRequest(6, 1, "bad", "Which?", ("a",)),
        SearchRequest(2, 0, "fine", "Which?", ("a",), noisy=True),
    ]
    first, second = SimulatedEngine(generate, form="finetuned", topk=2).search(requests)
    assert first.key == (6, 1) and first.documents == () and first.failure == str(bad)
    assert second == SearchResult((2, 0), ("one", "two"))


def test_engine_sends_each_request_its_own_prompt(serve):
    url, calls = serve(lambda call: (200, completion("Doc 1: x")))
    requests = [SearchRequest(n, 0, f"q{n}", f"Q{n}?", (f"a{n}",), n % 2 == 1) for n in range(4)]
    SimulatedEngine(chat(url), form="prompted", topk=3).search(requests)
    by_seed = {call.payload["seed"]: prompt_of(call) for call in calls}
    assert by_seed == {
        request_seed(7, (n, 0)): simulator_prompt(
            f"Q{n}?", f"a{n}", f"q{n}", n % 2 == 1, "prompted", 3
        )
        for n in range(4)
    }


def test_thoughts_of_the_simulator_are_no_documents(serve):
    reply = completion("<think>plan: Doc 1: x</think>\nDoc 1: a\nDoc 2: b")
    reply["choices"][0]["message"]["reasoning_content"] = "Doc 1: y"
    engine = SimulatedEngine(chat(serve(lambda call: (200, reply))[0]), form="prompted", topk=2)
    (result,) = engine.search([SearchRequest(0, 0, "q", "Q?", ("a",))])
    assert result == SearchResult((0, 0), ("a", "b"))


def test_parts_of_a_completion_are_joined_and_a_cut_text_counts(serve):
    reply = completion([{"type": "text", "text": "Doc 1: a\n"}, {"type": "image", "url": "x"},
                        {"type": "text", "text": "Doc 2: b"}])  # fmt: skip
    reply["choices"][0]["finish_reason"] = "length"
    assert chat(serve(lambda call: (200, reply))[0])(["a"], [(0, 0)]) == ["Doc 1: a\nDoc 2: b"]


def test_the_address_may_end_in_v1(serve):
    url, calls = serve(lambda call: (200, completion("t")))
    assert chat(f"{url}/v1/")(["a"], [(0, 0)]) == ["t"]
    assert calls[0].path == "/v1/chat/completions"


def test_retry_sends_the_same_payload(serve):
    statuses = iter([503, 200])
    url, calls = serve(lambda call: (next(statuses), completion("t")))
    assert chat(url, attempts=2)(["a"], [(0, 0)]) == ["t"]
    assert len(calls) == 2 and calls[0].payload == calls[1].payload
