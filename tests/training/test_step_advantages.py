"""Advantages, returns and loss weights of packed episodes, against loops in numpy float64."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zerosearch_jax.data.packing import TokenSequence, pack, pack_minibatches
from zerosearch_jax.rl.config import AdvantageConfig, KLConfig
from zerosearch_jax.training.policy_update import with_advantages, with_weights

NAN = np.nan
ROW_TOKENS = 12
CLOSE = {"rtol": 1e-4, "atol": 2e-5}

ESTIMATORS = {
    "grpo": AdvantageConfig("grpo"),
    "dr_grpo": AdvantageConfig("grpo", normalize_std=False),
    "rloo": AdvantageConfig("rloo"),
    "none": AdvantageConfig("reinforce", baseline="none"),
    "batch_mean": AdvantageConfig("reinforce", baseline="batch_mean"),
    "group_mean": AdvantageConfig("reinforce", baseline="group_mean"),
    "reinforce_pp": AdvantageConfig("reinforce_pp", gamma=0.5),
    "reinforce_pp, undiscounted": AdvantageConfig("reinforce_pp"),
    "ppo": AdvantageConfig("ppo", gamma=0.5, gae_lambda=0.5),
    "ppo, undiscounted": AdvantageConfig("ppo"),
}
KL = {
    "k1": lambda d: d,
    "k2": lambda d: d * d / 2,
    "k3": lambda d: np.exp(-d) + d - 1,
}


def of_policy(sequence, name):
    """Returns the values of a column at the sequence's policy tokens."""
    column = sequence.columns[name]
    return [float(column[i]) for i, flag in enumerate(sequence.mask) if flag]


def scattered(sequence, numbers):
    """Returns values of the policy tokens as a column, 0 at all other tokens."""
    remaining = iter(numbers)
    return [next(remaining) if flag else 0.0 for flag in sequence.mask]


def standardised(lists):
    """Subtracts the common mean and divides by the common population standard deviation."""
    flat = [x for numbers in lists for x in numbers]
    if not flat or min(flat) == max(flat):
        return [[0.0] * len(numbers) for numbers in lists]
    mean = sum(flat) / len(flat)
    std = (sum((x - mean) ** 2 for x in flat) / len(flat)) ** 0.5
    return [[(x - mean) / (std + 1e-8) for x in numbers] for numbers in lists]


def expected_of_group(estimator, group, everyone):
    mean = sum(group) / len(group)
    if estimator.estimator == "rloo":
        return [r - sum(group[:i] + group[i + 1 :]) / (len(group) - 1)
                for i, r in enumerate(group)]  # fmt: skip
    if estimator.estimator == "reinforce":
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
    """Computes advantages and returns per token, and the mean KL, in loops."""
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
    if estimator.estimator not in ("reinforce_pp", "ppo"):
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
        if estimator.estimator == "reinforce_pp":
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


def computed(sequences, rewards, estimator, kl="", kl_coef=0.0, size=6):
    """Packs the sequences, adds advantages, and returns their columns by sequence."""
    packed = pack_minibatches(sequences, size, key=(0,), row_tokens=ROW_TOKENS, rows=2)
    kl_config = KLConfig(coef=0.5 if kl else 0.0, estimator=kl or "k3", apply_to="reward")
    made, metrics = with_advantages(packed, rewards, estimator, kl_config, kl_coef)
    return made.columns(), metrics


def check(sequences, rewards, estimator, kl="", kl_coef=0.0, size=6):
    columns, metrics = computed(sequences, rewards, estimator, kl, kl_coef, size)
    advantages, returns, mean_kl = expected(sequences, rewards, estimator, kl, kl_coef)
    added = {"advantages", "returns"} if estimator.estimator == "ppo" else {"advantages"}
    assert columns.keys() == sequences[0].columns.keys() | added
    for i, sequence in enumerate(sequences):
        n = len(sequence.tokens)  # a sequence's first token is no target
        np.testing.assert_allclose(columns["advantages"][i, 1:n], advantages[i][1:], **CLOSE)
        if estimator.estimator == "ppo":
            np.testing.assert_allclose(columns["returns"][i, 1:n], returns[i][1:], **CLOSE)
        assert not np.any(columns["advantages"][i, n:])
    assert metrics.keys() == ({"kl"} if kl else set())
    if kl:
        np.testing.assert_allclose(metrics["kl"], mean_kl, **CLOSE)


@pytest.fixture(scope="module")
def sequences():
    """Six ragged sequences with inserted stretches; the fourth has no policy token."""
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
@pytest.mark.parametrize("size", [6, 4])
def test_advantages_equal_those_of_loops(sequences, estimator, kl, size):
    rewards = np.array([[0.3, 1.0, 0.0], [0.7, 0.7, 0.1]])
    check(sequences, rewards, estimator, kl, 0.2 if kl else 0.0, size)


# float32 adds, halves and quarters these numbers without rounding, so equal numbers stay equal.
exact = st.sampled_from([-1.0, -0.5, -0.25, 0.0, 0.25, 0.75, 1.0])
rewarded = st.sampled_from([0.0, 0.25, 0.5, 1.0])


@st.composite
def ragged(draw):
    """Draws six sequences of 1 to 12 tokens with any provenance, and their rewards."""
    made = []
    for _ in range(6):
        mask = [0.0, *draw(st.lists(st.sampled_from([0.0, 1.0]), max_size=ROW_TOKENS - 1))]
        values = [draw(exact) if flag else NAN for flag in mask]
        made.append(TokenSequence([5] * len(mask), mask, {"values": values}))
    rewards = np.array([draw(rewarded) for _ in range(6)])
    return made, rewards.reshape(draw(st.sampled_from([(2, 3), (3, 2)])))


@settings(deadline=None, max_examples=25)
@given(ragged(), st.sampled_from(sorted(ESTIMATORS)))
def test_advantages_of_any_provenance_equal_those_of_loops(drawn, name):
    check(*drawn, ESTIMATORS[name])


def test_gae_by_hand():
    """With γ = λ = 1 an advantage is the future reward minus the value, before whitening."""
    sequences = [
        TokenSequence([1, 2, 3, 4], [0, 1, 0, 1], {"values": [NAN, 0.5, NAN, 0.25]}),
        TokenSequence([1, 2], [0, 1], {"values": [NAN, 0.25]}),
    ]
    columns, _ = computed(sequences, np.array([[1.0, 0.0]]), AdvantageConfig("ppo"))
    assert columns["returns"][:, :4].tolist() == [[0, 1, 0, 1], [0, 0, 0, 0]]
    # Raw 0.5, 0.75 and -0.25: mean 1/3, population std sqrt(7/8 / 3 - 1/9) = sqrt(13/72).
    raw = (np.array([0.5, 0.75, -0.25]) - 1 / 3) / np.sqrt(13 / 72)
    expected = [[0, raw[0], 0, raw[1]], [0, raw[2], 0, 0]]
    np.testing.assert_allclose(columns["advantages"][:, :4], expected, rtol=1e-5)


def test_kl_in_the_reward_by_hand():
    """Rewards 1 - 0.5·(0.4 + 0.2) = 0.7 and 1 - 0.5·(-0.2) = 1.1; the mean KL is 0.4 / 3."""
    sequences = [
        TokenSequence([1, 2, 3], [0, 1, 1], {
            "old_logprobs": [NAN, -1.0, -1.0], "ref_logprobs": [NAN, -1.4, -1.2]}),
        TokenSequence([1, 2, 3], [0, 1, 0], {
            "old_logprobs": [NAN, -1.0, NAN], "ref_logprobs": [NAN, -0.8, NAN]}),
    ]  # fmt: skip
    dr_grpo = AdvantageConfig("grpo", normalize_std=False)
    columns, metrics = computed(sequences, np.array([[1.0, 1.0]]), dr_grpo, "k1", 0.5)
    expected = [[0, -0.2, -0.2], [0, 0.2, 0.2]]
    np.testing.assert_allclose(columns["advantages"][:, :3], expected, rtol=1e-5)
    assert metrics["kl"] == pytest.approx(0.4 / 3, rel=1e-5)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_step_without_policy_tokens_has_no_nan(sequences, name):
    silent = [TokenSequence(s.tokens, [0.0] * len(s.tokens), s.columns) for s in sequences]
    columns, metrics = computed(silent, np.zeros((2, 3)), ESTIMATORS[name], "k3", 0.1)
    assert metrics == {"kl": 0.0}
    assert not np.any(columns["advantages"])


# ---- weights -------------------------------------------------------------------------------


def weights_of(masks, aggregate, fixed_tokens=0):
    """Returns the weight of each sequence's tokens."""
    sequences = [TokenSequence([3] * len(mask), mask) for mask in masks]
    batch = pack(sequences, row_tokens=9, rows=2, microbatches=None)
    weighted = with_weights(batch, aggregate, fixed_tokens)
    by_sequence = weighted.unpack(weighted.columns["weights"])
    for weights, mask in zip(by_sequence, masks, strict=True):
        assert len(set(weights[1 : len(mask)].tolist())) <= 1
    return by_sequence.max(axis=1).tolist()


def test_weights_by_hand():
    """3, 0, 1 and 2 policy tokens: 6 in total, in three sequences with any."""
    masks = [[0, 1, 0, 1, 1], [0, 0], [0, 1], [0, 0, 1, 1]]
    assert weights_of(masks, "token_mean") == pytest.approx([1 / 6, 0, 1 / 6, 1 / 6])
    assert weights_of(masks, "sequence_mean") == pytest.approx([1 / 9, 0, 1 / 3, 1 / 6])
    assert weights_of(masks, "fixed_length", 5) == pytest.approx([1 / 15, 0, 1 / 15, 1 / 15])


def test_a_sequences_first_token_has_no_weight():
    """The loss has no term for a token that nothing predicts, whoever wrote it."""
    assert weights_of([[1, 1], [0, 1, 1, 1]], "token_mean") == pytest.approx([1 / 4] * 2)
    assert weights_of([[1, 1], [1]], "sequence_mean") == pytest.approx([1.0, 0.0])


@settings(deadline=None, max_examples=25)
@given(st.lists(st.lists(st.sampled_from([0, 1]), min_size=1, max_size=9), min_size=6, max_size=6))
def test_weights_of_a_mean_sum_to_one(masks):
    sums = {}
    for aggregate in ("token_mean", "sequence_mean", "fixed_length"):
        sequences = [TokenSequence([3] * len(mask), mask) for mask in masks]
        batch = pack(sequences, row_tokens=20, rows=2, microbatches=None)
        weights = with_weights(batch, aggregate, 4).columns["weights"]
        sums[aggregate] = float((batch.mask * weights).sum())
    counts = [sum(mask[1:]) for mask in masks]
    any_tokens = float(any(counts))
    assert sums["token_mean"] == pytest.approx(any_tokens)
    assert sums["sequence_mean"] == pytest.approx(any_tokens)
    filled = sum(count > 0 for count in counts)
    assert sums["fixed_length"] == pytest.approx(sum(counts) / (4 * max(filled, 1)))
