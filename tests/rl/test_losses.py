import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from zerosearch_jax.rl.losses import clipped_surrogate, kl_k3, masked_sum

SHAPE = (2, 4)
CLIP = {"clip_low": 0.2, "clip_high": 0.3}
BAD = [np.nan, np.inf, -np.inf]

floats = hnp.arrays(np.float32, SHAPE, elements=st.floats(-2, 0, width=32))
signed = hnp.arrays(np.float32, SHAPE, elements=st.floats(-2, 2, width=32))
masks = hnp.arrays(bool, SHAPE)


def logs(*ratios):
    return jnp.log(jnp.array([ratios], jnp.float32))


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


def test_gradient_is_that_of_the_policy_gradient_on_policy_and_stops_at_the_clip():
    # d(-ratio A)/d logprob = -ratio A; 0 where the clip holds or the mask is 0.
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


@settings(deadline=None, max_examples=40)
@given(floats, floats)
def test_k3_equals_numpy_in_float64(logprobs, ref):
    d = ref.astype(np.float64) - logprobs.astype(np.float64)
    got = kl_k3(jnp.array(logprobs), jnp.array(ref))
    np.testing.assert_allclose(got, np.exp(d) - d - 1, rtol=1e-6, atol=1e-6)
    assert (np.asarray(got) >= 0).all()


def test_k3_by_hand():
    # d = log 2: 2 - log 2 - 1. d = -log 2: 1/2 + log 2 - 1. d = 0: 0.
    got = kl_k3(logs(0.5, 1.0, 0.25), logs(1.0, 0.5, 0.25))
    np.testing.assert_allclose(got, [[1 - np.log(2), np.log(2) - 0.5, 0.0]], rtol=1e-6)


@pytest.mark.parametrize("d", [1e-6, -1e-4, 3e-3, -0.00999, 0.01001])
def test_k3_keeps_its_digits_near_zero(d):
    """exp(d) - d - 1 in float32 loses all of them at 1e-4 (k3 = d²/2 + d³/6 + d⁴/24 + …)."""
    d = float(np.float32(d))
    want = d**2 / 2 + d**3 / 6 + d**4 / 24
    got = float(kl_k3(jnp.zeros((1, 1)), jnp.full((1, 1), d))[0, 0])
    assert got == pytest.approx(want, rel=1e-4 if abs(d) < 0.01 else 1e-3)


def test_k3_gradient_is_zero_at_the_reference_and_pulls_back_to_it():
    gradient = jax.grad(lambda x: kl_k3(x, logs(0.5, 0.5, 0.5)).sum())(logs(0.5, 1.0, 0.25))
    # d k3 / d logprob = 1 - exp(d)
    np.testing.assert_allclose(gradient, [[0.0, 0.5, -1.0]], atol=1e-6)


@pytest.mark.parametrize("sign", [1, -1])
def test_far_apart_logprobs_stay_finite(sign):
    far = jnp.full((1, 3), -1000.0)
    inputs = (far, jnp.zeros((1, 3))) if sign > 0 else (jnp.zeros((1, 3)), far)

    def total(logprobs, other):
        a = jnp.array([[1.0, -1.0, 0.0]])
        loss, _ = clipped_surrogate(logprobs, other, a, jnp.ones((1, 3)), **CLIP)
        return (loss + kl_k3(logprobs, other)).sum()

    value, gradient = jax.value_and_grad(total)(*inputs)
    assert np.isfinite(value) and np.isfinite(gradient).all()


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("place", ["logprobs", "other", "advantages", "all"])
def test_masked_positions_are_unread(bad, place):
    mask = jnp.array([[True, False, True, False]])
    clean = {
        "logprobs": jnp.log(jnp.array([[0.5, 0.5, 0.4, 0.3]])),
        "other": jnp.log(jnp.array([[0.4, 0.5, 0.5, 0.3]])),
        "advantages": jnp.array([[1.0, 1.0, -1.0, 1.0]]),
    }
    dirty = {
        name: jnp.where(mask, x, bad) if place in (name, "all") else x for name, x in clean.items()
    }

    def total(arrays):
        lp, other = arrays["logprobs"], arrays["other"]
        loss, clipped = clipped_surrogate(lp, other, arrays["advantages"], mask, **CLIP)
        kl = kl_k3(lp, other, mask)
        return masked_sum(loss, mask) + masked_sum(kl, mask), (loss, kl, clipped)

    (value, parts), gradient = jax.value_and_grad(total, has_aux=True)(dirty)
    (clean_value, _), clean_gradient = jax.value_and_grad(total, has_aux=True)(clean)
    assert value == clean_value
    for part in parts:
        np.testing.assert_array_equal(part[:, 1::2], np.zeros((1, 2)))
    for name in clean:
        np.testing.assert_array_equal(gradient[name][:, 1::2], np.zeros((1, 2)))
        np.testing.assert_array_equal(gradient[name], clean_gradient[name])
    assert (np.asarray(gradient["logprobs"])[:, ::2] != 0).all()


def test_masked_sum():
    x = jnp.array([[1.0, jnp.nan], [jnp.inf, 4.0]])
    mask = jnp.array([[1, 0], [0, 1]])
    assert masked_sum(x, mask) == 5.0
    assert masked_sum(jnp.ones((2, 2)), mask) == 2.0
    np.testing.assert_array_equal(jax.grad(masked_sum)(x, mask), [[1, 0], [0, 1]])
    # 300 ones in bfloat16 would stop at 256.
    ones = jnp.ones((1, 300), jnp.bfloat16)
    assert masked_sum(ones, jnp.ones((1, 300))) == 300.0


def test_shapes_are_checked():
    two, three = jnp.zeros((1, 2)), jnp.zeros((1, 3))
    with pytest.raises(ValueError, match=r"\(1, 3\)"):
        clipped_surrogate(two, two, three, two, **CLIP)
    with pytest.raises(ValueError):
        kl_k3(two, three)
    with pytest.raises(ValueError):
        masked_sum(jnp.zeros(3), jnp.zeros(3))
