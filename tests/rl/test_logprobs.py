"""Chunked log-probs and entropies against naive ones: values, gradients, memory, sharding."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from zerosearch_jax.parallel.mesh import ROWS, make_mesh
from zerosearch_jax.rl.logprobs import chunked_logprobs


def inputs(batch=2, length=13, width=8, vocab=50, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(keys[0], (batch, length, width), dtype)
    unembed = jax.random.normal(keys[1], (width, vocab))
    return hidden, unembed, jax.random.randint(keys[2], (batch, length), 0, vocab, jnp.int32)


def naive(hidden, unembed, targets, temperature=1.0):
    logits = jnp.matmul(hidden, unembed, precision="highest") / temperature
    log_p = jax.nn.log_softmax(logits, axis=-1)
    logprobs = jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]
    return logprobs, -(jnp.exp(log_p) * log_p).sum(-1)


def gradients(function, hidden, unembed, targets, by_logprob, by_entropy):
    """Gradients of sum(by_logprob * logprobs + by_entropy * entropy) by hidden and unembed."""

    def loss(h, u):
        logprobs, entropy = function(h, u, targets)
        return (by_logprob * logprobs + by_entropy * entropy).sum()

    return jax.jit(jax.grad(loss, argnums=(0, 1)))(hidden, unembed)


def naive_float64(hidden, unembed, targets, temperature):
    p = np.exp(hidden @ unembed / temperature)
    p = p / p.sum(-1, keepdims=True)
    at_target = np.take_along_axis(p, np.asarray(targets)[..., None], axis=-1)[..., 0]
    return np.log(at_target), -(p * np.log(p)).sum(-1)


def complex_step(function, x):
    """Returns the gradient of a real analytic function at x in float64: Im f(x + ih) / h."""
    gradient = np.zeros(x.shape)
    for index in np.ndindex(x.shape):
        moved = x.astype(np.complex128)
        moved[index] += 1e-30j
        gradient[index] = function(moved).imag / 1e-30
    return gradient


def compiled_gradients(function, *arguments):
    """Compiles values and gradients, including those of the entropy, of hidden and unembed."""

    def loss(h, u, t):
        logprobs, entropy = function(h, u, t)
        return (logprobs + entropy).sum()

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(*arguments).compile()


def largest_array(program):
    shapes = re.findall(r"\b(?:f|bf|s|u|pred)\d*\[([\d,]+)\]", program.as_text())
    return max(math.prod(map(int, shape.split(","))) for shape in shapes)


def test_by_hand():
    # One position with logits (log 1, log 2, log 5): probabilities 1/8, 1/4, 5/8.
    hidden = jnp.ones((1, 1, 1))
    unembed = jnp.log(jnp.array([[1.0, 2.0, 5.0]]))
    logprobs, entropy = chunked_logprobs(hidden, unembed, jnp.array([[2]]), chunk=4)
    p = np.array([1, 2, 5]) / 8
    np.testing.assert_allclose(logprobs, [[np.log(5 / 8)]], rtol=1e-6)
    np.testing.assert_allclose(entropy, [[-(p * np.log(p)).sum()]], rtol=1e-6)
    # Temperature 1/2 squares the odds to 1, 4 and 25 of 30.
    logprobs, _ = chunked_logprobs(hidden, unembed, jnp.array([[1]]), chunk=1, temperature=0.5)
    np.testing.assert_allclose(logprobs, [[np.log(4 / 30)]], rtol=1e-6)


@pytest.mark.parametrize("chunk", [1, 4, 13, 64])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_equals_naive(chunk, temperature):
    got = chunked_logprobs(*inputs(), chunk=chunk, temperature=temperature)
    for a, b in zip(got, naive(*inputs(), temperature), strict=True):
        assert a.shape == (2, 13) and a.dtype == jnp.float32
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_gradients_by_hand():
    # With logits 0 and 2 at temperature 1/2 the second token has p = sigmoid(4). By its logit x = 2
    # the derivative of log p is (1 - p) / temp, that of the entropy -(x / temp) p (1 - p) / temp.
    p = 1 / (1 + np.exp(-4))
    hidden, unembed, targets = jnp.ones((1, 1, 1)), jnp.array([[0.0, 2.0]]), jnp.array([[1]])

    def function(h, u, t):
        return chunked_logprobs(h, u, t, chunk=1, temperature=0.5)

    by_logprob = gradients(function, hidden, unembed, targets, 1.0, 0.0)
    np.testing.assert_allclose(by_logprob[1], [[-2 * (1 - p), 2 * (1 - p)]], rtol=1e-5)
    np.testing.assert_allclose(by_logprob[0], [[[4 * (1 - p)]]], rtol=1e-5)
    by_entropy = gradients(function, hidden, unembed, targets, 0.0, 1.0)
    np.testing.assert_allclose(by_entropy[1], [[8 * p * (1 - p), -8 * p * (1 - p)]], rtol=1e-5)
    np.testing.assert_allclose(by_entropy[0], [[[-16 * p * (1 - p)]]], rtol=1e-5)


@settings(deadline=None, max_examples=8)
@given(
    batch=st.integers(1, 3),
    length=st.integers(1, 9),
    vocab=st.integers(2, 20),
    chunk=st.integers(1, 10),
    temperature=st.floats(0.5, 2.0),
    entropy_scale=st.sampled_from([0.0, 0.01, -1.0, 2.0]),
)
def test_gradients_equal_naive(batch, length, vocab, chunk, temperature, entropy_scale):
    # numpy's random numbers, because jax would compile a program for each shape.
    random = np.random.default_rng(0)
    hidden, unembed = random.normal(size=(batch, length, 4)), random.normal(size=(4, vocab))
    targets = random.integers(0, vocab, (batch, length), np.int32)
    by_logprob = np.linspace(-1.0, 1.0, targets.size).reshape(targets.shape)
    by_entropy = entropy_scale * by_logprob[:, ::-1]

    def function(h, u, t):
        return chunked_logprobs(h, u, t, chunk=chunk, temperature=temperature)

    def total(h, u):
        logprobs, entropy = naive_float64(h, u, targets, temperature)
        return (by_logprob * logprobs + by_entropy * entropy).sum()

    got = gradients(function, hidden, unembed, targets, by_logprob, by_entropy)
    want = (
        complex_step(lambda h: total(h, unembed), hidden),
        complex_step(lambda u: total(hidden, u), unembed),
    )
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_without_entropy_the_logprobs_are_the_same():
    with_it, _ = chunked_logprobs(*inputs(), chunk=4)
    without, entropy = chunked_logprobs(*inputs(), chunk=4, with_entropy=False)
    np.testing.assert_array_equal(with_it, without)
    np.testing.assert_array_equal(entropy, np.zeros((2, 13)))


def test_without_entropy_its_cotangent_is_not_used():
    hidden, unembed, targets = inputs()

    def function(h, u, t):
        return chunked_logprobs(h, u, t, chunk=4, with_entropy=False)

    got = gradients(function, hidden, unembed, targets, 1.0, 1e6)
    want = gradients(naive, hidden, unembed, targets, 1.0, 0.0)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_bfloat16_hidden_accumulates_in_float32_and_weights_have_float32_gradients():
    hidden, unembed, targets = inputs(length=32, dtype=jnp.bfloat16)

    def total(h, u):
        logprobs, _ = chunked_logprobs(h, u, targets, chunk=8)
        return logprobs.sum(), logprobs

    step = jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))
    grads, logprobs = step(hidden, unembed)
    assert logprobs.dtype == jnp.float32
    assert [g.dtype for g in grads] == [jnp.bfloat16, jnp.float32]
    rounded = unembed.astype(jnp.bfloat16).astype(jnp.float32)
    want, _ = naive(hidden.astype(jnp.float32), rounded, targets)
    np.testing.assert_allclose(logprobs, want, atol=1e-4)


def test_bfloat16_gradients_are_within_the_rounding_of_their_factors():
    width, vocab, temperature = 16, 40, 0.8
    hidden, unembed, targets = inputs(3, 7, width, vocab, jnp.bfloat16)
    by_logprob = np.linspace(-1.0, 1.0, targets.size).reshape(targets.shape)
    by_entropy = 0.5 * by_logprob[:, ::-1]
    got = gradients(
        lambda h, u, t: chunked_logprobs(h, u, t, chunk=4, temperature=temperature),
        *(hidden, unembed, targets, by_logprob, by_entropy),
    )

    # The gradient of the logits in float64, from the rounded hidden states and weights.
    rows = np.asarray(hidden, np.float64)
    weights = np.asarray(unembed.astype(jnp.bfloat16), np.float64)

    def total(logits):
        logprobs, entropy = naive_float64(logits, np.eye(vocab), targets, temperature)
        return (by_logprob * logprobs + by_entropy * entropy).sum()

    by_logits = complex_step(total, rows @ weights).reshape(-1, vocab)
    # Rounding to bfloat16 changes a number by at most 2^-8 of it. The gradient of the logits is
    # rounded, and then the gradient of `hidden`; the gradient of `unembed` is float32.
    factors = [(by_logits, weights.T, 2), (rows.reshape(-1, width).T, by_logits, 1)]
    for gradient, (left, right, roundings) in zip(got, factors, strict=True):
        want = (left @ right).reshape(gradient.shape)
        bound = (np.abs(left) @ np.abs(right)).reshape(gradient.shape) * 2.0**-8
        assert (np.abs(np.asarray(gradient, np.float64) - want) <= 1.01 * roundings * bound).all()
        assert bound.max() < 0.01 * np.abs(want).max()


def test_bfloat16_weights_lose_nothing_of_a_frequent_target():
    """One target fills 70% of the positions of 256 chunks; the sum over them is rounded once."""
    _, unembed, targets = inputs(1, 4096, 8, 16)
    hidden = jnp.ones((1, 4096, 8), jnp.bfloat16)
    unembed = 0.01 * unembed.astype(jnp.bfloat16)
    targets = jnp.where(jnp.arange(4096) % 10 < 7, 3, targets)
    function = functools.partial(chunked_logprobs, chunk=16, with_entropy=False)
    _, got = gradients(function, hidden, unembed, targets, 1.0, 0.0)
    logits = np.asarray(hidden, np.float64)[0, :1] @ np.asarray(unembed, np.float64)
    p = np.exp(logits) / np.exp(logits).sum()
    want = np.ones((8, 1)) * (np.bincount(targets[0], minlength=16) - 4096 * p)
    error = np.linalg.norm(np.asarray(got, np.float64) - want) / np.linalg.norm(want)
    assert got.dtype == jnp.bfloat16 and error < 0.01


def test_the_whole_logits_are_never_in_memory():
    batch, length, width, vocab, chunk = 2, 512, 32, 8192, 32
    arguments = inputs(batch, length, width, vocab)
    elements = batch * length * vocab
    for with_entropy in (True, False):
        function = functools.partial(chunked_logprobs, chunk=chunk, with_entropy=with_entropy)
        program = compiled_gradients(function, *arguments)
        assert largest_array(program) == batch * chunk * vocab == elements // 16
        # At most three chunks of logits for any T (raw, shifted, exponentiated), the buffers of the
        # sum of the weights' gradient, and hidden states and their gradient in two orders.
        temp_bytes = program.memory_analysis().temp_size_in_bytes
        logits, weights = 3 * batch * chunk * vocab, 2 * width * vocab
        hidden = 4 * batch * length * width
        assert temp_bytes < (logits + weights + hidden) * 4 < elements * 4 / 3
    # The same measure sees whole logits in the naive program.
    whole = compiled_gradients(naive, *arguments)
    assert largest_array(whole) >= elements
    assert whole.memory_analysis().temp_size_in_bytes >= elements * 4


@settings(deadline=None, max_examples=10)
@given(st.integers(0, 2**16), st.sampled_from([0.0, 0.2, 1.0]), st.sampled_from([4, 16]))
def test_masked_positions_have_zero_results_and_gradients(seed, share, chunk):
    """Results equal the naive ones where the mask is 1; whole rows may be masked."""
    hidden, unembed, targets = inputs(batch=3, length=16)
    rng = np.random.default_rng(seed)
    mask = rng.random((3, 16)) < share
    mask[1] = False
    by_logprob, by_entropy = rng.normal(size=(2, 3, 16)).astype(np.float32)
    bad_targets = jnp.where(mask, targets, 0)

    def masked(h, u, t):
        return chunked_logprobs(h, u, t, mask=jnp.asarray(mask), chunk=chunk)

    for got, want in zip(
        masked(hidden, unembed, bad_targets), naive(hidden, unembed, targets), strict=True
    ):
        np.testing.assert_array_equal(np.asarray(got)[~mask], 0.0)
        np.testing.assert_allclose(np.asarray(got)[mask], np.asarray(want)[mask], atol=1e-5)
    got = gradients(masked, hidden, unembed, bad_targets, by_logprob, by_entropy)
    want = gradients(naive, hidden, unembed, targets, by_logprob * mask, by_entropy * mask)
    np.testing.assert_array_equal(np.asarray(got[0])[~mask], 0.0)
    for ours, theirs in zip(got, want, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_chunks_without_a_wanted_position_are_not_computed():
    """Hidden states of masked chunks may hold values that would make the gradient NaN."""
    hidden, unembed, targets = inputs(length=12)
    mask = jnp.zeros((2, 12)).at[:, 8:].set(1)  # sorted to the front: one chunk of 4
    spoilt = jnp.where(mask[..., None] > 0, hidden, jnp.nan)

    def loss(h, u):
        logprobs, entropy = chunked_logprobs(h, u, targets, mask=mask, chunk=4)
        return (logprobs + entropy).sum()

    got = jax.grad(loss, argnums=(0, 1))(spoilt, unembed)
    want = jax.grad(loss, argnums=(0, 1))(hidden, unembed)
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_sharded_rows_and_vocabulary_give_the_same_result_and_stay_sharded():
    batch, length, width, vocab, chunk = 4, 32, 8, 512, 16
    hidden, unembed, targets = inputs(batch, length, width, vocab)
    mesh = make_mesh(data=2, fsdp=2, tensor=2)

    def put(x, *spec):
        return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))

    def function(h, embedding, t):
        return chunked_logprobs(h, embedding.T, t, chunk=chunk)

    # Tied weights: the embedding's vocabulary is sharded over `tensor`, its width over `fsdp`.
    whole = hidden, unembed.T, targets
    sharded = put(hidden, ROWS), put(unembed.T, "tensor", "fsdp"), put(targets, ROWS)
    program = compiled_gradients(function, *sharded)
    got, want = program(*sharded), compiled_gradients(function, *whole)(*whole)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    # A device holds the logits of a quarter of the rows and half of the vocabulary.
    assert largest_array(program) == (batch // 4) * chunk * (vocab // 2)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"chunk": 0}, "chunk is 0"),
        ({"temperature": 0.0}, "temperature is 0"),
        ({"targets": jnp.zeros((2, 3), jnp.int32)}, "targets"),
        ({"unembed": jnp.zeros((9, 50))}, "unembed"),
    ],
)
def test_bad_arguments_are_refused(change, message):
    hidden, unembed, targets = inputs()
    arguments = {"hidden": hidden, "unembed": unembed, "targets": targets, "chunk": 4} | change
    with pytest.raises(ValueError, match=message):
        chunked_logprobs(**arguments)
