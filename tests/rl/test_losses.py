"""Losses, KL estimates and weights by hand and against loops in numpy float64."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from zerosearch_jax.rl.losses import (
    AGGREGATES,
    aggregation_weights,
    cispo_surrogate,
    clipped_surrogate,
    kl_k1,
    kl_k2,
    kl_k3,
    likelihood_preserving,
    masked_sum,
    sequence_surrogate,
    truncated_importance_weights,
    value_loss,
)

SHAPE = (2, 4)
PACKED = (2, 12)
CLIP = {"clip_low": 0.2, "clip_high": 0.3}
BAD = [np.nan, np.inf, -np.inf]

PPO = functools.partial(clipped_surrogate, **CLIP)
DUAL = functools.partial(clipped_surrogate, **CLIP, dual_clip=3.0)
GSPO = functools.partial(sequence_surrogate, **CLIP)
CISPO = functools.partial(cispo_surrogate, **CLIP)
VALUE = functools.partial(value_loss, clip=0.25)
TRUNCATED = functools.partial(truncated_importance_weights, cap=2.0)


def LLDS(*arrays):
    return likelihood_preserving(*arrays), None


# All functions of masked tokens with one signature: (x, base, advantages or returns, mask).
OF_TOKENS = {
    "clipped_surrogate": PPO,
    "dual_clip": DUAL,
    "sequence_surrogate": lambda x, base, a, mask: GSPO(x, base, a, mask, jnp.ones(x.shape, int)),
    "cispo_surrogate": CISPO,
    "kl_k1": lambda x, base, a, mask: kl_k1(x, base, mask),
    "kl_k2": lambda x, base, a, mask: kl_k2(x, base, mask),
    "kl_k3": lambda x, base, a, mask: kl_k3(x, base, mask),
    "truncated_importance_weights": lambda x, base, a, mask: TRUNCATED(x, base, mask),
    "likelihood_preserving": likelihood_preserving,
    "value_loss": VALUE,
}

floats = hnp.arrays(np.float32, SHAPE, elements=st.floats(-2, 0, width=32))
signed = hnp.arrays(np.float32, SHAPE, elements=st.floats(-2, 2, width=32))
masks = hnp.arrays(bool, SHAPE)


def logs(*ratios):
    return jnp.log(jnp.array([ratios], jnp.float32))


@functools.partial(jax.jit, static_argnums=0)
def loss_clipped_gradient(function, *arrays):
    """Returns both results and the gradient of the sum of the first by the first argument."""

    def total(first):
        loss, clipped = function(first, *arrays[1:])
        return loss.sum(), (loss, clipped)

    gradient, (loss, clipped) = jax.grad(total, has_aux=True)(arrays[0])
    return loss, clipped, gradient


@functools.partial(jax.jit, static_argnums=0)
def results_and_gradients(function, x, base, advantages, mask):
    """Returns all results and the gradients of the sum of the first by the three float arrays."""

    def total(*floats):
        results = jax.tree.leaves(function(*floats, mask))
        return results[0].sum(), results

    gradients, results = jax.grad(total, argnums=(0, 1, 2), has_aux=True)(x, base, advantages)
    return results, gradients


@functools.partial(jax.jit, static_argnums=0)
def in_batches(function, *arrays):
    return jax.vmap(functools.partial(loss_clipped_gradient, function))(*arrays)


def assert_close(got, want):
    for one, other in zip(got, want, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)


def on_grid(shape, low, high):
    """Draws multiples of 1/64, whose float32 sums are exact, so that comparisons do not round."""
    ints = hnp.arrays(np.int32, shape, elements=st.integers(low * 64, high * 64))
    return ints.map(lambda n: (n / 64).astype(np.float32))


@st.composite
def packed_batches(draw):
    """Draws logprobs, old_logprobs, advantages, mask and segment_ids of ragged rows [2, 12].

    Rows may be empty or full. Sequences may have one token and any number of policy tokens.
    """
    segment_ids = np.zeros(PACKED, np.int32)
    for row in segment_ids:
        end = 0
        for i, length in enumerate(draw(st.lists(st.integers(1, 6), max_size=6)), 1):
            row[end : end + length] = i
            end += length
    mask = draw(hnp.arrays(bool, PACKED)) & (segment_ids > 0)
    of_segment = draw(on_grid((PACKED[0], 7), -2, 2))
    advantages = np.take_along_axis(of_segment, segment_ids, axis=1)
    return draw(on_grid(PACKED, -2, 0)), draw(on_grid(PACKED, -2, 0)), advantages, mask, segment_ids


def ppo_token(ratio, advantage, dual_clip=None):
    """Returns loss, clipped and gradient in Python floats, by the sign of the advantage."""
    if advantage >= 0:
        used = min(ratio, 1.3)
    else:
        used = max(ratio, 0.8) if dual_clip is None else min(max(ratio, 0.8), dual_clip)
    free = used == ratio or advantage == 0
    return -used * advantage, not free, -ratio * advantage if free else 0.0


def test_dual_clip_must_be_zero_or_above_one():
    arrays = (jnp.zeros((1, 2)),) * 3 + (jnp.ones((1, 2)),)
    for wrong in (0.5, 1.0, -2.0, np.nan):
        with pytest.raises(ValueError, match="dual_clip is "):
            clipped_surrogate(*arrays, **CLIP, dual_clip=wrong)
    clipped_surrogate(*arrays, **CLIP, dual_clip=1.5)


def test_clipped_surrogate_by_hand():
    #         inside  above, A>0  above, A<0  below, A>0  below, A<0  masked
    ratios = [1.1, 2.0, 2.0, 0.5, 0.5, 2.0]
    advantages = [1.0, 1.0, -1.0, 1.0, -1.0, 1.0]
    mask = jnp.array([[1, 1, 1, 1, 1, 0]], jnp.float32)
    loss, clipped = clipped_surrogate(
        logs(*ratios), jnp.zeros((1, 6)), jnp.array([advantages]), mask, **CLIP
    )
    np.testing.assert_allclose(loss, [[-1.1, -1.3, 2.0, -0.5, 0.8, 0.0]], rtol=1e-6)
    np.testing.assert_array_equal(clipped, [[False, True, False, False, True, False]])


def test_dual_clip_by_hand():
    # With A < 0 the loss ratio·|A| is at most 3|A|. With A > 0 nothing changes.
    ratios = [2.0, 5.0, 2.0, 0.5, 5.0]
    advantages = jnp.array([[-1.0, -2.0, 1.0, -1.0, -1.0]])
    mask = jnp.array([[1, 1, 1, 1, 0]])
    arrays = (logs(*ratios), jnp.zeros((1, 5)), advantages, mask)
    loss, clipped, gradient = loss_clipped_gradient(DUAL, *arrays)
    np.testing.assert_allclose(loss, [[2.0, 6.0, -1.3, 0.8, 0.0]], rtol=1e-6)
    np.testing.assert_array_equal(clipped, [[False, True, True, True, False]])
    np.testing.assert_allclose(gradient, [[2.0, 0.0, 0.0, 0.0, 0.0]], rtol=1e-6)
    loss, clipped, gradient = loss_clipped_gradient(PPO, *arrays)
    assert loss[0, 1] == gradient[0, 1] == pytest.approx(10.0) and not clipped[0, 1]


def test_sequence_surrogate_by_hand():
    # Token ratios 2 and 1/2 give the sequence ratio 1, though both are out of range. 2 alone is
    # clipped at 1.3. 4 and 1 give 2, which A < 0 does not clip. 1/4 is clipped at 0.8.
    ratios = jnp.array([[9.0, 2.0, 0.5, 2.0, 9.0, 9.0], [4.0, 9.0, 1.0, 0.25, 0.25, 9.0]])
    mask = jnp.array([[0, 1, 1, 1, 0, 0], [1, 0, 1, 1, 1, 0]])
    segment_ids = jnp.array([[1, 1, 1, 2, 2, 0], [1, 1, 1, 2, 2, 0]])
    advantages = jnp.array([[2.0, 2.0, 2.0, 1.0, 1.0, 0.0], [-1.5, -1.5, -1.5, -1.0, -1.0, 0.0]])
    loss, clipped, gradient = loss_clipped_gradient(
        GSPO, jnp.log(ratios), jnp.zeros((2, 6)), advantages, mask, segment_ids
    )
    want = [[0, -2.0, -2.0, -1.3, 0, 0], [3.0, 0, 3.0, 0.8, 0.8, 0]]
    np.testing.assert_allclose(loss, want, rtol=1e-6)
    np.testing.assert_array_equal(clipped, [[0, 0, 0, 1, 0, 0], [0, 0, 0, 1, 1, 0]])
    want = [[0, -2.0, -2.0, 0, 0, 0], [3.0, 0, 3.0, 0, 0, 0]]
    np.testing.assert_allclose(gradient, want, rtol=1e-6)


def test_sequence_surrogate_has_the_paper_gradient_when_tokens_are_averaged():
    """-ratio A / length for each token of the sequence's loss (eq. 10)."""
    mask = jnp.array([[0, 1, 1, 1]])

    @jax.jit
    def sequence_loss(logprobs):
        ones = jnp.ones((1, 4))
        loss, _ = GSPO(logprobs, jnp.zeros((1, 4)), 6.0 * ones, mask, ones.astype(int))
        return loss.sum() / 3

    loss, gradient = jax.value_and_grad(sequence_loss)(logs(1.0, 1.1, 1.1, 1.1))
    assert loss == pytest.approx(-6.6)
    np.testing.assert_allclose(gradient, [[0, -2.2, -2.2, -2.2]], rtol=1e-6)


def test_sequence_surrogate_clamps_the_mean_and_not_its_tokens():
    # The mean of the log-ratios 30 and -30.2 is -0.1. Clamping each to ±20 would make it 0.
    logprobs = jnp.array([[0.0, -30.2]])
    ones = jnp.ones((1, 2))
    arrays = (logprobs, jnp.array([[-30.0, 0.0]]), ones, ones, ones.astype(int))
    loss, _, gradient = loss_clipped_gradient(GSPO, *arrays)
    np.testing.assert_allclose(loss, [[-np.exp(-0.1)] * 2], rtol=1e-5)
    np.testing.assert_allclose(gradient, [[-np.exp(-0.1)] * 2], rtol=1e-5)


def test_cispo_keeps_the_gradient_of_tokens_out_of_range():
    ratios = np.array([[1.1, 2.0, 0.5, 2.0]])
    advantages = jnp.array([[1.0, -1.0, 2.0, 1.0]])
    arrays = (jnp.log(0.25 * ratios), logs(0.25, 0.25, 0.25, 0.25), advantages)
    mask = jnp.array([[1, 1, 1, 0]])
    loss, clipped, gradient = loss_clipped_gradient(CISPO, *arrays, mask)
    # The gradient is -weight A, the loss that times log(ratio / 4); weights are 1.1, 1.3, 0.8.
    want = [[-1.1 * np.log(0.275), 1.3 * np.log(0.5), -1.6 * np.log(0.125), 0.0]]
    np.testing.assert_allclose(loss, want, rtol=1e-6)
    np.testing.assert_array_equal(clipped, [[False, True, True, False]])
    np.testing.assert_allclose(gradient, [[-1.1, 1.3, -1.6, 0.0]], rtol=1e-6)


@pytest.mark.parametrize("clip_low", [1.0, 5.0])
def test_cispo_without_a_lower_bound(clip_low):
    function = functools.partial(cispo_surrogate, clip_low=clip_low, clip_high=0.3)
    ones = jnp.ones((1, 3))
    _, clipped, gradient = loss_clipped_gradient(
        function, logs(1e-6, 0.5, 1.5), jnp.zeros((1, 3)), ones, ones
    )
    np.testing.assert_array_equal(clipped, [[False, False, True]])
    np.testing.assert_allclose(gradient, [[-1e-6, -0.5, -1.3]], rtol=1e-5)


def test_truncated_importance_weights_by_hand():
    old, sampler = logs(0.2, 0.5, 0.6, 0.6), logs(0.4, 0.5, 0.2, 0.2)
    mask = jnp.array([[1, 1, 1, 0]])
    np.testing.assert_allclose(TRUNCATED(old, sampler, mask), [[0.5, 1.0, 2.0, 0.0]], rtol=1e-6)
    gradients = jax.grad(lambda *x: TRUNCATED(*x, mask).sum(), argnums=(0, 1))(old, sampler)
    for gradient in gradients:
        np.testing.assert_array_equal(gradient, np.zeros((1, 4)))
    with pytest.raises(ValueError, match="must be above 0"):
        truncated_importance_weights(old, sampler, mask, cap=0.0)


def test_likelihood_preserving_by_hand():
    # First row: an action with the change -0.5 + 0.25 < 0 has a loss at its first token; one with
    # -0.5 + 0.75 > 0, or with -1 and A < 0, has none. Second row: A = 0 counts as good; an
    # unchanged token has no gradient.
    change = np.zeros((2, 9), np.float32)
    change[0] = [-9, -0.5, 0.25, -9, -0.5, 0.75, -9, -1, -9]
    change[1] = [-0.25, 0.0, -9, -9, -9, -9, -9, 0.5, -0.75]
    mask = jnp.array([[0, 1, 1, 0, 1, 1, 0, 1, 0], [1, 1, 0, 0, 0, 0, 0, 1, 1]])
    advantages = jnp.array([[1.0] * 7 + [-1.0] * 2, [0.0] * 9])
    old = jnp.full((2, 9), -1.0)

    loss, _, gradient = loss_clipped_gradient(LLDS, old + change, old, advantages, mask)
    want = np.zeros((2, 9))
    want[0, 1] = 0.5
    want[1, [0, 8]] = [0.25, 0.75]
    np.testing.assert_array_equal(loss, want)
    np.testing.assert_array_equal(gradient, -(want > 0).astype(int))


@settings(deadline=None, max_examples=20)
@given(floats, signed, masks)
def test_likelihood_preserving_is_zero_in_the_first_update(logprobs, advantages, mask):
    loss, _, gradient = loss_clipped_gradient(LLDS, logprobs, logprobs, advantages, mask)
    np.testing.assert_array_equal(loss, np.zeros(SHAPE))
    np.testing.assert_array_equal(gradient, np.zeros(SHAPE))


def test_value_loss_by_hand():
    # Away from the return: the larger error, unclipped. Towards it beyond the clip: clipped at
    # old ± 0.5. Within the clip: unclipped. Masked: 0.
    values = jnp.array([[2.0, 2.0, 1.25, 5.0]])
    old, returns = jnp.ones((1, 4)), jnp.array([[0.0, 3.0, 0.0, 0.0]])
    mask = jnp.array([[1, 1, 1, 0]])
    function = functools.partial(value_loss, clip=0.5)
    loss, clipped, gradient = loss_clipped_gradient(function, values, old, returns, mask)
    np.testing.assert_allclose(loss, [[2.0, 1.125, 0.78125, 0.0]], rtol=1e-6)
    np.testing.assert_array_equal(clipped, [[False, True, False, False]])
    np.testing.assert_allclose(gradient, [[2.0, 0.0, 1.25, 0.0]], rtol=1e-6)
    loss, clipped, gradient = loss_clipped_gradient(
        functools.partial(value_loss, clip=0.0), values, old, returns, mask
    )
    np.testing.assert_allclose(loss, [[2.0, 0.5, 0.78125, 0.0]], rtol=1e-6)
    assert not clipped.any()
    np.testing.assert_allclose(gradient, [[2.0, -1.0, 1.25, 0.0]], rtol=1e-6)


def test_the_surrogate_has_the_policy_gradient_on_policy_and_none_at_the_clip():
    # d(-ratio A)/d logprob = -ratio A; 0 where the loss is clipped or the mask is 0.
    advantages = jnp.array([[2.0, -3.0, 1.0, -1.0, 5.0]])
    mask = jnp.array([[True, True, True, True, False]])

    def total(logprobs):
        return clipped_surrogate(logprobs, jnp.zeros((1, 5)), advantages, mask, **CLIP)[0].sum()

    gradient = jax.grad(total)(logs(1.0, 1.0, 2.0, 2.0, 1.0))
    np.testing.assert_allclose(gradient, [[-2.0, 3.0, 0.0, 2.0, 0.0]], rtol=1e-6)


def test_old_logprobs_and_advantages_get_no_gradient():
    def total(old, advantages):
        return clipped_surrogate(logs(1.1, 0.9), old, advantages, jnp.ones((1, 2)), **CLIP)[0].sum()

    for gradient in jax.grad(total, argnums=(0, 1))(jnp.zeros((1, 2)), jnp.ones((1, 2))):
        np.testing.assert_array_equal(gradient, np.zeros((1, 2)))


@settings(deadline=None, max_examples=40)
@given(floats, floats, signed, masks)
def test_clipped_surrogate_equals_numpy_in_float64(logprobs, old, advantages, mask):
    got, _ = clipped_surrogate(*map(jnp.array, (logprobs, old, advantages, mask)), **CLIP)
    want = np.zeros(SHAPE)
    for at in np.ndindex(SHAPE):
        if mask[at]:
            ratio = np.exp(float(logprobs[at]) - float(old[at]))
            a = float(advantages[at])
            want[at] = -min(ratio * a, min(max(ratio, 0.8), 1.3) * a)
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dual_clip", [None, 3.0])
@settings(deadline=None, max_examples=40)
@given(batch=packed_batches())
def test_token_surrogates_equal_loops_in_float64(dual_clip, batch):
    logprobs, old, advantages, mask, _ = batch
    want = np.zeros((3, *PACKED))
    want_cispo = np.zeros((3, *PACKED))
    for at in zip(*np.nonzero(mask), strict=True):
        ratio = np.exp(float(logprobs[at]) - float(old[at]))
        a = float(advantages[at])
        want[:, *at] = ppo_token(ratio, a, dual_clip)
        weight = sorted([0.8, ratio, 1.3])[1]
        want_cispo[:, *at] = -weight * a * float(logprobs[at]), weight != ratio, -weight * a
    function = DUAL if dual_clip else PPO
    assert_close(loss_clipped_gradient(function, *batch[:4]), want)
    assert_close(loss_clipped_gradient(CISPO, *batch[:4]), want_cispo)


@settings(deadline=None, max_examples=60)
@given(packed_batches())
def test_sequence_surrogate_equals_loops_in_float64(batch):
    logprobs, old, advantages, mask, segment_ids = batch
    want = np.zeros((3, *PACKED))
    for row, segment in itertools.product(range(PACKED[0]), range(1, 7)):
        tokens = [t for t in range(PACKED[1]) if mask[row, t] and segment_ids[row, t] == segment]
        if tokens:
            total = sum(float(logprobs[row, t]) - float(old[row, t]) for t in tokens)
            ratio = np.exp(total / len(tokens))
            for t in tokens:
                want[:, row, t] = ppo_token(ratio, float(advantages[row, t]))
    assert_close(loss_clipped_gradient(GSPO, *batch), want)


@settings(deadline=None, max_examples=60)
@given(packed_batches())
def test_likelihood_preserving_equals_loops_in_float64(batch):
    logprobs, old, advantages, mask, _ = batch
    want_loss, want_gradient = np.zeros((2, *PACKED))
    for row in range(PACKED[0]):
        for own, group in itertools.groupby(range(PACKED[1]), lambda t, row=row: mask[row, t]):
            action = list(group)
            fell = {t: float(old[row, t]) - float(logprobs[row, t]) for t in action}
            for t in action:
                if own and sum(fell.values()) > 0 and advantages[row, t] >= 0 and fell[t] > 0:
                    want_loss[row, t], want_gradient[row, t] = fell[t], -1.0
    loss, _, gradient = loss_clipped_gradient(LLDS, *batch[:4])
    assert_close((loss, gradient), (want_loss, want_gradient))


@settings(deadline=None, max_examples=40)
@given(on_grid(SHAPE, -2, 2), on_grid(SHAPE, -2, 2), on_grid(SHAPE, -2, 2), masks)
def test_value_loss_equals_loops_in_float64(values, old, returns, mask):
    want = np.zeros((3, *SHAPE))
    for at in zip(*np.nonzero(mask), strict=True):
        v, r = float(values[at]), float(returns[at])
        held = sorted([float(old[at]) - 0.25, v, float(old[at]) + 0.25])[1]
        clipped = abs(held - r) > abs(v - r)
        want[:, *at] = 0.5 * max(abs(v - r), abs(held - r)) ** 2, clipped, (not clipped) * (v - r)
    assert_close(loss_clipped_gradient(VALUE, values, old, returns, mask), want)


@settings(deadline=None, max_examples=40)
@given(floats, floats, masks)
def test_kl_estimates_and_weights_equal_numpy_in_float64(logprobs, other, mask):
    d = np.where(mask, logprobs.astype(np.float64) - other.astype(np.float64), 0)
    assert_close((kl_k1(logprobs, other, mask), kl_k2(logprobs, other, mask)), (d, d * d / 2))
    np.testing.assert_array_equal(kl_k1(logprobs, other), kl_k1(logprobs, other, mask | True))
    weights = np.where(mask, np.where(d > np.log(2), 2.0, np.exp(d)), 0)
    assert_close([TRUNCATED(logprobs, other, mask)], [weights])


def _packed_and_alone(lengths, arrays):
    """Returns two sequences packed into one row, with an empty row, and in separate rows.

    A sequence's last token predicts nothing, as in packed batches. Padding is NaN.
    """
    packed = [np.full(PACKED, np.nan, np.float32) for _ in range(3)]
    alone = [np.full(PACKED, np.nan, np.float32) for _ in range(3)]
    packed += [np.zeros(PACKED, bool), np.zeros(PACKED, np.int32)]
    alone += [np.zeros(PACKED, bool), np.zeros(PACKED, np.int32)]
    places = []
    for i, n in enumerate(lengths):
        start = sum(lengths[:i])
        places.append((np.s_[0, start : start + n], np.s_[i, :n]))
        for into, at, segment in ((packed, places[i][0], i + 1), (alone, places[i][1], 1)):
            for target, array in zip(into, arrays, strict=False):
                target[at] = array[i, :n]
            into[3][at] &= np.arange(n) < n - 1
            into[4][at] = segment
    return packed, alone, places


@settings(deadline=None, max_examples=60)
@given(
    st.tuples(st.integers(1, 6), st.integers(1, 6)),
    on_grid((2, 6), -2, 0),
    on_grid((2, 6), -2, 0),
    on_grid((2, 1), -2, 2),
    hnp.arrays(bool, (2, 6)),
)
def test_packing_does_not_change_losses(lengths, logprobs, old, advantages, mask):
    arrays = (logprobs, old, np.repeat(advantages, 6, axis=1), mask)
    packed, alone, places = _packed_and_alone(lengths, arrays)
    for function, count in ((GSPO, 5), (LLDS, 4)):
        of_packed = loss_clipped_gradient(function, *packed[:count])
        of_alone = loss_clipped_gradient(function, *alone[:count])
        for in_packed, in_alone in zip(of_packed, of_alone, strict=True):
            for here, there in places if in_packed is not None else ():
                np.testing.assert_allclose(in_packed[here], in_alone[there], rtol=1e-6)


@settings(deadline=None, max_examples=5)
@given(packed_batches(), packed_batches())
def test_sums_by_sequence_and_action_can_be_vmapped(one, other):
    stacked = [np.stack(pair) for pair in zip(one, other, strict=True)]
    for function, count in ((GSPO, 5), (LLDS, 4)):
        got = in_batches(function, *stacked[:count])
        for i, batch in enumerate((one, other)):
            want = loss_clipped_gradient(function, *batch[:count])
            jax.tree.map(lambda g, w, i=i: assert_close([g[i]], [w]), got, want)


@settings(deadline=None, max_examples=40)
@given(floats, floats)
def test_k3_equals_numpy_in_float64(logprobs, ref):
    d = ref.astype(np.float64) - logprobs.astype(np.float64)
    got = kl_k3(jnp.array(logprobs), jnp.array(ref))
    np.testing.assert_allclose(got, np.exp(d) - d - 1, rtol=1e-6, atol=1e-6)
    assert (np.asarray(got) >= 0).all()


def test_k1_and_k2_by_hand():
    # Differences log 2, -log 2 and 0; beyond ±20 clamped, without a gradient.
    logprobs, ref = logs(1.0, 0.25, 0.5), logs(0.5, 0.5, 0.5)
    log2 = np.log(2)
    np.testing.assert_allclose(kl_k1(logprobs, ref), [[log2, -log2, 0]], rtol=1e-6)
    np.testing.assert_allclose(kl_k2(logprobs, ref), [[log2**2 / 2] * 2 + [0]], rtol=1e-6)
    far, zeros = jnp.full((1, 4), -1000.0), jnp.zeros((1, 4))
    for name, value in (("kl_k1", -20.0), ("kl_k2", 200.0)):
        (got,), (gradient, *_) = results_and_gradients(
            OF_TOKENS[name], far, zeros, zeros, zeros < 1
        )
        np.testing.assert_array_equal(got, value + np.zeros((1, 4)))
        np.testing.assert_array_equal(gradient, np.zeros((1, 4)))


def test_expectations_of_the_kl_estimates_and_their_gradients():
    """E k1 = E k3 = KL(p || q), exactly over five tokens. The gradients of the means by the logits
    are 0 (k1), that of KL(p || q) (k2) and that of KL(q || p) (k3)."""
    logits = jnp.array([[0.3, -1.0, 0.5, 2.0, 0.0]])
    q = jax.nn.log_softmax(jnp.array([[1.0, 0.2, -0.5, 0.4, 0.1]]))

    def expected(estimate):
        def mean(logits):
            p = jax.nn.log_softmax(logits)
            return (jax.lax.stop_gradient(jnp.exp(p)) * estimate(p, q)).sum()

        return jax.value_and_grad(mean)(logits)

    def kl(logits):
        p = jax.nn.log_softmax(logits)
        return (jnp.exp(p) * (p - q)).sum()

    forward, forward_gradient = jax.value_and_grad(kl)(logits)
    k1, k2, k3 = map(expected, (kl_k1, kl_k2, kl_k3))
    assert k1[0] == pytest.approx(float(forward)) and k3[0] == pytest.approx(float(forward))
    np.testing.assert_allclose(k1[1], np.zeros((1, 5)), atol=1e-6)
    np.testing.assert_allclose(k2[1], forward_gradient, atol=1e-6)
    np.testing.assert_allclose(k3[1], jnp.exp(jax.nn.log_softmax(logits)) - jnp.exp(q), atol=1e-6)


def test_k3_by_hand():
    # d = log 2: 2 - log 2 - 1. d = -log 2: 1/2 + log 2 - 1. d = 0: 0.
    got = kl_k3(logs(0.5, 1.0, 0.25), logs(1.0, 0.5, 0.25))
    np.testing.assert_allclose(got, [[1 - np.log(2), np.log(2) - 0.5, 0.0]], rtol=1e-6)


@pytest.mark.parametrize("d", [1e-6, -1e-4, 3e-3, -0.00999, 0.01001])
def test_k3_keeps_its_digits_near_zero(d):
    """exp(d) - d - 1 loses all digits in float32 at d = 1e-4 (k3 = d²/2 + d³/6 + d⁴/24 + …)."""
    d = float(np.float32(d))
    want = d**2 / 2 + d**3 / 6 + d**4 / 24
    got = float(kl_k3(jnp.zeros((1, 1)), jnp.full((1, 1), d))[0, 0])
    assert got == pytest.approx(want, rel=1e-4 if abs(d) < 0.01 else 1e-3)


def test_k3_gradient_is_zero_at_the_reference_and_pulls_back_to_it():
    gradient = jax.grad(lambda x: kl_k3(x, logs(0.5, 0.5, 0.5)).sum())(logs(0.5, 1.0, 0.25))
    # d k3 / d logprob = 1 - exp(d)
    np.testing.assert_allclose(gradient, [[0.0, 0.5, -1.0]], atol=1e-6)


@pytest.mark.parametrize("name", OF_TOKENS)
@pytest.mark.parametrize("sign", [1, -1])
def test_far_apart_logprobs_stay_finite(sign, name):
    far, near = jnp.full((1, 4), -1000.0), jnp.zeros((1, 4))
    inputs = (far, near) if sign > 0 else (near, far)
    a = jnp.array([[1.0, -1.0, 0.0, 2.0]])
    for array in jax.tree.leaves(results_and_gradients(OF_TOKENS[name], *inputs, a, a < 9)):
        assert np.isfinite(array).all()


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("name", OF_TOKENS)
def test_masked_positions_are_not_read(name, bad):
    mask = jnp.array([[True, False, True, False]])
    clean = {
        "x": logs(0.4, 0.5, 0.45, 0.3),
        "base": logs(0.5, 0.5, 0.5, 0.3),
        "advantages": jnp.array([[1.0, 1.0, 2.0, 1.0]]),
    }
    want = results_and_gradients(OF_TOKENS[name], *clean.values(), mask)
    for place in (*clean, "all"):
        dirty = [
            jnp.where(mask, x, bad) if place in (key, "all") else x for key, x in clean.items()
        ]
        got = results_and_gradients(OF_TOKENS[name], *dirty, mask)
        jax.tree.map(np.testing.assert_array_equal, got, want)
        for array in jax.tree.leaves(got):
            np.testing.assert_array_equal(array[:, 1::2], np.zeros((1, 2)))
    gradient, *constants = want[1]
    learns = name != "truncated_importance_weights"
    assert (np.asarray(gradient)[:, ::2] != 0).all() == learns
    for constant in constants:
        np.testing.assert_array_equal(constant, np.zeros((1, 4)))


def test_masked_sum():
    x = jnp.array([[1.0, jnp.nan], [jnp.inf, 4.0]])
    mask = jnp.array([[1, 0], [0, 1]])
    assert masked_sum(x, mask) == 5.0
    assert masked_sum(jnp.ones((2, 2)), mask) == 2.0
    np.testing.assert_array_equal(jax.grad(masked_sum)(x, mask), [[1, 0], [0, 1]])
    # A sum of 300 ones in bfloat16 would stop at 256.
    ones = jnp.ones((1, 300), jnp.bfloat16)
    assert masked_sum(ones, jnp.ones((1, 300))) == 300.0


def test_aggregation_weights_by_hand():
    lengths = jnp.array([2, 0, 6])
    token_mean = aggregation_weights(lengths, aggregate="token_mean")
    np.testing.assert_allclose(token_mean, [1 / 8, 0, 1 / 8], rtol=1e-6)
    sequence_mean = aggregation_weights(lengths, aggregate="sequence_mean")
    np.testing.assert_allclose(sequence_mean, [1 / 4, 0, 1 / 12], rtol=1e-6)
    fixed_length = aggregation_weights(lengths, aggregate="fixed_length", fixed_tokens=10)
    np.testing.assert_allclose(fixed_length, [1 / 20, 0, 1 / 20], rtol=1e-6)


@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_aggregation_weights_without_any_token_are_zero(aggregate):
    got = aggregation_weights(jnp.zeros(3, int), aggregate=aggregate, fixed_tokens=5)
    np.testing.assert_array_equal(got, np.zeros(3))
    assert got.dtype == jnp.float32


@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_aggregation_weights_keep_the_dtype_of_the_lengths(aggregate):
    function = functools.partial(aggregation_weights, aggregate=aggregate, fixed_tokens=3)
    with jax.enable_x64(True):
        for given_dtype, dtype in (("float64", "float64"), ("int64", "float32")):
            lengths = jax.ShapeDtypeStruct((2,), given_dtype)
            assert jax.eval_shape(function, lengths).dtype == dtype
    lengths = jax.ShapeDtypeStruct((2,), jnp.bfloat16)
    assert jax.eval_shape(function, lengths).dtype == jnp.float32


@settings(deadline=None, max_examples=40)
@given(hnp.arrays(np.int32, 5, elements=st.integers(0, 9)), st.data())
def test_aggregation_weights_equal_means_in_float64(lengths, data):
    losses = [data.draw(on_grid(int(n), -2, 2)).astype(np.float64) for n in lengths]
    filled = [x for x in losses if len(x)]
    want = {
        "token_mean": np.concatenate(losses).mean() if filled else 0.0,
        "sequence_mean": np.mean([x.mean() for x in filled]) if filled else 0.0,
        "fixed_length": np.mean([x.sum() / 9 for x in filled]) if filled else 0.0,
    }
    for aggregate in AGGREGATES:
        weights = aggregation_weights(jnp.array(lengths), aggregate=aggregate, fixed_tokens=9)
        got = sum(float(w) * x.sum() for w, x in zip(weights, losses, strict=True))
        assert got == pytest.approx(want[aggregate], rel=1e-6, abs=1e-6)


def test_aggregation_weights_can_be_jitted_and_vmapped():
    function = functools.partial(aggregation_weights, aggregate="sequence_mean")
    got = jax.jit(jax.vmap(function))(jnp.array([[1, 2], [0, 4]]))
    np.testing.assert_allclose(got, [[1 / 2, 1 / 4], [0, 1 / 4]], rtol=1e-6)


def test_aggregation_weights_refuse_bad_arguments():
    with pytest.raises(
        ValueError, match="'mean'; choose one of token_mean, sequence_mean, fixed_length"
    ):
        aggregation_weights(jnp.ones(2), aggregate="mean")
    with pytest.raises(ValueError, match="fixed_tokens is "):
        aggregation_weights(jnp.ones(2), aggregate="fixed_length")
    with pytest.raises(ValueError, match=r"\(2, 2\)"):
        aggregation_weights(jnp.ones((2, 2)), aggregate="token_mean")


@pytest.mark.parametrize("name", OF_TOKENS)
def test_every_loss_checks_shapes(name):
    two, three = jnp.zeros((1, 2)), jnp.zeros((1, 3))
    with pytest.raises(ValueError, match=r"\(1, 3\)"):
        OF_TOKENS[name](two, three, two, two)


def test_shapes_are_checked():
    two, three = jnp.zeros((1, 2)), jnp.zeros((1, 3))
    with pytest.raises(ValueError, match=r"\(1, 3\)"):
        clipped_surrogate(two, two, three, two, **CLIP)
    with pytest.raises(ValueError):
        kl_k3(two, three)
    with pytest.raises(ValueError):
        masked_sum(jnp.zeros(3), jnp.zeros(3))
