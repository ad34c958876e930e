"""The learner's step: its results, and their independence of packing, order and mesh."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from zerosearch_jax import config_flags
from zerosearch_jax.data.packing import TokenSequence, pack
from zerosearch_jax.generate.generator import Generator
from zerosearch_jax.generate.sampling import Sampling
from zerosearch_jax.generate.stops import build_stop_table
from zerosearch_jax.models.transformer import abstract_model, init_params, param_shardings
from zerosearch_jax.parallel.mesh import make_mesh
from zerosearch_jax.rl import learner as learner_module
from zerosearch_jax.rl.config import LossConfig
from zerosearch_jax.rl.learner import Learner
from zerosearch_jax.rl.objective import Objective
from zerosearch_jax.rl.optimizer import OptimizerSpec, adamw, warmup_cosine
from zerosearch_jax.training.config import RLConfig
from zerosearch_jax.training.policy_update import objective_of, with_weights

LOSS = Objective(LossConfig(clip_high=0.3, entropy=0.02), temperature=0.9)
KL = 0.05
LENGTHS = (14, 9, 7, 11, 5, 12)


def constant(rate):
    return warmup_cosine(rate, warmup_steps=0, total_steps=10, final_fraction=1.0)


@pytest.fixture(scope="module")
def make_learner(tiny_config):
    """Builds learners with gradient descent at rate 1, so parameters change by the gradient."""

    def make(mesh=None, optimizer=None, schedule=None, **options):
        policy = OptimizerSpec(optimizer or optax.sgd(1.0), schedule or constant(1.0))
        return Learner(
            tiny_config, mesh=mesh or make_mesh(), policy=policy, logprob_chunk=8, **options
        )

    return make


@pytest.fixture(scope="module")
def sgd(make_learner):
    return make_learner()


@pytest.fixture(scope="module")
def models(tiny_config):
    """Two sets of parameters close to each other."""

    @jax.jit
    def make():
        first, other = init_params(tiny_config, 0), init_params(tiny_config, 1)
        return first, jax.tree.map(lambda a, b: 0.9 * a + 0.3 * b, first, other)

    return make()


@pytest.fixture(scope="module")
def params0(models):
    return models[0]


@pytest.fixture(scope="module")
def reference(models):
    return models[1]


@pytest.fixture(scope="module")
def true_logprobs(tiny_config):
    """Returns `(params, tokens, temperature) -> [n, V]` log-probs, without packing, in numpy."""
    graphdef, _ = abstract_model(tiny_config)

    @jax.jit
    def logits(params, tokens):
        model = nnx.merge(graphdef, params)
        hidden = model(tokens, jnp.arange(16)[None], jnp.zeros_like(tokens))
        return model.logits(hidden)[0]

    def run(params, tokens, temperature):
        padded = np.zeros((1, 16), np.int32)
        padded[0, : len(tokens)] = tokens
        scaled = np.asarray(logits(params, padded), np.float64)[: len(tokens)] / temperature
        return scaled - np.log(np.exp(scaled).sum(-1, keepdims=True))

    return run


@pytest.fixture(scope="module")
def sequences(params0, reference, true_logprobs, weighted):
    """Ragged sequences with masked prompts and documents, sampled by a similar policy."""
    rng = np.random.default_rng(0)
    made = []
    for number, length in enumerate(LENGTHS):
        tokens = rng.integers(0, 320, length).tolist()
        mask = [float(i >= 2 and i % 4 != 3) for i in range(length)]
        table = true_logprobs(params0, tokens, LOSS.temperature)
        logprobs = [0.0] + [table[i, tokens[i + 1]] for i in range(length - 1)]
        logprobs = (np.array(logprobs) + rng.normal(0, 0.3, length)).tolist()
        ref = true_logprobs(reference, tokens, LOSS.temperature)
        columns = {
            "old_logprobs": logprobs,
            "ref_logprobs": [0.0] + [ref[i, tokens[i + 1]] for i in range(length - 1)],
            "advantages": [float(rng.normal())] * length,
            "correct": [float(number % 2 == 0)] * length,
        }
        made.append(TokenSequence(tokens, mask, columns))
    return weighted(made)


def fresh_state(learner, params):
    """Does the same as `Learner.init` without compilation."""
    state = learner._init_state(jax.tree.map(jnp.copy, params), jax.random.key(0))
    return jax.device_put(state, learner.state_shardings)


def step(learner, params, batch, objective=LOSS, kl_coef=KL):
    state, metrics = learner.rl_step(
        fresh_state(learner, params), learner.put(batch), objective=objective, kl_coef=kl_coef
    )
    return jax.device_get((state.params["policy"], metrics))


def with_arrays(batch, **arrays):
    """Returns the batch with some arrays replaced."""
    columns = {name: arrays.pop(name) for name in batch.columns if name in arrays}
    return replace(batch, columns=batch.columns | columns, **arrays)


@pytest.fixture(scope="module")
def whole(sgd, params0, sequences):
    """The batch in one microbatch, with the parameters and metrics after its step."""
    batch = pack(sequences, row_tokens=16, rows=8, microbatches=1)
    return batch, *step(sgd, params0, batch)


def assert_close(result, expected, atol=1e-5):
    params, metrics = result
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol), params, expected[0])
    assert metrics.keys() == expected[1].keys()
    for name, value in metrics.items():
        np.testing.assert_allclose(value, expected[1][name], rtol=1e-5, atol=atol, err_msg=name)


# ---- results -------------------------------------------------------------------------------


def test_loss_and_metrics_by_hand(whole, sequences, params0, reference, true_logprobs):
    """Equations in numpy float64 on separate sequences, without packing or chunks."""
    total = dict.fromkeys(("policy", "entropy", "kl", "clip", "diff"), 0.0)
    worst, right, right_tokens, tokens = 0.0, 0.0, 0, 0
    for s in sequences:
        advantage, correct = s.columns["advantages"][0], s.columns["correct"][0]
        table = true_logprobs(params0, s.tokens, LOSS.temperature)
        ref = true_logprobs(reference, s.tokens, LOSS.temperature)
        for i in range(len(s.tokens) - 1):
            if not s.mask[i + 1]:
                continue
            new, target = table[i, s.tokens[i + 1]], s.tokens[i + 1]
            ratio = np.exp(new - s.columns["old_logprobs"][i + 1])
            plain, cut = ratio * advantage, np.clip(ratio, 0.8, 1.3) * advantage
            total["policy"] -= min(plain, cut)
            total["clip"] += cut < plain
            total["entropy"] -= np.sum(np.exp(table[i]) * table[i])
            total["kl"] += np.exp(ref[i, target] - new) - (ref[i, target] - new) - 1
            difference = abs(new - s.columns["old_logprobs"][i + 1])
            total["diff"] += difference
            worst = max(worst, difference)
            right += new * correct
            right_tokens += correct
            tokens += 1
    mean = {name: value / tokens for name, value in total.items()}
    metrics = whole[2]
    expected = {
        "loss/policy": mean["policy"],
        "entropy": mean["entropy"],
        "kl": mean["kl"],
        "clip_fraction": mean["clip"],
        "loss/total": mean["policy"] - 0.02 * mean["entropy"] + 0.05 * mean["kl"],
        "sampler_logprob_diff_mean": mean["diff"],
        "sampler_logprob_diff_max": worst,
        "correct_loglik": right / right_tokens,
    }
    assert 0 < mean["clip"] < 1 and mean["kl"] > 0.01  # so that both are tested
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-4, atol=1e-5, err_msg=name)


def test_the_gradient_is_that_of_the_reported_loss(sgd, whole, params0):
    """The central difference of the loss along the gradient is its squared norm."""
    batch, params, metrics = whole
    small = 3e-4
    moved = [
        jax.tree.map(lambda p, q, s=s: p + s * small * (q - p), params0, params) for s in (1, -1)
    ]
    ahead, behind = (step(sgd, p, batch)[1]["loss/total"] for p in moved)
    np.testing.assert_allclose((behind - ahead) / (2 * small), metrics["grad_norm"] ** 2, rtol=0.02)


def test_kl_is_zero_at_the_reference(sgd, whole, params0):
    own = np.asarray(sgd.logprobs(params0, sgd.put(whole[0]), LOSS.temperature))
    batch = whole[0].with_columns(ref_logprobs=own)
    with_kl, without = (step(sgd, params0, batch, kl_coef=coef) for coef in (KL, 0.0))
    assert abs(with_kl[1].pop("kl")) < 1e-9 and abs(without[1].pop("kl")) < 1e-9
    assert_close(with_kl, without, atol=1e-7)
    columns = {name: c for name, c in batch.columns.items() if name != "ref_logprobs"}
    assert "kl" not in step(sgd, params0, replace(batch, columns=columns))[1]


def test_logprobs_equal_those_of_separate_sequences(sgd, whole, sequences, reference):
    batch = whole[0]
    scores = np.asarray(sgd.logprobs(reference, sgd.put(batch), LOSS.temperature))
    for s, got in zip(sequences, batch.unpack(scores), strict=True):
        wanted = np.where(np.asarray(s.mask) > 0, s.columns["ref_logprobs"], 0.0)
        np.testing.assert_allclose(got[: len(s.tokens)], wanted, atol=1e-5)
        assert got[0] == 0.0


# ---- the mask ------------------------------------------------------------------------------


def test_masked_positions_are_never_read(sgd, whole, params0):
    """Values at prompt, document and padding positions change no bit."""
    batch, params, metrics = whole
    unread = batch.mask == 0
    assert 0 < unread.sum() < unread.size
    bad = {
        name: np.where(unread, np.nan, column).astype(np.float32)
        for name, column in batch.columns.items()
    }
    bad["correct"] = np.where(unread, 1.0, batch.columns["correct"]).astype(np.float32)
    bad["targets"] = np.where(unread, 123, batch.targets).astype(np.int32)
    result = step(sgd, params0, with_arrays(batch, **bad))
    jax.tree.map(np.testing.assert_array_equal, result, (params, metrics))
    # The policy's positions are read.
    doubled = with_arrays(batch, advantages=2 * batch.columns["advantages"])
    assert step(sgd, params0, doubled)[1]["loss/policy"] != metrics["loss/policy"]


def test_document_tokens_have_exactly_zero_gradient(monkeypatch, make_learner, params0, sequences):
    """d loss / d hidden is 0.0 at each position whose target the policy did not write."""
    batch = pack(sequences[:2], row_tokens=24, rows=1, microbatches=1)
    original = learner_module.chunked_logprobs
    seen = []

    @jax.custom_vjp
    def tapped(hidden):
        return hidden

    def backward(_, gradient):
        jax.debug.callback(seen.append, gradient)
        return (gradient,)

    tapped.defvjp(lambda hidden: (hidden, None), backward)
    monkeypatch.setattr(
        learner_module,
        "chunked_logprobs",
        lambda hidden, *args, **options: original(tapped(hidden), *args, **options),
    )
    step(make_learner(), params0, batch)
    jax.effects_barrier()
    (gradient,) = seen  # of the one microbatch: [1, 24, 16]
    gradient = np.asarray(gradient)[0]
    policy = batch.mask[0, 0] > 0
    assert policy.sum() == sum(sum(s.mask[1:]) for s in sequences[:2])
    assert np.all(gradient[~policy] == 0.0)
    direction = np.random.default_rng(0).normal(size=16)
    assert np.all(np.abs(gradient[policy] @ direction) > 1e-7)


# ---- independence --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cut",
    [
        dict(row_tokens=16, rows=2, microbatches=4),
        dict(row_tokens=40, rows=1, microbatches=5),  # the last microbatches are empty
    ],
    ids=["microbatches", "long rows"],
)
def test_results_do_not_depend_on_rows_and_microbatches(sgd, whole, params0, sequences, cut):
    assert_close(step(sgd, params0, pack(sequences, **cut)), whole[1:])


def test_results_do_not_depend_on_the_order_of_rows(sgd, whole, params0, sequences):
    batch = pack(sequences[::-1], row_tokens=16, rows=8, microbatches=1)
    rows = {k: v[:, ::-1] for k, v in batch.arrays().items() if v.ndim}
    assert not np.array_equal(rows["tokens"], whole[0].tokens)
    assert_close(step(sgd, params0, with_arrays(batch, **rows)), whole[1:])


def test_results_do_not_depend_on_the_mesh(make_learner, whole, params0, sequences):
    learner = make_learner(mesh=make_mesh(data=2, fsdp=2, tensor=2))
    assert_close(step(learner, params0, whole[0]), whole[1:])
    other = pack(sequences[:2], row_tokens=16, rows=8, microbatches=1)
    step(learner, params0, other)
    assert learner._jitted_rl_step._cache_size() == 1


# ---- the step ------------------------------------------------------------------------------


def test_the_state_is_donated_and_later_steps_compile_nothing(sgd, whole, params0, sequences):
    state = sgd.init(params0)
    compiled = None
    for number, part in enumerate((sequences, sequences[:2], sequences[3:]), start=1):
        batch = sgd.put(pack(part, row_tokens=16, rows=8, microbatches=1))
        old = jax.tree.leaves(state.params)
        state, _ = sgd.rl_step(state, batch, objective=LOSS, kl_coef=KL)
        assert all(leaf.is_deleted() for leaf in old)
        assert int(state.step) == number
        compiled = compiled or sgd._jitted_rl_step._cache_size()
    assert sgd._jitted_rl_step._cache_size() == compiled
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(params0))


def test_warmup_cosine_by_hand():
    schedule = warmup_cosine(2.0, warmup_steps=4, total_steps=12, final_fraction=0.1)
    np.testing.assert_allclose(
        [schedule(i) for i in (0, 1, 2, 3, 4, 8, 12, 50)],
        [0.5, 1, 1.5, 2, 2, 1.1, 0.2, 0.2],
        rtol=1e-6,
    )
    np.testing.assert_allclose([constant(0.3)(i) for i in (0, 5, 10, 99)], 0.3, rtol=1e-6)
    # The paper's schedule: a warm-up of 0.95 of the steps, then constant.
    paper = warmup_cosine(1e-6, warmup_steps=193, total_steps=203, final_fraction=1.0)
    rates = [paper(i) for i in (0, 95, 192, 193, 202)]
    np.testing.assert_allclose(rates, [1e-6 / 193, 96e-6 / 193, 1e-6, 1e-6, 1e-6], rtol=1e-5)


@pytest.mark.parametrize(("warmup_steps", "last"), [(0, 4), (1, 4), (6, 5)])
def test_a_warmup_of_any_length_ends_at_the_peak(warmup_steps, last):
    schedule = warmup_cosine(3.0, warmup_steps=warmup_steps, total_steps=5, final_fraction=0.5)
    rates = [float(schedule(i)) for i in range(12)]
    assert max(rates) == rates[max(warmup_steps - 1, 0)] == rates[warmup_steps] == 3.0
    assert rates[:warmup_steps] == pytest.approx(
        [3.0 * (i + 1) / warmup_steps for i in range(warmup_steps)]
    )
    assert rates[-1] == pytest.approx(1.5)


def test_sft_follows_the_schedule_and_lowers_the_loss(make_learner, params0, sequences):
    schedule = warmup_cosine(0.02, warmup_steps=2, total_steps=8, final_fraction=1.0)
    learner = make_learner(
        mesh=make_mesh(data=2, fsdp=2, tensor=2),
        optimizer=adamw(schedule, beta1=0.9, beta2=0.99, weight_decay=0.0, clip_norm=1.0),
        schedule=schedule,
    )
    batch = learner.put(pack(sequences, row_tokens=16, rows=4, microbatches=2))
    state, rates, losses = learner.init(params0), [], []
    for _ in range(6):
        held = float(learner.sft_loss(state, batch))
        state, metrics = learner.sft_step(state, batch)
        rates.append(float(metrics["learning_rate"]))
        losses.append(float(metrics["loss/total"]))
        np.testing.assert_allclose(losses[-1], held, rtol=1e-5)
    np.testing.assert_allclose(rates, [0.01, 0.02, 0.02, 0.02, 0.02, 0.02], rtol=1e-5)
    assert losses[2] < losses[1] < losses[0]  # the first update has an effect
    assert losses[-1] < losses[0] - 0.5
    assert learner._jitted_sft_step._cache_size() == 1


def test_sft_loss_is_the_weighted_mean(sgd, params0, true_logprobs):
    texts = [TokenSequence([3, 1, 4, 1, 5], [0.25, 0.25, 1, 0, 1]), TokenSequence([9, 2], [1, 0.5])]
    numerator = denominator = 0.0
    for s in texts:
        table = true_logprobs(params0, s.tokens, 1.0)
        for i in range(len(s.tokens) - 1):
            numerator -= s.mask[i + 1] * table[i, s.tokens[i + 1]]
            denominator += s.mask[i + 1]
    expected = numerator / denominator
    for rows, microbatches in ((1, 2), (2, 1)):
        batch = sgd.put(pack(texts, row_tokens=5, rows=rows, microbatches=microbatches))
        np.testing.assert_allclose(
            sgd.sft_loss(fresh_state(sgd, params0), batch), expected, rtol=1e-5
        )


def test_norms_and_biases_are_not_decayed(params0):
    optimizer = adamw(constant(1.0), beta1=0.0, beta2=0.0, weight_decay=0.5, clip_norm=1.0)
    zeros = jax.tree.map(jnp.zeros_like, params0)
    updates, _ = jax.jit(optimizer.update)(zeros, optimizer.init(params0), params0)

    def check(path, update, value):
        name = jax.tree_util.keystr(path)
        np.testing.assert_allclose(update, (0.0 if "norm" in name else -0.5) * value, atol=1e-6)

    jax.tree_util.tree_map_with_path(check, updates, params0)


def sampled_batch(config, params, temperature, dtype=jnp.float32):
    """Returns episodes of a real generator of `dtype` in one microbatch."""
    generator = Generator(
        config,
        stop_table=build_stop_table([b"x"] * 320, []),
        end_ids=[],
        slots=4,
        max_tokens=32,
        mesh=make_mesh(),
        prefill_buckets=(8,),
        window_tokens=32,
        dtype=dtype,
    )
    generator.load(jax.device_put(params, param_shardings(params, generator.mesh)))
    prompts = [[1, 2, 3], [4] * 9, [5, 6], [7, 8, 9, 10]]
    generator.start(range(4), prompts)
    tempered = Sampling(temperature=temperature)
    made = []
    inserted = [31, 32, 33]
    streams = [(slot, 0) for slot in range(4)]
    first = generator.decode(
        range(4), key=jax.random.key(0), streams=streams, max_new_tokens=7, sampling=tempered
    )
    generator.extend(range(4), [inserted] * 4)
    second = generator.decode(
        range(4), key=jax.random.key(0), streams=streams, max_new_tokens=7, sampling=tempered
    )
    for prompt, one, two in zip(prompts, first, second, strict=True):
        parts = [(prompt, 0.0), (one.tokens, 1.0), (inserted, 0.0), (two.tokens, 1.0)]
        mask = [weight for tokens, weight in parts for _ in tokens]
        logprobs = [0.0] * len(prompt) + one.logprobs + [0.0] * 3 + two.logprobs
        tokens = [token for tokens, _ in parts for token in tokens]
        columns = {"old_logprobs": logprobs} | dict.fromkeys(
            ("advantages", "correct"), [1.0] * len(tokens)
        )
        made.append(TokenSequence(tokens, mask, columns))
    batch = with_weights(pack(made, row_tokens=40, rows=1, microbatches=5), "token_mean", 0)
    assert batch.mask.sum() == 4 * 14
    return batch


def test_sampler_and_learner_agree(sgd, tiny_config, params0):
    """With tokens of the real generator, the first update's ratios are 1 up to rounding."""
    metrics = step(sgd, params0, sampled_batch(tiny_config, params0, LOSS.temperature))[1]
    assert metrics["sampler_logprob_diff_max"] <= 1e-4
    assert metrics["clip_fraction"] == 0
    np.testing.assert_allclose(metrics["loss/policy"], -1.0, atol=1e-4)


@pytest.mark.slow
def test_gspo_in_bfloat16_clips_nothing_in_the_first_update(make_learner, tiny_config, params0):
    """The log-probs of sampling differ by rounding, which GSPO's narrow clip takes for a change."""
    config = config_flags.typed(RLConfig, config_flags.load("configs/gspo.py:qwen2.5-3b"))
    assert config.learner.compute_dtype == config.policy.generator.dtype == "bfloat16"
    objective = objective_of(config)
    batch = sampled_batch(tiny_config, params0, objective.temperature, jnp.bfloat16)
    learner = make_learner(compute_dtype=jnp.bfloat16)
    by_source = {}
    for on_policy in (config.rl.old_logprobs == "learner", False):
        source = replace(objective, on_policy=on_policy)
        by_source[on_policy] = step(learner, params0, batch, source, kl_coef=0.0)[1]
    print({on_policy: float(m["clip_fraction"]) for on_policy, m in by_source.items()})
    assert by_source[True]["clip_fraction"] == 0 < by_source[False]["clip_fraction"]
    for metrics in by_source.values():  # still of the sampler and the learner
        assert 1e-3 < metrics["sampler_logprob_diff_mean"] < 0.05
