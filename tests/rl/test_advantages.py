import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from zerosearch_jax.rl.advantages import group_advantages


def test_by_hand():
    # Group (0, 1): mean 1/2, unbiased std sqrt(1/2). Group (1, 3): mean 2, std sqrt(2).
    got = group_advantages(jnp.array([[0.0, 1.0], [1.0, 3.0]]), eps=0.0)
    r = 2**-0.5
    np.testing.assert_allclose(got, [[-r, r], [-r, r]], rtol=1e-6)


def test_std_is_unbiased():
    # (0, 0, 3): mean 1, squares 1 + 1 + 4 = 6, std sqrt(6/2); the biased one is sqrt(6/3).
    got = group_advantages(jnp.array([[0.0, 0.0, 3.0]]), eps=0.0)
    np.testing.assert_allclose(got, np.array([[-1, -1, 2]]) / np.sqrt(3), rtol=1e-6)


def test_without_std():
    got = group_advantages(jnp.array([[0.0, 0.0, 3.0]]), normalize_std=False)
    np.testing.assert_allclose(got, [[-1.0, -1.0, 2.0]])


@pytest.mark.parametrize("normalize_std", [True, False])
def test_a_group_of_one_keeps_its_reward(normalize_std):
    rewards = jnp.array([[0.3], [0.0], [1.0]])
    np.testing.assert_array_equal(group_advantages(rewards, normalize_std=normalize_std), rewards)


@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, 2 / 3, 1e4 / 3])
def test_equal_rewards_give_exactly_zero(reward):
    """0.1 in float32 is not its own mean over some group sizes; eps would blow the rest up."""
    for group in range(2, 12):
        got = group_advantages(jnp.full((2, group), reward))
        np.testing.assert_array_equal(got, np.zeros((2, group)))


def test_groups_do_not_mix():
    one = group_advantages(jnp.array([[0.0, 0.5, 1.0]]))
    both = group_advantages(jnp.array([[0.0, 0.5, 1.0], [100.0, 0.0, 7.0]]))
    np.testing.assert_array_equal(one[0], both[0])


def test_integers_and_low_precision_become_float32():
    assert group_advantages(jnp.array([[0, 1]])).dtype == jnp.float32
    assert group_advantages(jnp.array([[0, 1]], jnp.bfloat16)).dtype == jnp.float32


def test_rank_is_checked():
    with pytest.raises(ValueError, match=r"\(4,\)"):
        group_advantages(jnp.zeros(4))


@settings(deadline=None, max_examples=30)
@given(hnp.arrays(np.float32, (3, 5), elements=st.sampled_from([0.0, 0.25, 0.4, 0.5, 1.0])))
def test_equals_numpy_in_float64(rewards):
    wide = rewards.astype(np.float64)
    want = np.zeros_like(wide)
    for q, group in enumerate(wide):
        if len(set(group)) > 1:
            std = np.sqrt(((group - group.mean()) ** 2).sum() / 4)
            want[q] = (group - group.mean()) / (std + 1e-6)
    np.testing.assert_allclose(group_advantages(jnp.array(rewards)), want, atol=1e-6)
