"""Tests sampling against hand-computed filters, log-probs and frequencies."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zerosearch_jax.errors import UserError
from zerosearch_jax.generate.sampling import Sampling, keep_top_k, keep_top_p, sample

# Token probabilities, deliberately unsorted.
PROBABILITIES = np.array([0.15, 0.5, 0.05, 0.3], np.float32)
LOGITS = jnp.log(PROBABILITIES)[None] + 7.0  # softmax ignores a constant shift


def kept(filtered):
    return [bool(x) for x in np.isfinite(np.asarray(filtered)[0])]


def keys(n, seed=0):
    return jax.random.split(jax.random.key(seed), n)


@pytest.mark.parametrize(
    ("k", "expected"),
    [(0, [1, 1, 1, 1]), (1, [0, 1, 0, 0]), (2, [0, 1, 0, 1]), (3, [1, 1, 0, 1]), (9, [1, 1, 1, 1])],
)
def test_top_k_keeps_the_k_most_likely(k, expected):
    assert kept(keep_top_k(LOGITS, k)) == [bool(x) for x in expected]


@pytest.mark.parametrize(
    ("p", "expected"),
    [
        (0.01, [0, 1, 0, 0]),
        (0.49, [0, 1, 0, 0]),
        (0.51, [0, 1, 0, 1]),  # 0.5 does not reach 0.51
        (0.79, [0, 1, 0, 1]),
        (0.81, [1, 1, 0, 1]),
        (0.96, [1, 1, 1, 1]),
        (1.0, [1, 1, 1, 1]),
    ],
)
def test_top_p_keeps_the_smallest_set_that_reaches_p(p, expected):
    filtered = keep_top_p(LOGITS, p)
    assert kept(filtered) == [bool(x) for x in expected]
    np.testing.assert_array_equal(filtered[np.isfinite(filtered)], LOGITS[np.isfinite(filtered)])


def test_top_p_uses_the_probabilities_renormalised_after_top_k():
    # After top-k, 0.5 of {0.5, 0.3} is 0.625 of the mass, which reaches 0.6.
    assert kept(keep_top_p(keep_top_k(LOGITS, 2), 0.6)) == [False, True, False, False]
    assert kept(keep_top_p(LOGITS, 0.6)) == [False, True, False, True]


def test_temperature_zero_is_greedy_with_untempered_logprobs():
    tokens, logprobs = sample(jnp.tile(LOGITS, (5, 1)), keys(5), Sampling(temperature=0.0))
    assert tokens.tolist() == [1] * 5
    assert tokens.dtype == jnp.int32
    np.testing.assert_allclose(logprobs, np.log(0.5), atol=1e-6)


@pytest.mark.parametrize("sampling", [Sampling(2.0, top_k=2), Sampling(2.0, top_p=0.5)])
def test_logprobs_are_tempered_but_not_filtered(sampling):
    tokens, logprobs = sample(jnp.tile(LOGITS, (64, 1)), keys(64), sampling)
    assert set(tokens.tolist()) == {1, 3}
    tempered = np.sqrt(PROBABILITIES) / np.sqrt(PROBABILITIES).sum()
    np.testing.assert_allclose(logprobs, np.log(tempered)[np.asarray(tokens)], atol=1e-5)


@pytest.mark.parametrize(
    ("sampling", "weights"),
    [
        (Sampling(), PROBABILITIES),
        (Sampling(temperature=2.0), np.sqrt(PROBABILITIES)),
        (Sampling(top_k=3), PROBABILITIES * [1, 1, 0, 1]),
        (Sampling(top_p=0.7), PROBABILITIES * [0, 1, 0, 1]),
    ],
)
def test_frequencies_match_the_probabilities(sampling, weights):
    n = 8000
    tokens, _ = sample(jnp.tile(LOGITS, (n, 1)), keys(n, seed=3), sampling)
    expected = weights / weights.sum()
    seen = np.bincount(np.asarray(tokens), minlength=4) / n
    spread = np.sqrt(expected * (1 - expected) / n)
    assert np.all(np.abs(seen - expected) <= 4 * spread + 1e-9), (seen, expected)


def test_a_row_depends_only_on_its_logits_and_key():
    logits = jax.random.normal(jax.random.key(5), (8, 50))
    row_keys = keys(8)
    sampling = Sampling(1.3, top_k=20, top_p=0.9)
    tokens, logprobs = sample(logits, row_keys, sampling)
    order = np.array([6, 1, 3])
    some_tokens, some_logprobs = sample(logits[order], row_keys[order], sampling)
    assert some_tokens.tolist() == tokens[order].tolist()
    np.testing.assert_allclose(some_logprobs, logprobs[order], atol=1e-6)
    other, _ = sample(logits, keys(8, seed=1), sampling)
    assert other.tolist() != tokens.tolist()


@pytest.mark.parametrize("bad", [{"temperature": -1}, {"top_k": -1}, {"top_p": 0}, {"top_p": 1.5}])
def test_parameters_out_of_range_raise(bad):
    with pytest.raises(UserError, match="sampling needs"):
        Sampling(**bad)
