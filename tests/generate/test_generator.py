"""Compares the generator with a naive loop that runs the whole forward pass for each token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from zerosearch_jax.errors import UserError
from zerosearch_jax.generate.abstract import abstract_generator
from zerosearch_jax.generate.generator import Generator
from zerosearch_jax.generate.sampling import Sampling, sample
from zerosearch_jax.generate.stops import build_stop_table
from zerosearch_jax.models.decode_weights import SUMMED_AXES, output_major
from zerosearch_jax.models.transformer import PARAM_AXES, abstract_model, param_shardings
from zerosearch_jax.parallel.mesh import make_mesh

MAX_TOKENS = 64
KEY = jax.random.key(11)
SAMPLED, GREEDY = Sampling(temperature=1.2), Sampling(temperature=0.0)
# Every token is three digits, so stop strings can begin and end inside tokens.
PIECES = [f"{i:03d}".encode() for i in range(320)]
NO_STOPS = build_stop_table(PIECES, [])
PROMPTS = [[5, 7, 9], [4] * 6 + [8] * 13, [300], [17, 18, 19, 20, 21, 22]]


@pytest.fixture(scope="module")
def naive(tiny_config, tiny_params):
    """`(context, stream, n, sampling, stops, end_ids) -> tokens, logprobs`, without a cache."""
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


def load(generator, params):
    generator.load(jax.device_put(params, param_shardings(params, generator.mesh)))


@pytest.fixture(scope="module")
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
            decode_rows=(1, 2),
            chunk_tokens=3,
        )
        generator = Generator(tiny_config, **(settings | options))
        load(generator, tiny_params)
        return generator

    return make


def decode(generator, slots, streams, n=8, sampling=SAMPLED):
    return generator.decode(slots, key=KEY, streams=streams, max_new_tokens=n, sampling=sampling)


def assert_same(generation, expected):
    tokens, logprobs = expected
    assert generation.tokens == tokens
    np.testing.assert_allclose(generation.logprobs, logprobs, atol=1e-4)


def check_against_naive(generator, naive, sampling):
    """Starts and decodes all slots, extends two, restarts one; compares all tokens with `naive`."""
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
    # The pending token is fed and the last inserted token becomes pending.
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
    # The calls above left the other slots unchanged.
    for slot, generation in zip(
        (2, 1, 0), decode(generator, [2, 1, 0], [(s, 2) for s in (2, 1, 0)], sampling=sampling),
        strict=True,
    ):  # fmt: skip
        assert_same(generation, naive(contexts[slot], (slot, 2), 8, sampling))
    assert generator.free_tokens(0) == MAX_TOKENS - len(contexts[0]) - 8


@pytest.mark.parametrize("sampling", [SAMPLED, GREEDY])
def test_decoding_equals_the_full_forward_pass(make_generator, naive, sampling):
    check_against_naive(make_generator(), naive, sampling)


def test_decoding_on_a_mesh_equals_the_full_forward_pass(make_generator, naive):
    generator = make_generator(mesh=make_mesh(data=2, fsdp=2, tensor=2))
    check_against_naive(generator, naive, SAMPLED)


def test_draws_do_not_depend_on_slot_or_batch_or_calls(make_generator):
    generator = make_generator()
    generator.start(range(4), PROMPTS)
    together = decode(generator, range(4), [(s, 0) for s in range(4)])
    generator.start([2], [PROMPTS[1]])
    first = decode(generator, [2], [(1, 0)], n=3)[0]
    second = decode(generator, [2], [(1, 0)], n=5)[0]
    assert first.tokens + second.tokens == together[1].tokens
    generator.start([2], [PROMPTS[1]])
    assert decode(generator, [2], [(1, 1)])[0].tokens != together[1].tokens


def test_a_full_slot_ends_the_text_without_losing_tokens(make_generator, naive):
    generator = make_generator(max_tokens=32)
    prompt = list(range(100, 128))
    generator.start([1, 3], [prompt, prompt[:5]])
    full, short = decode(generator, [1, 3], [(0, 0), (1, 0)])
    assert_same(full, naive(prompt, (0, 0), 4, SAMPLED))
    assert_same(short, naive(prompt[:5], (1, 0), 8, SAMPLED))
    assert full.finish == "length"
    assert (generator.free_tokens(1), generator.free_tokens(3)) == (0, 32 - 13)
    (nothing,) = decode(generator, [1], [(0, 1)])
    assert (nothing.tokens, nothing.logprobs, nothing.finish) == ([], [], "length")
    with pytest.raises(UserError, match="33 tokens do not fit a slot of 32"):
        generator.extend([1], [[3]])
    generator.extend([3], [list(range(18))])
    assert generator.free_tokens(3) == 1
    (last,) = decode(generator, [3], [(1, 1)])
    assert_same(last, naive(prompt[:5] + short.tokens + list(range(18)), (1, 1), 1, SAMPLED))
    with pytest.raises(UserError, match="do not fit"):
        generator.start([0], [[1] * 33])


def test_stop_strings_across_tokens_end_the_text(make_generator, naive):
    free = [naive(prompt, (slot, 0), 8, SAMPLED)[0] for slot, prompt in enumerate(PROMPTS)]
    text = [b"".join(PIECES[t] for t in tokens).decode() for tokens in free]
    stops = (text[0][8:10], text[1][13:20])  # across two tokens; across four
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
    # The automaton restarts, so text before the last stop does not stop the next decoding.
    generator.extend([0], [[1]])
    (generation,) = decode(generator, [0], [(0, 9)])
    context = PROMPTS[0] + generations[0].tokens + [1]
    assert_same(generation, naive(context, (0, 9), 8, SAMPLED, stops))


def test_end_tokens_end_the_text(make_generator, naive):
    """Each of three slots stops at another id; the fourth stops only if it samples one."""
    free = [naive(PROMPTS[slot], (slot, 0), 8, SAMPLED)[0] for slot in range(3)]
    ends = [next(t for t in row if sum(t in other for other in free) == 1) for row in free]
    generator = make_generator(end_ids=ends)
    generator.start(range(4), PROMPTS)
    generations = decode(generator, range(4), [(slot, 0) for slot in range(4)])
    for slot, generation in enumerate(generations):
        assert_same(generation, naive(PROMPTS[slot], (slot, 0), 8, SAMPLED, end_ids=ends))
    assert [generation.tokens[-1] for generation in generations[:3]] == ends
    assert {generation.finish for generation in generations[:3]} == {"end"}


def test_max_tokens_beyond_the_models_positions_raises(tiny_config):
    with pytest.raises(UserError, match="max_tokens=2000"):
        Generator(tiny_config, stop_table=NO_STOPS, end_ids=[], slots=1, max_tokens=2000,
                  mesh=make_mesh())  # fmt: skip
    with pytest.raises(UserError, match="max_tokens=2000"):
        abstract_generator(tiny_config, stop_table=NO_STOPS, sampling=GREEDY, slots=1,
                           max_tokens=2000, mesh=make_mesh(), prefill_rows=1, prefill_tokens=8,
                           chunk_tokens=1, dtype=jnp.float32, int8_weights=False)  # fmt: skip


def test_slots_with_the_same_prompt_share_one_prefill(make_generator, naive):
    """Covers members of a group, a late member, and one that takes over a member's slot."""
    generator = make_generator()
    group, other = PROMPTS[1], PROMPTS[3]
    generator.start([0, 1, 2], [group, other, group])
    once = len(group) - 1 + len(other) - 1
    assert generator.prefilled_tokens == once
    first = decode(generator, [0, 1, 2], [(0, 0), (1, 0), (2, 0)])
    generator.extend([0], [[50, 51]])
    generator.start([3], [group])  # copied from a slot that has decoded since
    generator.start([2], [group])  # the slot already holds its prompt
    assert generator.prefilled_tokens == once + 2
    late = decode(generator, [2, 3, 0], [(3, 0), (4, 0), (0, 1)])
    for slot, (generation, stream) in enumerate(zip(first, [(0, 0), (1, 0), (2, 0)], strict=True)):
        assert_same(generation, naive(other if slot == 1 else group, stream, 8, SAMPLED))
    assert_same(late[0], naive(group, (3, 0), 8, SAMPLED))
    assert_same(late[1], naive(group, (4, 0), 8, SAMPLED))
    assert_same(late[2], naive(group + first[0].tokens + [50, 51], (0, 1), 8, SAMPLED))
    # Two slots exchange their prompts, so neither can be copied from.
    generator.start([0, 1], [other, group])
    swapped = decode(generator, [0, 1], [(5, 0), (6, 0)])
    assert_same(swapped[0], naive(other, (5, 0), 8, SAMPLED))
    assert_same(swapped[1], naive(group, (6, 0), 8, SAMPLED))


def test_loading_weights_forgets_cached_prompts(make_generator, naive, tiny_params):
    generator = make_generator()
    generator.start([0], [PROMPTS[1]])
    load(generator, jax.tree.map(lambda x: 0.5 * x, tiny_params))
    load(generator, tiny_params)
    generator.start([0, 1], [PROMPTS[1]] * 2)
    assert generator.prefilled_tokens == 2 * (len(PROMPTS[1]) - 1)


def test_each_replica_prefills_a_shared_prompt_once(make_generator, naive):
    generator = make_generator(mesh=make_mesh(data=2))
    assert [generator.replica_of(slot) for slot in range(4)] == [0, 0, 1, 1]
    generator.start(range(4), [PROMPTS[1]] * 4)
    assert generator.prefilled_tokens == 2 * (len(PROMPTS[1]) - 1)
    for slot, generation in enumerate(decode(generator, range(4), [(s, 0) for s in range(4)])):
        assert_same(generation, naive(PROMPTS[1], (slot, 0), 8, SAMPLED))


def test_decode_chunk_returns_when_enough_slots_have_stopped(make_generator, naive):
    generator = make_generator(chunk_tokens=8)
    generator.start(range(4), PROMPTS)
    for slot, limit in enumerate((2, 5, 5, 30)):
        generator.start_decoding([slot], streams=[(slot, 0)], max_new_tokens=limit)
    stopped = [generator.decode_chunk(key=KEY, sampling=GREEDY, min_finished_fraction=0.25)]
    assert [list(s) for s in stopped] == [[0]]
    generator.extend([0], [[9]])  # while the other slots are still decoding
    generator.start_decoding([0], streams=[(0, 1)], max_new_tokens=3)
    while len(stopped) < 20 and sum(map(len, stopped)) < 5:
        stopped.append(generator.decode_chunk(key=KEY, sampling=GREEDY, min_finished_fraction=0.5))
    assert generator.decode_chunk(key=KEY, sampling=GREEDY) == {}
    parts = [(slot, generation) for part in stopped for slot, generation in part.items()]
    again = [generation for slot, generation in parts if slot == 0]
    context = PROMPTS[0] + again[0].tokens + [9]
    assert_same(again[0], naive(PROMPTS[0], (0, 0), 2, GREEDY))
    assert_same(again[1], naive(context, (0, 1), 3, GREEDY))
    for slot, generation in parts:
        if slot:
            assert_same(generation, naive(PROMPTS[slot], (slot, 0), (5, 5, 30)[slot - 1], GREEDY))


@pytest.mark.parametrize("decode_rows", [(), (1, 2)])
def test_a_decode_chunk_makes_no_implicit_host_transfer(make_generator, decode_rows):
    generator = make_generator(decode_rows=decode_rows)
    generator.start(range(4), PROMPTS)
    generator.warm_up([SAMPLED])
    with jax.transfer_guard("disallow"):
        assert len(decode(generator, range(4), [(s, 0) for s in range(4)], n=3)) == 4


TURNS = st.lists(
    st.tuples(
        st.integers(0, 7),  # max_new_tokens
        st.lists(st.integers(0, 319), min_size=1, max_size=14),  # tokens inserted afterwards
        st.integers(0, 3),  # rounds that the insertion is delayed
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    jobs=st.lists(st.tuples(st.integers(0, 3), TURNS), min_size=1, max_size=7),
    fraction=st.sampled_from([0.1, 0.5, 1.0]),
)
def test_any_schedule_samples_the_tokens_of_the_naive_loop(scheduled, naive, jobs, fraction):
    """Runs random jobs greedily and compares every generation with the naive loop.

    Jobs take free slots, share prompts, wait for inserted tokens while others decode, stop at stop
    strings, and fill their slots.
    """
    generator, stops = scheduled
    prefilled = generator.prefilled_tokens
    queue, active, parked = list(enumerate(jobs)), {}, {}
    free, observations = list(range(generator.slots)), {}
    contexts, sampled = {}, {}
    while queue or active:
        new = {}
        while queue and free:
            slot, (number, (prompt, turns)) = free.pop(0), queue.pop(0)
            new[slot] = number
            active[slot] = (number, list(turns))
            contexts[number], sampled[number] = list(PROMPTS[prompt]), []
        if new:
            generator.start(list(new), [contexts[number] for number in new.values()])
        ready = dict.fromkeys(new)
        for slot, rounds in list(parked.items()):
            parked[slot] = rounds - 1
            if rounds <= 0:
                del parked[slot]
                ready[slot] = observations.pop(slot)
        inserted = {slot: tokens for slot, tokens in ready.items() if tokens}
        if inserted:
            generator.extend(list(inserted), list(inserted.values()))
        for slot in ready:
            generator.start_decoding([slot], streams=[(0, 0)], max_new_tokens=active[slot][1][0][0])
        for slot, generation in generator.decode_chunk(
            key=KEY, sampling=GREEDY, min_finished_fraction=fraction
        ).items():
            number, turns = active[slot]
            limit, tokens, delay = turns.pop(0)
            free_tokens = MAX_TOKENS - len(contexts[number])
            expected = naive(contexts[number], (0, 0), min(limit, free_tokens), GREEDY, stops)
            assert_same(generation, expected)
            contexts[number] += generation.tokens
            if turns and len(tokens) <= generator.free_tokens(slot):
                contexts[number] += tokens
                observations[slot], parked[slot] = tokens, delay
            else:
                del active[slot]
                free.append(slot)
    assert generator.prefilled_tokens - prefilled <= sum(len(c) for c in contexts.values())


def start_decoding(generator, limits):
    """Starts all slots; slot n may sample `limits[n]` tokens."""
    generator.start(range(4), PROMPTS)
    for slot, limit in enumerate(limits):
        generator.start_decoding([slot], streams=[(slot, 0)], max_new_tokens=limit)
    generator.decoded_tokens = 0


def test_if_slots_exceed_decode_rows_the_shortest_decode_first(make_generator):
    generator = make_generator(window_tokens=4)
    sizes = [len(prompt) for prompt in PROMPTS]
    start_decoding(generator, [3] * 4)
    first = generator.decode_chunk(key=KEY, sampling=GREEDY)
    assert generator.decoded_tokens == 6
    assert set(first) == set(sorted(range(4), key=lambda slot: -(-sizes[slot] // 4))[:2])
    rest = generator.decode_chunk(key=KEY, sampling=GREEDY)
    assert set(first) | set(rest) == set(range(4))


def test_a_chunk_ends_when_a_smaller_program_can_hold_the_rest(make_generator):
    generator = make_generator(decode_rows=(2, 4))
    start_decoding(generator, [8, 1, 2, 8])
    stopped = generator.decode_chunk(key=KEY, sampling=GREEDY, min_finished_fraction=1.0)
    assert set(stopped) == {1, 2}
    assert generator.decoded_tokens == 1 + 3 * 2
    # Two rows use the program for two, and there is no smaller one to switch to.
    assert not generator.decode_chunk(key=KEY, sampling=GREEDY, min_finished_fraction=1.0)
    assert generator.decoded_tokens == 7 + 2 * 3


def test_decode_until_runs_chunks_until_enough_slots_have_stopped(make_generator, naive):
    generator = make_generator(decode_rows=(2,))
    limits = [8, 1, 2, 8]
    start_decoding(generator, limits)
    stopped = generator.decode_until(key=KEY, sampling=GREEDY, min_finished_fraction=0.5)
    assert set(stopped) in ({0, 1, 2}, {1, 2, 3})  # one of the two rows is free
    stopped |= generator.decode_until(key=KEY, sampling=GREEDY, min_finished_fraction=1.0)
    for slot, limit in enumerate(limits):
        assert_same(stopped[slot], naive(PROMPTS[slot], (slot, 0), limit, GREEDY))
    assert generator.decode_until(key=KEY, sampling=GREEDY, min_finished_fraction=1.0) == {}


def test_decode_rows_below_one_raise(make_generator):
    with pytest.raises(UserError, match=r"decode_rows=\(0, 4\) must all be at least 1"):
        make_generator(decode_rows=(0, 4))


@pytest.fixture(scope="module")
def scheduled(make_generator, naive):
    """A generator that all schedules reuse without clearing its slots, and its stop strings."""
    text = b"".join(PIECES[t] for t in naive(PROMPTS[1], (0, 0), 6, GREEDY)[0]).decode()
    stops = (text[4:9], "31")
    return make_generator(stops, slots=3, decode_rows=(1, 2)), stops


def test_int8_weights_sample_like_a_float_model_with_rounded_weights(make_generator, tiny_params):

    def rounded(path, leaf):
        names = [entry.key for entry in path if getattr(entry, "key", None) in SUMMED_AXES]
        if not names:
            return leaf
        stacked = leaf.ndim - len(PARAM_AXES[names[-1]])
        summed = tuple(axis + stacked for axis in SUMMED_AXES[names[-1]])
        coarse = output_major(leaf, summed, int8=True)
        inner = range(leaf.ndim - len(summed), leaf.ndim)
        restored = coarse.values * jnp.expand_dims(coarse.scale, tuple(inner))
        return jnp.moveaxis(restored, tuple(inner), summed)

    exact = make_generator()
    load(exact, jax.tree_util.tree_map_with_path(rounded, tiny_params))
    for mesh in (make_mesh(), make_mesh(data=2, tensor=2)):
        coarse = make_generator(int8_weights=True, mesh=mesh)
        for generator in (exact, coarse):
            generator.start(range(4), PROMPTS)
        streams = [(s, 0) for s in range(4)]
        for one, other in zip(
            decode(exact, range(4), streams), decode(coarse, range(4), streams), strict=True
        ):
            assert_same(other, (one.tokens, one.logprobs))
