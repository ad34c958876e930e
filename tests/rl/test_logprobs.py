import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

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


def test_by_hand():
    # One position with logits (log 1, log 2, log 5): probabilities 1/8, 1/4, 5/8.
    hidden = jnp.ones((1, 1, 1))
    unembed = jnp.log(jnp.array([[1.0, 2.0, 5.0]]))
    logprobs, entropy = chunked_logprobs(hidden, unembed, jnp.array([[2]]), chunk=4)
    p = np.array([1, 2, 5]) / 8
    np.testing.assert_allclose(logprobs, [[np.log(5 / 8)]], rtol=1e-6)
    np.testing.assert_allclose(entropy, [[-(p * np.log(p)).sum()]], rtol=1e-6)
    # Temperature 1/2 squares the odds: 1, 4, 25 of 30.
    logprobs, _ = chunked_logprobs(hidden, unembed, jnp.array([[1]]), chunk=1, temperature=0.5)
    np.testing.assert_allclose(logprobs, [[np.log(4 / 30)]], rtol=1e-6)


@pytest.mark.parametrize("chunk", [1, 4, 13, 64])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_equals_naive(chunk, temperature):
    got = chunked_logprobs(*inputs(), chunk=chunk, temperature=temperature)
    for a, b in zip(got, naive(*inputs(), temperature), strict=True):
        assert a.shape == (2, 13) and a.dtype == jnp.float32
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_gradients_equal_naive():
    hidden, unembed, targets = inputs()
    weights = jnp.linspace(-1.0, 1.0, targets.size).reshape(targets.shape)

    def total(function):
        def loss(h, u):
            logprobs, entropy = function(h, u, targets)
            return (weights * logprobs + 0.1 * entropy).sum()

        return jax.grad(loss, argnums=(0, 1))

    got = total(lambda h, u, t: chunked_logprobs(h, u, t, chunk=4))(hidden, unembed)
    for a, b in zip(got, total(naive)(hidden, unembed), strict=True):
        assert np.abs(np.asarray(b)).max() > 0.1
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_without_entropy_the_logprobs_are_the_same():
    with_it, _ = chunked_logprobs(*inputs(), chunk=4)
    without, entropy = chunked_logprobs(*inputs(), chunk=4, with_entropy=False)
    np.testing.assert_array_equal(with_it, without)
    np.testing.assert_array_equal(entropy, np.zeros((2, 13)))


def test_bfloat16_hidden_is_accumulated_in_float32_and_weights_keep_float32_gradients():
    hidden, unembed, targets = inputs(length=32, dtype=jnp.bfloat16)

    def total(h, u):
        logprobs, _ = chunked_logprobs(h, u, targets, chunk=8)
        return logprobs.sum(), logprobs

    (gradients, logprobs) = jax.grad(total, argnums=(0, 1), has_aux=True)(hidden, unembed)
    assert logprobs.dtype == jnp.float32
    assert [g.dtype for g in gradients] == [jnp.bfloat16, jnp.float32]
    rounded = unembed.astype(jnp.bfloat16).astype(jnp.float32)
    want, _ = naive(hidden.astype(jnp.float32), rounded, targets)
    np.testing.assert_allclose(logprobs, want, atol=1e-4)


def test_the_logits_never_exist():
    batch, length, vocab, chunk = 2, 512, 2003, 8
    hidden, unembed, targets = inputs(batch, length, 8, vocab)

    def loss(h, u, function):
        logprobs, entropy = function(h, u, targets)
        return (logprobs + entropy).sum()

    def compiled(function):
        step = jax.jit(jax.grad(lambda h, u: loss(h, u, function), argnums=(0, 1)))
        return step.lower(hidden, unembed).compile()

    def largest_array(program):
        shapes = re.findall(r"\b(?:f|bf|s|u|pred)\d*\[([\d,]+)\]", program.as_text())
        return max(math.prod(map(int, shape.split(","))) for shape in shapes)

    chunked = compiled(lambda h, u, t: chunked_logprobs(h, u, t, chunk=chunk))
    elements = batch * length * vocab
    assert largest_array(chunked) <= elements // 32
    # A few chunks of logits are alive at once (forward, softmax, cotangent), whatever T is.
    temp_bytes = chunked.memory_analysis().temp_size_in_bytes
    assert temp_bytes < 6 * batch * chunk * vocab * 4 < elements * 4 // 8
    # The same measures do see the logits where they exist.
    whole = compiled(naive)
    assert largest_array(whole) >= elements
    assert whole.memory_analysis().temp_size_in_bytes >= elements * 4


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
