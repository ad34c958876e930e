"""Advantages, returns and weights of ragged sequences against loops in numpy float64."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from zerosearch_jax.rl.experience import (
    AdvantageEstimator,
    minibatches,
    with_advantages,
    with_scores,
    with_weights,
)

from zerosearch_jax.data.packing import TokenSequence, pack
from zerosearch_jax.errors import UserError

NAN = np.nan
ROW_TOKENS = 12
CLOSE = {"rtol": 1e-4, "atol": 2e-5}

ESTIMATORS = {
    "grpo": AdvantageEstimator("grpo"),
    "dr_grpo": AdvantageEstimator("grpo", normalize_std=False),
    "rloo": AdvantageEstimator("rloo"),
    "none": AdvantageEstimator("reinforce", baseline="none"),
    "batch_mean": AdvantageEstimator("reinforce", baseline="batch_mean"),
    "group_mean": AdvantageEstimator("reinforce", baseline="group_mean"),
    "reinforce_pp": AdvantageEstimator("reinforce_pp", gamma=0.5),
    "reinforce_pp, undiscounted": AdvantageEstimator("reinforce_pp"),
    "ppo": AdvantageEstimator("ppo", gamma=0.5, gae_lambda=0.5),
    "ppo, undiscounted": AdvantageEstimator("ppo"),
}
KL = {
    "k1": lambda d: d,
    "k2": lambda d: d * d / 2,
    "k3": lambda d: np.exp(-d) + d - 1,
}


def of_policy(sequence, name):
    """The column's numbers at the sequence's policy tokens, one after another."""
    column = sequence.columns[name]
    return [float(column[i]) for i, flag in enumerate(sequence.mask) if flag]


def scattered(sequence, numbers):
    """The other way round; 0 at tokens that the policy did not write."""
    left = iter(numbers)
    return [next(left) if flag else 0.0 for flag in sequence.mask]


def standardised(lists):
    """Lists of numbers, less their common mean, over their common population std."""
    flat = [x for numbers in lists for x in numbers]
    if not flat or min(flat) == max(flat):
        return [[0.0] * len(numbers) for numbers in lists]
    mean = sum(flat) / len(flat)
    std = (sum((x - mean) ** 2 for x in flat) / len(flat)) ** 0.5
    return [[(x - mean) / (std + 1e-8) for x in numbers] for numbers in lists]


def expected_of_group(estimator, group, everyone):
    mean = sum(group) / len(group)
    if estimator.name == "rloo":
        return [r - sum(group[:i] + group[i + 1 :]) / (len(group) - 1)
                for i, r in enumerate(group)]  # fmt: skip
    if estimator.name == "reinforce":
        baseline = {
            "none": 0.0,
            "batch_mean": sum(everyone) / len(everyone),
            "group_mean": mean,
        }[estimator.baseline]
        return [r - baseline for r in group]
    if not estimator.normalize_std:
        return [r - mean for r in group]
    if len(set(group)) == 1:
        return [0.0] * len(group)
    std = (sum((r - mean) ** 2 for r in group) / (len(group) - 1)) ** 0.5
    return [(r - mean) / (std + 1e-6) for r in group]


def expected(sequences, rewards, estimator, kl, kl_coef):
    """Advantages and returns of each sequence's tokens, and the mean KL, token by token."""
    penalties = [[0.0] * int(sum(s.mask)) for s in sequences]
    if kl:
        penalties = [
            [KL[kl](old - ref) for old, ref in zip(of_policy(s, "old_logprobs"),
                                                   of_policy(s, "ref_logprobs"), strict=True)]
            for s in sequences
        ]  # fmt: skip
    count = max(sum(len(of_one) for of_one in penalties), 1)
    mean_kl = sum(sum(of_one) for of_one in penalties) / count
    flat = [float(r) for r in rewards.ravel()]
    if estimator.name not in ("reinforce_pp", "ppo"):
        totals = [r - kl_coef * sum(of_one) for r, of_one in zip(flat, penalties, strict=True)]
        size = rewards.shape[1]
        groups = [totals[i : i + size] for i in range(0, len(totals), size)]
        advantages = [a for group in groups for a in expected_of_group(estimator, group, totals)]
        return (
            [[a] * len(s.tokens) for a, s in zip(advantages, sequences, strict=True)],
            None,
            (mean_kl),
        )
    raw, returns = [], []
    for s, score, of_one in zip(sequences, flat, penalties, strict=True):
        per_token = [-kl_coef * penalty for penalty in of_one]
        if per_token:
            per_token[-1] += score
        discounts = [estimator.gamma**i for i in range(len(per_token))]
        if estimator.name == "reinforce_pp":
            raw.append([
                sum(g * r for g, r in zip(discounts, per_token[t:], strict=False))
                for t in range(len(per_token))
            ])  # fmt: skip
            continue
        values = of_policy(s, "values")
        deltas = [
            r + estimator.gamma * after - before
            for r, before, after in zip(per_token, values, [*values, 0.0][1:], strict=True)
        ]
        decay = estimator.gamma * estimator.gae_lambda
        raw.append([
            sum(decay**i * delta for i, delta in enumerate(deltas[t:]))
            for t in range(len(deltas))
        ])  # fmt: skip
        returns.append([a + v for a, v in zip(raw[-1], values, strict=True)])
    advantages = [scattered(s, a) for s, a in zip(sequences, standardised(raw), strict=True)]
    returns = [scattered(s, r) for s, r in zip(sequences, returns, strict=False)]
    return advantages, returns, mean_kl


def check(sequences, rewards, estimator, kl="", kl_coef=0.0):
    made, figures = with_advantages(
        sequences, rewards, estimator, row_tokens=ROW_TOKENS, kl_in_reward=kl, kl_coef=kl_coef
    )
    advantages, returns, mean_kl = expected(sequences, rewards, estimator, kl, kl_coef)
    for i, (before, after) in enumerate(zip(sequences, made, strict=True)):
        added = {"advantages", "returns"} if estimator.name == "ppo" else {"advantages"}
        assert after.columns.keys() == before.columns.keys() | added
        assert (after.tokens, after.mask) == (before.tokens, before.mask)
        np.testing.assert_allclose(after.columns["advantages"], advantages[i], **CLOSE)
        if estimator.name == "ppo":
            np.testing.assert_allclose(after.columns["returns"], returns[i], **CLOSE)
    assert figures.keys() == ({"kl"} if kl else set())
    if kl:
        np.testing.assert_allclose(figures["kl"], mean_kl, **CLOSE)


@pytest.fixture(scope="module")
def sequences():
    """Six ragged ones with inserted stretches; the fourth has no policy token at all."""
    rng = np.random.default_rng(0)
    made = []
    for number, length in enumerate((12, 5, 9, 7, 2, 11)):
        mask = [float(number != 3 and i >= 1 and i % 4 != 2) for i in range(length)]
        columns = {
            name: np.where(mask, rng.normal(0, 0.7, length), NAN).astype(np.float32)
            for name in ("old_logprobs", "ref_logprobs", "values")
        }
        made.append(TokenSequence(list(range(length)), mask, columns))
    return made


@pytest.mark.parametrize("kl", ["", *KL])
@pytest.mark.parametrize("estimator", ESTIMATORS.values(), ids=ESTIMATORS)
def test_against_loops(sequences, estimator, kl):
    rewards = np.array([[0.3, 1.0, 0.0], [0.7, 0.7, 0.1]])
    check(sequences, rewards, estimator, kl, kl_coef=0.2 if kl else 0.0)


# Numbers that float32 adds, halves and quarters without rounding: what is equal stays equal.
exact = st.sampled_from([-1.0, -0.5, -0.25, 0.0, 0.25, 0.75, 1.0])
rewarded = st.sampled_from([0.0, 0.25, 0.5, 1.0])


@st.composite
def ragged(draw):
    """Six sequences of 1 to 12 tokens and any provenance, and their rewards."""
    made = []
    for _ in range(6):
        mask = [0.0, *draw(st.lists(st.sampled_from([0.0, 1.0]), max_size=ROW_TOKENS - 1))]
        values = [draw(exact) if flag else NAN for flag in mask]
        made.append(TokenSequence([5] * len(mask), mask, {"values": values}))
    rewards = np.array([draw(rewarded) for _ in range(6)])
    return made, rewards.reshape(draw(st.sampled_from([(2, 3), (3, 2)])))


@settings(deadline=None, max_examples=25)
@given(ragged(), st.sampled_from(sorted(ESTIMATORS)))
def test_any_provenance_against_loops(drawn, name):
    check(*drawn, ESTIMATORS[name])


def test_by_hand_with_a_critic():
    """γ = λ = 1: an advantage is what is still to come less the value, before whitening."""
    sequences = [
        TokenSequence([1, 2, 3, 4], [0, 1, 0, 1], {"values": [NAN, 0.5, NAN, 0.25]}),
        TokenSequence([1, 2], [0, 1], {"values": [NAN, 0.25]}),
    ]
    made, _ = with_advantages(
        sequences, np.array([[1.0, 0.0]]), AdvantageEstimator("ppo"), row_tokens=ROW_TOKENS
    )
    assert [s.columns["returns"].tolist() for s in made] == [[0, 1, 0, 1], [0, 0]]
    # Raw 0.5, 0.75 and -0.25: mean 1/3, population std sqrt(7/8 / 3 - 1/9) = sqrt(13/72).
    raw = (np.array([0.5, 0.75, -0.25]) - 1 / 3) / np.sqrt(13 / 72)
    np.testing.assert_allclose(made[0].columns["advantages"], [0, raw[0], 0, raw[1]], rtol=1e-5)
    np.testing.assert_allclose(made[1].columns["advantages"], [0, raw[2]], rtol=1e-5)


def test_by_hand_with_a_kl_in_the_reward():
    """Rewards 1 - 0.5·(0.4 + 0.2) = 0.7 and 1 - 0.5·(-0.2) = 1.1; the KL's mean is 0.4 / 3."""
    sequences = [
        TokenSequence([1, 2, 3], [0, 1, 1], {
            "old_logprobs": [NAN, -1.0, -1.0], "ref_logprobs": [NAN, -1.4, -1.2]}),
        TokenSequence([1, 2, 3], [0, 1, 0], {
            "old_logprobs": [NAN, -1.0, NAN], "ref_logprobs": [NAN, -0.8, NAN]}),
    ]  # fmt: skip
    made, figures = with_advantages(
        sequences,
        np.array([[1.0, 1.0]]),
        AdvantageEstimator("grpo", normalize_std=False),
        row_tokens=ROW_TOKENS,
        kl_in_reward="k1",
        kl_coef=0.5,
    )
    np.testing.assert_allclose(made[0].columns["advantages"], [-0.2] * 3, rtol=1e-5)
    np.testing.assert_allclose(made[1].columns["advantages"], [0.2] * 3, rtol=1e-5)
    assert figures["kl"] == pytest.approx(0.4 / 3, rel=1e-5)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_step_without_policy_tokens(sequences, name):
    """Nothing is nan, where there is nothing to average over."""
    silent = [TokenSequence(s.tokens, [0.0] * len(s.tokens), s.columns) for s in sequences]
    made, figures = with_advantages(
        silent, np.zeros((2, 3)), ESTIMATORS[name], row_tokens=ROW_TOKENS, kl_in_reward="k3",
        kl_coef=0.1,
    )  # fmt: skip
    assert figures == {"kl": 0.0}
    assert all(not np.any(s.columns["advantages"]) for s in made)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "GRPO"}, r"rl\.estimator is 'GRPO'; choose one of grpo, rloo, reinforce, "),
        ({"baseline": "mean"}, r"rl\.baseline is 'mean'; choose one of none, batch_mean, group_"),
    ],
)
def test_unknown_names_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        AdvantageEstimator(**options)


# ---- weights -------------------------------------------------------------------------------


def weights_of(masks, aggregate, fixed_tokens=0):
    sequences = [TokenSequence([3] * len(mask), mask) for mask in masks]
    weighted = with_weights(sequences, aggregate, fixed_tokens)
    for s in weighted:
        assert len(s.columns["weights"]) == len(s.tokens)
        assert len(set(np.asarray(s.columns["weights"]).tolist())) == 1
    return [float(s.columns["weights"][0]) for s in weighted]


def test_weights_by_hand():
    """3, 0, 1 and 2 policy tokens: 6 in all, in three sequences that have any."""
    masks = [[0, 1, 0, 1, 1], [0, 0], [0, 1], [0, 0, 1, 1]]
    assert weights_of(masks, "token_mean") == pytest.approx([1 / 6, 0, 1 / 6, 1 / 6])
    assert weights_of(masks, "sequence_mean") == pytest.approx([1 / 9, 0, 1 / 3, 1 / 6])
    assert weights_of(masks, "fixed_length", 5) == pytest.approx([1 / 15, 0, 1 / 15, 1 / 15])


def test_a_token_that_nothing_predicts_is_not_counted():
    """The loss has no term for a sequence's first token, whoever wrote it."""
    assert weights_of([[1, 1], [0, 1, 1, 1]], "token_mean") == pytest.approx([1 / 4] * 2)
    assert weights_of([[1, 1], [1]], "sequence_mean") == pytest.approx([1.0, 0.0])


@settings(deadline=None, max_examples=25)
@given(st.lists(st.lists(st.sampled_from([0, 1]), min_size=1, max_size=9), min_size=6, max_size=6))
def test_weights_add_up(masks):
    """To 1 where the sum is a mean; over a packed batch's tokens, as the learner sums them."""
    sums = {}
    for aggregate in ("token_mean", "sequence_mean", "fixed_length"):
        sequences = [TokenSequence([3] * len(mask), mask) for mask in masks]
        batch = pack(
            with_weights(sequences, aggregate, 4), row_tokens=20, rows=2, microbatches=None
        )
        sums[aggregate] = float((batch.mask * batch.columns["weights"]).sum())
    counts = [sum(mask[1:]) for mask in masks]
    some = float(any(counts))
    assert sums["token_mean"] == pytest.approx(some)
    assert sums["sequence_mean"] == pytest.approx(some)
    filled = sum(count > 0 for count in counts)
    assert sums["fixed_length"] == pytest.approx(sum(counts) / (4 * max(filled, 1)))


# ---- scores and minibatches ----------------------------------------------------------------


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.integers(1, 3))
def test_scores_come_back_to_their_tokens(lengths, rows):
    sequences = [
        TokenSequence([10 * n + i for i in range(length)], [1.0] * length, {"kept": [n] * length})
        for n, length in enumerate(lengths)
    ]
    sizes = dict(row_tokens=11, rows=rows, microbatches=None)
    batch = pack(sequences, **sizes)
    scores = 1.0 + np.arange(batch.tokens.size, dtype=np.float32).reshape(batch.tokens.shape)
    scored = with_scores(sequences, batch, {"a": scores, "b": -scores})
    for before, after in zip(sequences, scored, strict=True):
        assert after.tokens == before.tokens and after.columns["kept"] == before.columns["kept"]
        assert after.columns["a"][0] == 0.0 and np.all(after.columns["a"][1:] > 0)
    again = pack(scored, **sizes)
    predicting = batch.mask > 0  # every token but the first of each is a target here
    assert predicting.sum() == sum(lengths) - len(lengths)
    np.testing.assert_array_equal(again.columns["a"], np.where(predicting, scores, 0.0))
    np.testing.assert_array_equal(again.columns["b"], np.where(predicting, -scores, 0.0))


def numbered(count):
    return [TokenSequence([number], [0.0]) for number in range(count)]


def numbers(parts):
    return [[s.tokens[0] for s in part] for part in parts]


@settings(deadline=None)
@given(st.integers(0, 20), st.integers(1, 6), st.tuples(*[st.integers(0, 2**31)] * 3))
def test_minibatches_are_a_partition(count, parts, key):
    made = numbers(minibatches(numbered(count), parts, key))
    assert len(made) == parts
    assert sorted(number for part in made for number in part) == list(range(count))
    assert max(map(len, made)) - min(map(len, made)) <= 1
    assert all(part == sorted(part) for part in made)


def test_one_minibatch_is_everything_in_order():
    for key in ((0, 0, 0), (7, 3, 1)):
        assert numbers(minibatches(numbered(9), 1, key)) == [list(range(9))]


def test_the_key_alone_decides():
    keys = [(seed, step, epoch) for seed in (0, 1) for step in (0, 1) for epoch in (0, 1)]
    forwards = {key: numbers(minibatches(numbered(12), 3, key)) for key in keys}
    state = np.random.get_state()[1].tolist()
    backwards = {key: numbers(minibatches(numbered(12), 3, key)) for key in reversed(keys)}
    assert forwards == backwards
    assert np.random.get_state()[1].tolist() == state
    assert len({str(parts) for parts in forwards.values()}) == len(keys)
