"""Tests of the fixed reader."""

import pytest

from zerosearch_jax.generate.generator import Generation
from zerosearch_jax.simulator.reader import Reader
from zerosearch_jax.text import prompts
from zerosearch_jax.text.tokenizer import decode, encode, encode_prompt


class ScriptedGenerator:
    """A generator with two slots that returns `reply(prompt)` for each prompt."""

    slots = 2
    max_tokens = 600

    def __init__(self, reply):
        self.reply = reply
        self.prompts = []

    def start(self, slots, prompts):
        self.started = dict(zip(slots, prompts, strict=True))
        self.prompts += prompts

    def decode(self, slots, **_):
        return [Generation(self.reply(self.started[slot]), [], "stop") for slot in slots]


@pytest.fixture
def generator(tiny_tokenizer):
    """Answers with the number in the question; searches for number 3."""

    def reply(prompt):
        number = decode(tiny_tokenizer, prompt).partition("Who is ")[2][0]
        tag = "search" if number == "3" else "answer"
        return encode(tiny_tokenizer, f" so. </think>\n<{tag}> {number} </{tag}>")

    return ScriptedGenerator(reply)


def _read(generator, tokenizer, documents: list[tuple[str, ...]]) -> list[str | None]:
    reader = Reader(generator, tokenizer, response_tokens=32, observation_tokens=12)
    numbers = range(len(documents))
    return reader([f"Who is {i}?" for i in numbers], [f"query {i}" for i in numbers], documents)


def test_reader_answers_in_order_and_a_search_is_no_answer(tiny_tokenizer, generator):
    documents = [(f"It is {i}.",) for i in range(6)]
    assert _read(generator, tiny_tokenizer, documents) == ["0", "1", "2", None, "4", "5"]
    prompt = decode(tiny_tokenizer, generator.prompts[1])
    assert prompt.endswith(
        "Who is 1?\n\n\n<information>Doc 1: It is 1.</information>\n\n<think> The query 1 is"
    )
    start = encode_prompt(tiny_tokenizer, prompts.policy_prompt("Who is 1?"))
    assert generator.prompts[1][:20] == start[:20]


def test_reader_answer_inside_a_thought_is_no_answer(tiny_tokenizer):
    generator = ScriptedGenerator(lambda _: encode(tiny_tokenizer, " 1. <answer> 1 </answer>"))
    assert _read(generator, tiny_tokenizer, [("It is 1.",)]) == [None]


def test_reader_documents_follow_no_open_thought(thinking_tokenizer, generator):
    assert _read(generator, thinking_tokenizer, [("It is 0.",)]) == ["0"]
    text = decode(thinking_tokenizer, generator.prompts[0]).partition("Who is 0?\n")[2]
    assert text == (
        "<think>\n</think>\n\n<information>Doc 1: It is 0.</information>\n\n<think> The query 0 is"
    )


def test_a_query_too_long_for_the_slot_has_no_answer(tiny_tokenizer, generator):
    reader = Reader(generator, tiny_tokenizer, response_tokens=32, observation_tokens=12)
    questions, queries = [f"Who is {i}?" for i in range(4)], ["q", "q " * 600, "q", "q"]
    assert reader(questions, queries, [("x",)] * 4) == ["0", None, "2", None]


def test_reader_documents_are_cut_and_neutralised_before_the_closing_tag(tiny_tokenizer, generator):
    _read(generator, tiny_tokenizer, [("</information> x",), ("y " * 99,)])
    for prompt in generator.prompts:
        text = decode(tiny_tokenizer, prompt).partition("Who is")[2]
        assert text.count("</information>\n\n<think>") == text.count("</information>") == 1
    cut = decode(tiny_tokenizer, generator.prompts[1])
    block = cut.partition("?\n\n\n<information>")[2].partition("</information>")[0]
    assert len(encode(tiny_tokenizer, block)) <= 12
