"""Tests text completion with more prompts than slots."""

import jax
import pytest

from zerosearch_jax.generate.generator import Generator
from zerosearch_jax.generate.sampling import Sampling
from zerosearch_jax.generate.stops import build_stop_table
from zerosearch_jax.generate.texts import TextGenerator
from zerosearch_jax.models.transformer import param_shardings
from zerosearch_jax.parallel.mesh import make_mesh
from zerosearch_jax.search.http_client import TooLong
from zerosearch_jax.text.tokenizer import decode, encode, token_bytes


@pytest.fixture(scope="module")
def make_texts(tiny_config, tiny_params, tiny_tokenizer):
    pieces = token_bytes(tiny_tokenizer)
    pieces += [b""] * (tiny_config.vocab_size - len(pieces))

    def make(**options):
        settings = dict(slots=2, mesh=make_mesh())
        generator = Generator(
            tiny_config,
            stop_table=build_stop_table(pieces, []),
            end_ids=[tiny_tokenizer.eos_token_id],
            max_tokens=64,
            prefill_buckets=(32,),
            window_tokens=64,
            **(settings | options),
        )
        generator.load(jax.device_put(tiny_params, param_shardings(tiny_params, generator.mesh)))
        return TextGenerator(
            generator, tiny_tokenizer, sampling=Sampling(), max_new_tokens=6, key=jax.random.key(2)
        )

    return make


@pytest.fixture(scope="module")
def texts(make_texts):
    return make_texts()


PROMPTS = ["the capital of Chad", "<search> Doc 1", "Answer", "Beijing 12", "a b"]
KEYS = [(3, 0), (3, 1), (4, 0), (9, 2), (10, 0)]


def test_a_text_depends_only_on_its_prompt_and_key(texts):
    together = texts(PROMPTS, KEYS)
    assert len(set(together)) == 5
    assert [texts([p], [k])[0] for p, k in zip(PROMPTS, KEYS, strict=True)] == together
    assert texts(PROMPTS[::-1], KEYS[::-1]) == together[::-1]
    assert texts(PROMPTS[:1], [(8, 8)]) != together[:1]


def test_a_prompt_that_is_too_long_fails_alone(texts):
    long = "the capital of Chad " * 20
    replies = texts([PROMPTS[0], long, PROMPTS[1]], [KEYS[0], (8, 8), KEYS[1]])
    assert replies[::2] == texts(PROMPTS[:2], KEYS[:2])
    assert isinstance(replies[1], TooLong) and "at most 63" in str(replies[1])
    assert isinstance(texts([long], [(8, 8)])[0], TooLong)


def test_a_text_is_cut_so_that_prompt_and_completion_fit_the_slot(texts, tiny_tokenizer):
    long = "the capital of Chad " * 5000
    cut = texts.cut(long, PROMPTS[0])
    assert long.startswith(cut) and len(encode(tiny_tokenizer, cut)) > 10
    assert len(encode(tiny_tokenizer, PROMPTS[0] + cut)) + 6 <= texts.generator.max_tokens
    assert texts.cut("Chad", PROMPTS[0]) == "Chad"
    prompt = PROMPTS[0] * 20
    assert isinstance(texts([prompt + texts.cut(long, prompt)], [(8, 8)])[0], TooLong)


def test_a_text_is_the_decoded_generation_without_the_prompt(texts, tiny_tokenizer):
    (text,) = texts(PROMPTS[:1], KEYS[:1])
    texts.generator.start([1], [encode(tiny_tokenizer, PROMPTS[0])])
    (generation,) = texts.generator.decode(
        [1], key=texts.key, streams=KEYS[:1], max_new_tokens=6, sampling=Sampling()
    )
    assert text == decode(tiny_tokenizer, generation.tokens)


def test_a_text_begins_with_the_thought_that_the_template_opened(texts, thinking_tokenizer):
    options = dict(sampling=Sampling(), max_new_tokens=6, key=texts.key)
    thinking = TextGenerator(texts.generator, thinking_tokenizer, **options)
    (text,) = thinking(PROMPTS[:1], KEYS[:1])
    assert text.startswith("<think>") and len(text) > len("<think>")


def test_few_prompts_are_spread_over_all_replicas(make_texts, texts, monkeypatch):
    """Gives three prompts to two replicas of five slots each, twice."""
    spread = make_texts(slots=10, mesh=make_mesh(data=2))
    generator, started = spread.generator, []
    start = generator.start_decoding

    def start_decoding(slots, **options):
        started.append([generator.replica_of(slot) for slot in slots])
        start(slots, **options)

    monkeypatch.setattr(generator, "start_decoding", start_decoding)
    for _ in range(2):
        assert spread(PROMPTS[:3], KEYS[:3]) == texts(PROMPTS[:3], KEYS[:3])
    assert started == [[0, 1, 0]] * 2


def test_no_prompts_give_no_texts(texts):
    assert texts([], []) == []
