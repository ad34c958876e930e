"""Cached, bucketed, windowed decoding against a naive loop over the whole forward pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from zerosearch_jax.errors import UserError
from zerosearch_jax.generate.generator import Generator
from zerosearch_jax.generate.sampling import Sampling, sample
from zerosearch_jax.generate.stops import build_stop_table
from zerosearch_jax.models.transformer import abstract_model
from zerosearch_jax.parallel.mesh import make_mesh

MAX_TOKENS = 64
KEY = jax.random.key(11)
SAMPLED, GREEDY = Sampling(temperature=1.2), Sampling(temperature=0.0)
# Every id is three digits, so that text can be cut anywhere between and inside tokens.
PIECES = [f"{i:03d}".encode() for i in range(320)]
NO_STOPS = build_stop_table(PIECES, [])
PROMPTS = [[5, 7, 9], [4] * 6 + [8] * 13, [300], [17, 18, 19, 20, 21, 22]]


@pytest.fixture(scope="module")
def naive(tiny_config, tiny_params):
    """`(context, stream, n, sampling, stops, end_ids) -> tokens, logprobs`, no cache at all."""
    graphdef, _ = abstract_model(tiny_config)

    @jax.jit
    def last_logits(tokens, length):
        model = nnx.merge(graphdef, tiny_params)
        hidden = model(tokens, jnp.arange(MAX_TOKENS)[None], jnp.zeros_like(tokens))
        return model.logits(hidden[:, length - 1])

    draw = jax.jit(sample, static_argnums=2)

    def run(context, stream, n, sampling, stops=(), end_ids=()):
        context, tokens, logprobs, text = list(context), [], [], b""
        key = jax.random.fold_in(jax.random.fold_in(KEY, stream[0]), stream[1])
        for _ in range(n):
            padded = np.zeros((1, MAX_TOKENS), np.int32)
            padded[0, : len(context)] = context
            keys = jax.random.fold_in(key, len(context) - 1)[None]
            token, logprob = draw(last_logits(padded, len(context)), keys, sampling)
            context.append(int(token[0]))
            tokens.append(int(token[0]))
            logprobs.append(float(logprob[0]))
            text += PIECES[tokens[-1]]
            if tokens[-1] in end_ids or any(stop.encode() in text for stop in stops):
                break
        return tokens, logprobs

    return run


@pytest.fixture
def make_generator(tiny_config, tiny_params):
    def make(stops=(), **options):
        settings = dict(
            stop_table=build_stop_table(PIECES, stops),
            end_ids=[],
            slots=4,
            max_tokens=MAX_TOKENS,
            mesh=make_mesh(),
            prefill_rows=2,
            prefill_buckets=(4, 8),
            window_tokens=32,
        )
        generator = Generator(tiny_config, **(settings | options))
        generator.load(tiny_params)
        return generator

    return make


def decode(generator, slots, streams, n=8, sampling=SAMPLED):
    return generator.decode(slots, key=KEY, streams=streams, max_new_tokens=n, sampling=sampling)


def assert_same(generation, expected):
    tokens, logprobs = expected
    assert generation.tokens == tokens
    np.testing.assert_allclose(generation.logprobs, logprobs, atol=1e-4)


def play(generator, naive, sampling):
    """Start, decode, extend two slots, decode them, start one anew; all against `naive`."""
    contexts = [list(prompt) for prompt in PROMPTS]
    generator.start(range(4), contexts)
    assert generator.prefilled_tokens == sum(len(prompt) - 1 for prompt in PROMPTS)
    for slot, generation in enumerate(decode(generator, range(4), [(s, 0) for s in range(4)],
                                             sampling=sampling)):  # fmt: skip
        assert_same(generation, naive(contexts[slot], (slot, 0), 8, sampling))
        assert generation.finish == "length"
        contexts[slot] += generation.tokens
    assert generator.decoded_tokens == 32

    before = generator.prefilled_tokens
    inserted = {3: [40, 41, 42, 43, 44, 45, 46, 47, 48, 49], 0: [77]}
    generator.extend(list(inserted), list(inserted.values()))
    # The pending token goes in, the last inserted one becomes pending: nothing is fed twice.
    assert generator.prefilled_tokens - before == 11
    for slot, generation in zip(
        inserted, decode(generator, [3, 0], [(3, 1), (0, 1)], sampling=sampling), strict=True
    ):
        contexts[slot] += inserted[slot]
        assert_same(generation, naive(contexts[slot], (slot, 1), 8, sampling))
        contexts[slot] += generation.tokens

    new = [9, 8, 7, 6, 5]
    generator.start([3], [new])
    (generation,) = decode(generator, [3], [(6, 6)], sampling=sampling)
    assert_same(generation, naive(new, (6, 6), 8, sampling))
    # All that happened meanwhile has left the other slots as they were.
    for slot, generation in zip(
        (2, 1, 0), decode(generator, [2, 1, 0], [(s, 2) for s in (2, 1, 0)], sampling=sampling),
        strict=True,
    ):  # fmt: skip
        assert_same(generation, naive(contexts[slot], (slot, 2), 8, sampling))
    assert generator.room(0) == MAX_TOKENS - len(contexts[0]) - 8


@pytest.mark.parametrize("sampling", [SAMPLED, GREEDY])
def test_equals_the_full_forward(make_generator, naive, sampling):
    play(make_generator(), naive, sampling)


def test_equals_the_full_forward_on_a_mesh(make_generator, naive):
    play(make_generator(mesh=make_mesh(data=2, fsdp=2, tensor=2)), naive, SAMPLED)


def test_a_draw_depends_on_neither_slot_nor_neighbours_nor_calls(make_generator):
    generator = make_generator()
    generator.start(range(4), PROMPTS)
    together = decode(generator, range(4), [(s, 0) for s in range(4)])
    generator.start([2], [PROMPTS[1]])
    first = decode(generator, [2], [(1, 0)], n=3)[0]
    second = decode(generator, [2], [(1, 0)], n=5)[0]
    assert first.tokens + second.tokens == together[1].tokens
    generator.start([2], [PROMPTS[1]])
    assert decode(generator, [2], [(1, 1)])[0].tokens != together[1].tokens


def test_the_cache_ends_the_text_and_no_token_is_lost(make_generator, naive):
    generator = make_generator(max_tokens=32)
    prompt = list(range(100, 128))
    generator.start([1, 3], [prompt, prompt[:5]])
    full, short = decode(generator, [1, 3], [(0, 0), (1, 0)])
    assert_same(full, naive(prompt, (0, 0), 4, SAMPLED))
    assert_same(short, naive(prompt[:5], (1, 0), 8, SAMPLED))
    assert full.finish == "length"
    assert (generator.room(1), generator.room(3)) == (0, 32 - 13)
    (nothing,) = decode(generator, [1], [(0, 1)])
    assert (nothing.tokens, nothing.logprobs, nothing.finish) == ([], [], "length")
    with pytest.raises(UserError, match="33 tokens do not fit a slot of 32"):
        generator.extend([1], [[3]])
    generator.extend([3], [list(range(18))])
    assert generator.room(3) == 1
    (last,) = decode(generator, [3], [(1, 1)])
    assert_same(last, naive(prompt[:5] + short.tokens + list(range(18)), (1, 1), 1, SAMPLED))
    with pytest.raises(UserError, match="do not fit"):
        generator.start([0], [[1] * 33])


def test_stop_strings_that_straddle_tokens(make_generator, naive):
    free = [naive(prompt, (slot, 0), 8, SAMPLED)[0] for slot, prompt in enumerate(PROMPTS)]
    text = [b"".join(PIECES[t] for t in tokens).decode() for tokens in free]
    stops = (text[0][8:10], text[1][13:20])  # over two tokens; over four
    generator = make_generator(stops)
    generator.start(range(4), PROMPTS)
    generations = decode(generator, range(4), [(s, 0) for s in range(4)])
    for slot, generation in enumerate(generations):
        assert_same(generation, naive(PROMPTS[slot], (slot, 0), 8, SAMPLED, stops))
        written = b"".join(PIECES[t] for t in generation.tokens).decode()
        stopped = any(stop in written for stop in stops)
        assert generation.finish == ("stop" if stopped else "length")
    assert len(generations[0].tokens) <= 4
    assert len(generations[1].tokens) <= 7
    # What a text wrote before its last stop is not held against the next one.
    generator.extend([0], [[1]])
    (generation,) = decode(generator, [0], [(0, 9)])
    context = PROMPTS[0] + generations[0].tokens + [1]
    assert_same(generation, naive(context, (0, 9), 8, SAMPLED, stops))


def test_end_tokens(make_generator, naive):
    end = naive(PROMPTS[0], (0, 0), 8, SAMPLED)[0][2]
    generator = make_generator(end_ids=[319, end])
    generator.start([0, 3], [PROMPTS[0], PROMPTS[3]])
    ended, other = decode(generator, [0, 3], [(0, 0), (3, 0)])
    assert_same(ended, naive(PROMPTS[0], (0, 0), 8, SAMPLED, end_ids=[319, end]))
    assert (ended.tokens[-1], ended.finish) == (end, "end")
    assert_same(other, naive(PROMPTS[3], (3, 0), 8, SAMPLED, end_ids=[319, end]))


def test_more_tokens_than_the_model_has_positions_are_refused(tiny_config):
    with pytest.raises(UserError, match="max_tokens=2000"):
        Generator(tiny_config, stop_table=NO_STOPS, end_ids=[], slots=1, max_tokens=2000,
                  mesh=make_mesh())  # fmt: skip
