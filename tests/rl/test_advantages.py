"""Advantages by hand and against numpy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from zerosearch_jax.rl.advantages import (
    adapted_kl_coef,
    baseline_advantages,
    gae,
    group_advantages,
    leave_one_out_advantages,
    returns_to_go,
    token_rewards,
    whiten,
)

NAN = np.nan
SHAPE = (3, 6)
CLOSE = {"rtol": 1e-6, "atol": 1e-6}

some_rewards = st.sampled_from([0.0, 0.25, 0.4, 0.5, 1.0])
groups = st.sampled_from([(1, 1), (2, 1), (1, 2), (3, 5)]).flatmap(
    lambda shape: hnp.arrays(np.float32, shape, elements=some_rewards)
)
"""[Q, G] rewards, including groups of one and groups of equal rewards."""
numbers = hnp.arrays(
    np.float32, SHAPE, elements=st.sampled_from([-1.0, -0.7, -0.25, 0.0, 0.3, 0.5, 1.0])
)
any_float64 = hnp.arrays(np.float64, SHAPE, elements=st.floats(-10, 10))
discounts = st.sampled_from([0.0, 0.5, 0.9, 1.0])
masks = hnp.arrays(bool, SHAPE)
"""Ragged masks with gaps and with rows without policy tokens."""


def policy_tokens(mask):
    """Yields the index and the policy tokens' columns of each row that has any."""
    for row, flags in enumerate(mask):
        columns = [column for column, flag in enumerate(flags) if flag]
        if columns:
            yield row, columns


def spoilt(x, mask):
    return jnp.array(np.where(mask, x, NAN).astype(x.dtype))


def test_by_hand():
    # Group (0, 1): mean 1/2, unbiased std sqrt(1/2). Group (1, 3): mean 2, std sqrt(2).
    got = group_advantages(jnp.array([[0.0, 1.0], [1.0, 3.0]]), eps=0.0)
    r = 2**-0.5
    np.testing.assert_allclose(got, [[-r, r], [-r, r]], rtol=1e-6)


def test_std_is_unbiased():
    # (0, 0, 3) has mean 1, squares 1 + 1 + 4 = 6 and std sqrt(6/2); the biased std is sqrt(6/3).
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
    """The float32 mean of equal rewards 0.1 may differ from 0.1; eps would amplify the rest."""
    estimator = jax.jit(group_advantages)
    for group in range(2, 12):
        got = estimator(jnp.full((2, group), reward))
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


def test_leave_one_out_by_hand():
    # Means of the others: 3 for reward 0, 5/2 for 1, 1/2 for 5.
    got = leave_one_out_advantages(jnp.array([[0.0, 1.0, 5.0], [2.0, 2.0, 2.0]]))
    np.testing.assert_allclose(got, [[-3.0, -1.5, 4.5], [0.0, 0.0, 0.0]], rtol=1e-6)


def others_mean(group, member):
    others = [float(r) for g, r in enumerate(group) if g != member]
    return sum(others) / len(others)


@settings(deadline=None, max_examples=50)
@given(groups)
def test_leave_one_out_equals_numpy_in_float64(rewards):
    size = rewards.shape[1]
    if size == 1:
        with pytest.raises(ValueError, match="1 episode"):
            leave_one_out_advantages(jnp.array(rewards))
        return
    got = leave_one_out_advantages(jnp.array(rewards))
    want = [[r - others_mean(group, g) for g, r in enumerate(group)] for group in rewards]
    np.testing.assert_allclose(got, want, **CLOSE)
    wide = rewards.astype(np.float64)
    scaled = size / (size - 1) * (wide - wide.mean(axis=1, keepdims=True))
    np.testing.assert_allclose(got, scaled, **CLOSE)
    np.testing.assert_allclose(np.asarray(got).sum(axis=1), 0.0, atol=1e-6)


def test_baselines_by_hand():
    rewards = jnp.array([[0.0, 1.0], [1.0, 4.0]])
    want = {
        "none": [[0.0, 1.0], [1.0, 4.0]],
        "batch_mean": [[-1.5, -0.5], [-0.5, 2.5]],
        "group_mean": [[-0.5, 0.5], [-1.5, 1.5]],
    }
    for baseline, advantages in want.items():
        np.testing.assert_array_equal(baseline_advantages(rewards, baseline=baseline), advantages)


@settings(deadline=None, max_examples=50)
@given(groups)
def test_baselines_equal_numpy_in_float64(rewards):
    flat = [float(r) for r in rewards.ravel()]
    means = {"none": 0.0, "batch_mean": sum(flat) / len(flat)}
    if rewards.shape[1] > 1:
        means["group_mean"] = np.array([[sum(map(float, g)) / len(g)] for g in rewards])
    else:
        with pytest.raises(ValueError, match="1 episode"):
            baseline_advantages(jnp.array(rewards), baseline="group_mean")
    for baseline, mean in means.items():
        got = baseline_advantages(jnp.array(rewards), baseline=baseline)
        np.testing.assert_allclose(got, rewards.astype(np.float64) - mean, **CLOSE)


def test_an_unknown_baseline_is_refused():
    with pytest.raises(ValueError, match="'mean'.*none, batch_mean, group_mean"):
        baseline_advantages(jnp.zeros((1, 2)), baseline="mean")


def group_estimators():
    return {
        "grpo": group_advantages,
        "dr_grpo": lambda r: group_advantages(r, normalize_std=False),
        "rloo": leave_one_out_advantages,
        "none": lambda r: baseline_advantages(r, baseline="none"),
        "batch_mean": lambda r: baseline_advantages(r, baseline="batch_mean"),
        "group_mean": lambda r: baseline_advantages(r, baseline="group_mean"),
    }


@pytest.mark.parametrize("name", group_estimators())
@pytest.mark.parametrize("rest", [0.0, 1.0, NAN])
def test_a_nan_reward_reaches_its_group(name, rest):
    """Groups of equal rewards are set to 0, but not a group with a NaN."""
    got = group_estimators()[name](jnp.array([[NAN, rest], [1.0, 0.0]]))
    if name == "none":
        want = [[True, bool(np.isnan(rest))], [False, False]]
    else:
        want = [[True, True], [name == "batch_mean"] * 2]
    np.testing.assert_array_equal(np.isnan(got), want)


@pytest.mark.parametrize("normalize_std", [True, False])
def test_a_nan_in_a_group_of_one_stays(normalize_std):
    got = group_advantages(jnp.array([[NAN], [1.0]]), normalize_std=normalize_std)
    np.testing.assert_array_equal(got, [[NAN], [1.0]])


@pytest.mark.parametrize("name", ["rloo", "batch_mean", "group_mean"])
def test_equal_rewards_give_exactly_zero_with_any_baseline(name):
    estimator = jax.jit(group_estimators()[name])
    for group in (2, 3, 7, 11):
        for reward in (0.1, 2 / 3, 1e4 / 3):
            got = estimator(jnp.full((2, group), reward))
            np.testing.assert_array_equal(got, np.zeros((2, group)))


@pytest.mark.parametrize("name", group_estimators())
def test_group_estimators_keep_float64_widen_other_dtypes_and_check_the_rank(name):
    estimator = group_estimators()[name]
    assert estimator(jnp.array([[0, 1]])).dtype == jnp.float32
    assert estimator(jnp.array([[0, 1]], jnp.bfloat16)).dtype == jnp.float32
    with jax.enable_x64(True):
        assert estimator(jnp.array([[0.0, 1.0]])).dtype == jnp.float64
    with pytest.raises(ValueError, match=r"\(4,\)"):
        estimator(jnp.zeros(4))


@settings(deadline=None, max_examples=40)
@given(
    hnp.arrays(np.int8, (3, 5), elements=st.integers(0, 16)),
    st.sampled_from([1.0, 1000.0, -1000.0, 4096.0]),
    st.sampled_from([2.0**-11, 2.0**-9, 1.0]),
)
def test_a_constant_added_to_all_rewards_changes_no_advantage(levels, constant, unit):
    """The rewards are exact in float32, such as 1000 ± 0.001; their sum is not."""
    rewards = constant + levels * unit
    narrow = rewards.astype(np.float32)
    assert (narrow == rewards).all()
    for name in group_estimators().keys() - {"none"}:
        estimator = group_estimators()[name]
        got = estimator(jnp.array(narrow))
        with jax.enable_x64(True):
            want = np.asarray(estimator(jnp.array(levels * unit, jnp.float64)))
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6 * np.ptp(want), err_msg=name)


def test_token_rewards_by_hand():
    mask = jnp.array([[1, 1, 0, 1, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]], jnp.float32)
    scores = jnp.array([2.0, 7.0, -1.0])
    plain = [[0, 0, 0, 2, 0], [0, 0, 0, 0, 0], [0, 0, 0, 0, -1]]
    np.testing.assert_array_equal(token_rewards(scores, mask), plain)
    kl = jnp.where(mask == 1, jnp.array([[1.0, 2.0, 3.0, 4.0, 5.0]]), NAN)
    with_kl = [[-0.5, -1, 0, 0, 0], [0, 0, 0, 0, 0], [-0.5, -1, -1.5, -2, -3.5]]
    np.testing.assert_array_equal(token_rewards(scores, mask, kl=kl, kl_coef=0.5), with_kl)


@settings(deadline=None, max_examples=40)
@given(hnp.arrays(np.float32, SHAPE[:1], elements=some_rewards), numbers, masks)
def test_token_rewards_equal_numpy_in_float64(scores, kl, mask):
    want = np.zeros(SHAPE)
    for row, columns in policy_tokens(mask):
        for column in columns:
            want[row, column] = -0.1 * float(kl[row, column])
        want[row, columns[-1]] += float(scores[row])
    unread = np.where(mask.any(axis=1), scores, NAN).astype(np.float32)
    got = token_rewards(jnp.array(unread), jnp.array(mask), kl=spoilt(kl, mask), kl_coef=0.1)
    np.testing.assert_allclose(got, want, **CLOSE)
    np.testing.assert_array_equal(np.asarray(got)[~mask], 0.0)
    np.testing.assert_allclose(
        np.asarray(token_rewards(jnp.array(unread), jnp.array(mask))).sum(axis=1),
        np.where(mask.any(axis=1), scores, 0.0),
    )


def test_a_kl_coefficient_needs_a_kl():
    with pytest.raises(ValueError, match="kl_coef is 0.1"):
        token_rewards(jnp.zeros(2), jnp.ones((2, 3)), kl_coef=0.1)


def test_returns_to_go_by_hand():
    # Policy tokens a and b, an inserted document without discount, then c.
    rewards = jnp.array([[1.0, 2.0, NAN, NAN, 4.0, NAN], [3.0, NAN, 5.0, NAN, NAN, NAN]])
    mask = jnp.array([[1, 1, 0, 0, 1, 0], [0, 0, 1, 0, 0, 0]])
    got = returns_to_go(rewards, mask, gamma=0.5)
    # c: 4. b: 2 + 4/2. a: 1 + 4/2.
    np.testing.assert_array_equal(got, [[3, 4, 0, 0, 4, 0], [0, 0, 5, 0, 0, 0]])


def returns_by_loop(rewards, mask, gamma):
    want = np.zeros(mask.shape)
    for row, columns in policy_tokens(mask):
        for i, column in enumerate(columns):
            later = [gamma**k * float(rewards[row, c]) for k, c in enumerate(columns[i:])]
            want[row, column] = sum(later)
    return want


@settings(deadline=None, max_examples=60)
@given(numbers, masks, discounts)
def test_returns_to_go_equal_numpy_in_float64(rewards, mask, gamma):
    got = returns_to_go(spoilt(rewards, mask), jnp.array(mask), gamma=gamma)
    np.testing.assert_allclose(got, returns_by_loop(rewards, mask, gamma), **CLOSE)
    np.testing.assert_array_equal(np.asarray(got)[~mask], 0.0)


def test_gae_by_hand():
    # gamma 1/2, lambda 1/2. Policy tokens with rewards 0, 0, 8 and values 2, 4, 6.
    # Deltas: 0 + 4/2 - 2 = 0; 0 + 6/2 - 4 = -1; 8 + 0 - 6 = 2. Weight of the next: 1/4.
    # Advantages: 2; -1 + 2/4 = -1/2; 0 - 1/8. Returns: 8; 7/2; 15/8.
    rewards = jnp.array([[NAN, 0.0, NAN, 0.0, 8.0, NAN]])
    values = jnp.array([[9.0, 2.0, NAN, 4.0, 6.0, NAN]])
    mask = jnp.array([[0, 1, 0, 1, 1, 0]], jnp.float32)
    advantages, returns = gae(rewards, values, mask, gamma=0.5, gae_lambda=0.5)
    np.testing.assert_array_equal(advantages, [[0, -0.125, 0, -0.5, 2, 0]])
    np.testing.assert_array_equal(returns, [[0, 1.875, 0, 3.5, 8, 0]])


def gae_by_definition(rewards, values, mask, gamma, gae_lambda):
    """Computes eq. 14-16 unrolled: each advantage is a sum over the deltas that follow."""
    advantages, returns = np.zeros(mask.shape), np.zeros(mask.shape)
    for row, columns in policy_tokens(mask):
        r = [float(rewards[row, c]) for c in columns]
        v = [float(values[row, c]) for c in columns] + [0.0]
        delta = [r[i] + gamma * v[i + 1] - v[i] for i in range(len(r))]
        for i, column in enumerate(columns):
            a = sum((gamma * gae_lambda) ** k * d for k, d in enumerate(delta[i:]))
            advantages[row, column], returns[row, column] = a, a + v[i]
    return advantages, returns


@settings(deadline=None, max_examples=60)
@given(numbers, numbers, masks, discounts, discounts)
def test_gae_equals_numpy_in_float64(rewards, values, mask, gamma, gae_lambda):
    got = gae(
        spoilt(rewards, mask),
        spoilt(values, mask),
        jnp.array(mask),
        gamma=gamma,
        gae_lambda=gae_lambda,
    )
    want = gae_by_definition(rewards, values, mask, gamma, gae_lambda)
    for got_one, want_one in zip(got, want, strict=True):
        np.testing.assert_allclose(got_one, want_one, **CLOSE)
        np.testing.assert_array_equal(np.asarray(got_one)[~mask], 0.0)


@settings(deadline=None, max_examples=40)
@given(any_float64, any_float64, masks, st.floats(0, 1), st.floats(0, 1))
def test_float64_stays_float64(rewards, values, mask, gamma, gae_lambda):
    with jax.enable_x64(True):
        r, v, m = spoilt(rewards, mask), spoilt(values, mask), jnp.array(mask)
        got = (
            *gae(r, v, m, gamma=gamma, gae_lambda=gae_lambda),
            returns_to_go(r, m, gamma=gamma),
            whiten(v, m, eps=0.1),
        )
    want = (
        *gae_by_definition(rewards, values, mask, gamma, gae_lambda),
        returns_by_loop(rewards, mask, gamma),
        whitened(values, mask, eps=0.1),
    )
    for got_one, want_one in zip(got, want, strict=True):
        assert got_one.dtype == jnp.float64
        np.testing.assert_allclose(got_one, want_one, rtol=1e-12, atol=1e-12)


@settings(deadline=None, max_examples=40)
@given(numbers, numbers, masks, discounts)
def test_gae_at_lambda_one_and_zero(rewards, values, mask, gamma):
    r, v, m = map(jnp.array, (rewards, values, mask))
    to_go = returns_to_go(r, m, gamma=gamma)
    advantages, returns = gae(r, jnp.zeros(SHAPE), m, gamma=gamma, gae_lambda=1.0)
    np.testing.assert_array_equal(advantages, to_go)
    np.testing.assert_array_equal(returns, to_go)
    # The values cancel in the returns.
    _, returns = gae(r, v, m, gamma=gamma, gae_lambda=1.0)
    np.testing.assert_allclose(returns, to_go, rtol=1e-6, atol=2e-6)
    # With lambda 0 a return is the reward plus the next value, which is 0 at the last token.
    _, returns = gae(r, v, m, gamma=gamma, gae_lambda=0.0)
    for row, columns in policy_tokens(mask):
        last = columns[-1]
        np.testing.assert_allclose(returns[row, last], rewards[row, last], **CLOSE)


@settings(deadline=None, max_examples=30)
@given(numbers, numbers, masks)
def test_documents_between_policy_tokens_change_nothing(rewards, values, mask):
    r, v, m = map(jnp.array, (rewards, values, mask))
    spread = gae(r, v, m, gamma=0.9, gae_lambda=0.5)
    order = np.argsort(~mask, axis=1, kind="stable")  # policy tokens first, in order
    packed = [np.take_along_axis(x, order, axis=1) for x in (rewards, values, mask)]
    together = gae(*map(jnp.array, packed), gamma=0.9, gae_lambda=0.5)
    for one, other in zip(spread, together, strict=True):
        one = np.take_along_axis(np.asarray(one), order, axis=1)
        np.testing.assert_allclose(one, other, **CLOSE)


def test_a_nan_reward_or_value_reaches_the_tokens_before_it():
    mask = jnp.array([[1, 1, 0, 1, 1]])
    x, one = jnp.array([[0.0, 1.0, 1.0, NAN, 1.0]]), jnp.ones((1, 5))
    want = [[True, True, False, True, False]]
    np.testing.assert_array_equal(np.isnan(returns_to_go(x, mask, gamma=0.9)), want)
    for arrays in ((x, one), (one, x)):
        for got in gae(*arrays, mask, gamma=0.9, gae_lambda=0.9):
            np.testing.assert_array_equal(np.isnan(got), want)


def test_long_sequences_keep_their_digits():
    """Adding 1000 rewards of 0.1 one by one in float32 would lose digits."""
    got = returns_to_go(jnp.full((1, 1000), 0.1), jnp.ones((1, 1000)), gamma=1.0)
    want = float(np.float32(0.1)) * np.arange(1000, 0, -1)
    np.testing.assert_allclose(got[0], want, rtol=1e-6)


def test_another_discount_compiles_nothing():
    rewards, mask = jnp.ones((2, 5)), jnp.ones((2, 5), bool)
    returns_to_go(rewards, mask, gamma=0.9)
    gae(rewards, rewards, mask, gamma=0.9, gae_lambda=0.9)
    compiled = returns_to_go._cache_size(), gae._cache_size()
    returns_to_go(rewards, mask, gamma=0.8)
    gae(rewards, rewards, mask, gamma=0.7, gae_lambda=0.6)
    assert (returns_to_go._cache_size(), gae._cache_size()) == compiled


def test_whiten_by_hand():
    # Policy tokens 1, 1, 5, 5: mean 3, population std 2.
    x = jnp.array([[1.0, NAN, 5.0], [NAN, 5.0, 1.0], [NAN, NAN, NAN]])
    mask = jnp.array([[1, 0, 1], [0, 1, 1], [0, 0, 0]], jnp.float32)
    np.testing.assert_allclose(whiten(x, mask), [[-1, 0, 1], [0, 1, -1], [0, 0, 0]], rtol=1e-6)
    np.testing.assert_allclose(whiten(x, mask, eps=2.0)[0], [-0.5, 0, 0.5], rtol=1e-6)


def whitened(x, mask, eps):
    chosen = [float(x[row, c]) for row, columns in policy_tokens(mask) for c in columns]
    want = np.zeros(mask.shape)
    if len(set(chosen)) > 1:
        mean = sum(chosen) / len(chosen)
        std = np.sqrt(sum(c * c for c in (one - mean for one in chosen)) / len(chosen))
        for row, columns in policy_tokens(mask):
            want[row, columns] = [(float(x[row, c]) - mean) / (std + eps) for c in columns]
    return want


@settings(deadline=None, max_examples=60)
@given(numbers, masks)
def test_whiten_equals_numpy_in_float64(x, mask):
    got = np.asarray(whiten(spoilt(x, mask), jnp.array(mask)))
    np.testing.assert_allclose(got, whitened(x, mask, eps=1e-8), **CLOSE)
    np.testing.assert_array_equal(got[~mask], 0.0)
    if got.any():
        np.testing.assert_allclose([got[mask].mean(), got[mask].std()], [0, 1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("value", [0.0, 0.1, 2 / 3, 1e4 / 3])
def test_whiten_gives_exactly_zero_if_all_are_equal(value):
    for count in range(1, 12):
        mask = np.arange(12).reshape(2, 6) < count
        got = whiten(spoilt(np.full((2, 6), value, np.float32), mask), jnp.array(mask))
        np.testing.assert_array_equal(got, np.zeros((2, 6)))


def test_whiten_keeps_the_digits_of_a_small_spread():
    """1000 + (0, 0, 0, 1/1024) is exact in float32, but its mean is not."""
    x = jnp.array([[1000.0, 1000.0, 1000.0, 1000.0 + 2**-10]])
    got = whiten(x, jnp.ones((1, 4)), eps=1e-12)
    np.testing.assert_allclose(got, np.array([[-1, -1, -1, 3]]) / np.sqrt(3), rtol=1e-6)


def test_whiten_without_policy_tokens_is_zero():
    got = whiten(jnp.full((2, 3), NAN), jnp.zeros((2, 3)))
    np.testing.assert_array_equal(got, np.zeros((2, 3)))


def test_whiten_keeps_a_nan():
    got = whiten(jnp.array([[NAN, 1.0, 1.0]]), jnp.array([[1, 1, 0]]))
    np.testing.assert_array_equal(got, [[NAN, NAN, 0.0]])


def test_token_arrays_are_widened_and_their_shapes_checked():
    low = jnp.ones((2, 3), jnp.bfloat16)
    results = (
        token_rewards(low[:, 0], low, kl=low, kl_coef=0.1),
        returns_to_go(low, low, gamma=0.9),
        *gae(low, low, low, gamma=0.9, gae_lambda=0.9),
        whiten(low, low),
    )
    assert {x.dtype for x in results} == {jnp.dtype("float32")}
    one, other = jnp.ones((2, 3)), jnp.ones((2, 4))
    for wrong in (
        lambda: token_rewards(jnp.ones(3), one),
        lambda: token_rewards(jnp.ones(2), one, kl=other, kl_coef=0.1),
        lambda: returns_to_go(one, other, gamma=0.9),
        lambda: gae(one, other, one, gamma=0.9, gae_lambda=0.9),
        lambda: whiten(jnp.ones(3), jnp.ones(3)),
    ):
        with pytest.raises(ValueError, match=r"\(2, 3\)|\(3,\)"):
            wrong()


@pytest.mark.parametrize(
    ("kl", "want"),
    [
        (6.0, 0.2),  # on target
        (6.6, 0.2 * 1.01),  # 10% above, 0.1 × 512 / 5120
        (5.7, 0.2 * 0.995),
        (60.0, 0.2 * 1.02),  # clipped at 0.2
        (0.0, 0.2 * 0.98),
        (float("inf"), 0.2 * 1.02),
    ],
)
def test_adapted_kl_coef_by_hand(kl, want):
    got = adapted_kl_coef(0.2, kl, target=6.0, horizon=5120, episodes=512)
    assert type(got) is float
    assert got == pytest.approx(want, rel=1e-12)


def test_adapted_kl_coef_converges_to_the_target():
    """With a KL of 1 / coef, the coefficient for KL 4 is 1/4."""
    coef = 3.0
    for _ in range(300):
        coef = adapted_kl_coef(coef, 1 / coef, target=4.0, horizon=1000, episodes=100)
    assert coef == pytest.approx(0.25, rel=1e-6)


def test_adapted_kl_coef_keeps_a_nan():
    assert np.isnan(adapted_kl_coef(0.2, NAN, target=6.0, horizon=100, episodes=10))


@pytest.mark.parametrize("wrong", [{"target": 0.0}, {"horizon": 0}, {"horizon": 2}])
def test_adapted_kl_coef_refuses_a_horizon_that_could_make_it_negative(wrong):
    settings_ = {"target": 6.0, "horizon": 100, "episodes": 10} | wrong
    with pytest.raises(ValueError, match="must be above 0"):
        adapted_kl_coef(0.2, 1.0, **settings_)
