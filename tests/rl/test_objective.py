"""Loss terms against loops over tokens in numpy float64."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zerosearch_jax.rl.batch import LearnerBatch
from zerosearch_jax.rl.config import CriticConfig, KLConfig, LossConfig
from zerosearch_jax.rl.objective import Objective, policy_terms, value_terms

NAN = np.nan
KL_COEF = 0.3


def objective(kl="k3", **loss):
    return Objective(LossConfig(**{"clip_low": 0.2, "clip_high": 0.3} | loss), KLConfig(0.0, kl))


SEQUENCE = dict(surrogate="sequence", aggregate="sequence_mean")
OBJECTIVES = {
    "clip": objective(),
    "dual clip": objective(dual_clip=1.5),
    "sequence": objective(**SEQUENCE, clip_low=0.05, clip_high=0.1),
    "cispo": objective(surrogate="cispo"),
    "capped": objective(importance_cap=1.1),
    "sequence, capped": objective(**SEQUENCE, importance_cap=1.1),
    "cispo, capped": objective(surrogate="cispo", importance_cap=1.1),
    "llds": objective(llds=0.4),
    "k1": objective("k1"),
    "k2, much entropy": objective("k2", entropy=0.5),
    "all": objective("k2", **SEQUENCE, entropy=0.1, llds=0.4, importance_cap=1.1),
}

# Packed sequences: row, id in the row, start, end, and the tokens of each action.
SEQUENCES = [
    (0, 1, 0, 6, [[1, 2], [4]]),
    (0, 2, 6, 10, [[7, 8]]),
    (1, 1, 0, 7, [[2, 3], [5]]),
    (1, 2, 7, 9, []),
]
WEIGHTS = [0.1, 0.2, 0.15, 0.7]
ADVANTAGES = [0.8, -1.1, 0.5, 2.0]
SHAPE = (2, 12)


@pytest.fixture(scope="module")
def batch():
    """Log-probs, entropies and a microbatch, NaN at all tokens the policy did not write."""
    rng = np.random.default_rng(10)
    arrays = {name: np.full(SHAPE, NAN) for name in
              ("weights", "advantages", "old_logprobs", "ref_logprobs", "sampler_logprobs",
               "correct", "logprobs")}  # fmt: skip
    mask, segment_ids = np.zeros(SHAPE), np.zeros(SHAPE, np.int32)
    for number, (row, segment, start, end, actions) in enumerate(SEQUENCES):
        segment_ids[row, start:end] = segment
        for t in sum(actions, []):
            mask[row, t] = 1.0
            logprob = rng.uniform(-2, -0.2)
            arrays["weights"][row, t] = WEIGHTS[number]
            arrays["advantages"][row, t] = ADVANTAGES[number]
            arrays["correct"][row, t] = float(number == 0)
            arrays["logprobs"][row, t] = logprob
            for name in ("old_logprobs", "ref_logprobs", "sampler_logprobs"):
                arrays[name][row, t] = logprob + rng.normal(0, 0.4)
    made = {name: jnp.asarray(array, jnp.float32) for name, array in arrays.items()}
    entropy = jnp.where(mask > 0, rng.uniform(0.5, 2, SHAPE), 0.0)
    made |= {"mask": jnp.asarray(mask), "segment_ids": jnp.asarray(segment_ids)}
    logprobs = made.pop("logprobs")
    return logprobs, jnp.asarray(entropy, jnp.float32), microbatch(**made)


def microbatch(**columns):
    shape = columns["mask"].shape
    unread = dict.fromkeys(("tokens", "targets", "positions"), jnp.zeros(shape, jnp.int32))
    return LearnerBatch(**unread, num_microbatches=None, **columns)


def expected(objective, logprobs, entropy, batch, kl_coef):
    """Computes the loss and the sums by name in loops over sequences and tokens."""
    at = {name: np.asarray(array, np.float64) for name, array in vars(batch).items()
          if array is not None}  # fmt: skip
    loss_config = objective.loss
    new, entropy = np.asarray(logprobs, np.float64), np.asarray(entropy, np.float64)
    low, high = 1 - loss_config.clip_low, 1 + loss_config.clip_high
    sums = dict.fromkeys(
        ("policy", "entropy", "kl", "llds", "clipped", "capped", "diff", "right", "total"), 0.0
    )
    worst = 0.0
    for row, *_, actions in SEQUENCES:
        tokens = sum(actions, [])
        drift = {t: new[row, t] - at["old_logprobs"][row, t] for t in tokens}
        for t in tokens:
            advantage, weight = at["advantages"][row, t], at["weights"][row, t]
            log_ratio = drift[t]
            if loss_config.surrogate == "sequence":
                log_ratio = sum(drift.values()) / len(tokens)
            ratio = np.exp(log_ratio)
            inside = min(max(ratio, low), high)
            if loss_config.surrogate == "cispo":
                loss, clipped = -inside * advantage * new[row, t], inside != ratio
            else:
                loss = max(-ratio * advantage, -inside * advantage)
                clipped = -inside * advantage > -ratio * advantage
                if loss_config.dual_clip and advantage < 0:
                    bound = -loss_config.dual_clip * advantage
                    loss, clipped = min(loss, bound), clipped or loss > bound
            importance = 1.0
            if loss_config.importance_cap:
                mismatch = at["old_logprobs"][row, t] - at["sampler_logprobs"][row, t]
                importance = min(np.exp(mismatch), loss_config.importance_cap)
                sums["capped"] += np.exp(mismatch) >= loss_config.importance_cap
            from_ref = new[row, t] - at["ref_logprobs"][row, t]
            kl = {
                "k1": from_ref,
                "k2": from_ref**2 / 2,
                "k3": np.exp(-from_ref) - 1 + from_ref,
            }[objective.kl.estimator]
            action = next(a for a in actions if t in a)
            less_likely = sum(drift[u] for u in action) < 0
            fallen = -drift[t] if less_likely and advantage >= 0 and drift[t] < 0 else 0.0
            sums["policy"] += weight * loss * importance
            sums["clipped"] += clipped
            sums["entropy"] += entropy[row, t]
            sums["kl"] += kl
            sums["llds"] += weight * fallen
            sums["total"] += weight * (
                loss * importance
                - loss_config.entropy * entropy[row, t]
                + kl_coef * kl
                + loss_config.llds * fallen
            )
            difference = abs(new[row, t] - at["sampler_logprobs"][row, t])
            sums["diff"] += difference
            worst = max(worst, difference)
            sums["right"] += new[row, t] * at["correct"][row, t]
    metrics = {
        "loss/policy": sums["policy"],
        "clip_fraction": sums["clipped"],
        "entropy": sums["entropy"],
        "kl": sums["kl"],
        "sampler_logprob_diff_mean": sums["diff"],
        "sampler_logprob_diff_max": worst,
        "correct_loglik": sums["right"],
        "correct_tokens": float(len(sum(SEQUENCES[0][-1], []))),
    }
    if loss_config.importance_cap:
        metrics["importance_capped"] = sums["capped"]
    if loss_config.llds:
        metrics["loss/llds"] = sums["llds"]
    return sums["total"], metrics


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
def test_policy_terms_equal_those_of_loops(batch, objective):
    total, sums = policy_terms(objective, KL_COEF, *batch)
    expected_total, metrics = expected(objective, *batch, KL_COEF)
    np.testing.assert_allclose(total, expected_total, rtol=1e-5, atol=1e-6)
    assert sums.keys() == metrics.keys()
    for name, value in metrics.items():
        np.testing.assert_allclose(sums[name], value, rtol=1e-5, atol=1e-6, err_msg=name)


def test_the_batch_reaches_every_branch(batch):
    """Some of the eight tokens are clipped, capped and preserved, but not all."""
    for name, key in (
        ("clip", "clip_fraction"),
        ("dual clip", "clip_fraction"),
        ("sequence", "clip_fraction"),
        ("cispo", "clip_fraction"),
        ("capped", "importance_capped"),
    ):
        assert 0 < expected(OBJECTIVES[name], *batch, 0.0)[1][key] < 8, name
    clip, dual = (expected(OBJECTIVES[name], *batch, 0.0)[0] for name in ("clip", "dual clip"))
    assert clip != dual
    assert expected(OBJECTIVES["llds"], *batch, 0.0)[1]["loss/llds"] > 0


def one_token(**columns):
    arrays = {name: jnp.array([[value]], jnp.float32) for name, value in columns.items()}
    return microbatch(mask=jnp.ones((1, 1)), segment_ids=jnp.ones((1, 1), jnp.int32), **arrays)


def test_one_token_by_hand():
    """The ratio 2 is clipped to 1.2, the importance weight e^0.5 capped at 1.5. With a k2 KL of
    0.4²/2 and entropy 1.5 the loss is 0.5·(-1.2·2·1.5 - 0.1·1.5 + 0.25·0.08) = -1.865."""
    old = -1.0
    new = old + np.log(2.0)
    batch = one_token(
        weights=0.5,
        advantages=2.0,
        old_logprobs=old,
        ref_logprobs=new - 0.4,
        sampler_logprobs=old - 0.5,
        correct=0.0,
    )
    total, sums = policy_terms(
        Objective(LossConfig(entropy=0.1, importance_cap=1.5), KLConfig(estimator="k2")),
        0.25,
        jnp.array([[new]], jnp.float32),
        jnp.array([[1.5]]),
        batch,
    )
    np.testing.assert_allclose(total, -1.865, rtol=1e-5)
    np.testing.assert_allclose(sums["loss/policy"], -1.8, rtol=1e-5)
    np.testing.assert_allclose(sums["kl"], 0.08, rtol=1e-5)
    assert sums["clip_fraction"] == 1 and sums["importance_capped"] == 1
    np.testing.assert_allclose(sums["sampler_logprob_diff_max"], np.log(2) + 0.5, rtol=1e-5)


@pytest.mark.parametrize("left_out", ["apply_to", "ref_logprobs"])
def test_no_kl_in_the_loss_leaves_the_coefficient_unread(batch, left_out):
    """The KL is in the reward, or there is no reference."""
    logprobs, entropy, arrays = batch
    objective = OBJECTIVES["clip"]
    if left_out == "apply_to":
        objective = replace(objective, kl=KLConfig(apply_to="reward"))
    else:
        arrays = replace(arrays, ref_logprobs=None)
    total, sums = policy_terms(objective, NAN, logprobs, entropy, arrays)
    without = expected(OBJECTIVES["clip"], logprobs, entropy, batch[2], 0.0)[0]
    np.testing.assert_allclose(total, without, rtol=1e-5)
    assert "kl" not in sums
    assert policy_terms(OBJECTIVES["clip"], KL_COEF, *batch)[0] != total


@pytest.mark.parametrize("name", ["clip", "all"])
def test_on_policy_compares_the_policy_with_itself(batch, name):
    """Every ratio is exactly 1, so even the narrowest clip clips nothing."""
    logprobs, entropy, arrays = batch
    narrow = replace(OBJECTIVES[name].loss, clip_low=1e-7, clip_high=1e-7)
    objective = replace(OBJECTIVES[name], loss=narrow)

    def run(on_policy, old_logprobs):
        given = replace(arrays, old_logprobs=old_logprobs)
        terms = replace(objective, on_policy=on_policy)
        return jax.value_and_grad(
            lambda x: policy_terms(terms, KL_COEF, x, entropy, given), has_aux=True
        )(logprobs)

    result = run(True, jnp.full(SHAPE, NAN))
    jax.tree.map(np.testing.assert_array_equal, result, run(False, logprobs))
    sums = result[0][1]
    assert sums["clip_fraction"] == 0 < run(False, arrays.old_logprobs)[0][1]["clip_fraction"]
    difference = jnp.abs(logprobs - arrays.sampler_logprobs)[arrays.mask > 0]
    np.testing.assert_allclose(sums["sampler_logprob_diff_mean"], difference.sum(), rtol=1e-6)


@pytest.mark.parametrize("name", ["clip", "dual clip", "cispo, capped", "llds", "all"])
def test_masked_tokens_are_not_read(batch, name):
    """Values at other tokens change no bit of the loss, a metric or the gradient."""
    logprobs, entropy, arrays = batch

    @jax.jit
    def run(logprobs, entropy, arrays):
        return jax.value_and_grad(
            lambda x: policy_terms(OBJECTIVES[name], KL_COEF, x, entropy, arrays), has_aux=True
        )(logprobs)

    def filled(x):
        return jnp.where(arrays.mask > 0, x, 0.25)

    tame = replace(jax.tree.map(filled, arrays), mask=arrays.mask, segment_ids=arrays.segment_ids)
    (total, sums), gradient = run(logprobs, entropy, arrays)
    (tame_total, tame_sums), tame_gradient = run(filled(logprobs), filled(entropy), tame)
    assert np.isfinite(total) and np.all(np.isfinite(gradient))
    assert np.any(gradient != 0) and np.all(gradient[arrays.mask == 0] == 0)
    jax.tree.map(
        np.testing.assert_array_equal,
        (total, sums, gradient),
        (tame_total, tame_sums, tame_gradient),
    )


# ---- the critic ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "returned", "loss", "gradient", "clipped"),
    [
        # The value is clipped to 1.2, which is further from the return than 1.5: 0.5·(1.2 - 3)².
        (1.5, 3.0, 1.62, 0.0, 1.0),
        # The value overshot the return, so the unclipped error is larger: 0.5·(1.5 - 1)².
        (1.5, 1.0, 0.125, 0.5, 0.0),
        # Within the clip: 0.5·(1.1 - 3)².
        (1.1, 3.0, 1.805, -1.9, 0.0),
    ],
)
def test_value_clip_of_one_token(value, returned, loss, gradient, clipped):
    objective = Objective(critic=CriticConfig(coef=0.7, value_clip=0.2))
    batch = one_token(weights=0.25, values=1.0, returns=returned)

    def total(value):
        return value_terms(objective, value[None, None], batch)

    (got, sums), got_gradient = jax.value_and_grad(total, has_aux=True)(jnp.float32(value))
    np.testing.assert_allclose(sums["loss/value"], 0.25 * loss, rtol=1e-5)
    np.testing.assert_allclose(got, 0.7 * 0.25 * loss, rtol=1e-5)
    np.testing.assert_allclose(got_gradient, 0.7 * 0.25 * gradient, rtol=1e-5)
    assert sums["critic/clip_fraction"] == clipped
    np.testing.assert_allclose(sums["critic/value"], value, rtol=1e-6)


def test_value_terms_read_only_policy_tokens(batch):
    mask, weights = np.asarray(batch[2].mask), np.asarray(batch[2].weights, np.float64)
    rng = np.random.default_rng(4)
    values, old, returns = (np.where(mask > 0, rng.normal(size=SHAPE), NAN) for _ in range(3))
    arrays = {"values": old, "returns": returns}
    arrays = {name: jnp.asarray(array, jnp.float32) for name, array in arrays.items()}
    total, sums = value_terms(
        Objective(critic=CriticConfig(coef=2.0, value_clip=0.0)),
        jnp.asarray(values, jnp.float32),
        replace(batch[2], **arrays),
    )
    error = np.where(mask > 0, weights * (values - returns) ** 2 / 2, 0.0).sum()
    np.testing.assert_allclose(total, 2 * error, rtol=1e-5)
    np.testing.assert_allclose(sums["critic/value"], np.nansum(values), rtol=1e-4)
    assert sums["critic/clip_fraction"] == 0
