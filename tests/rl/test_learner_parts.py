"""The learner with critics, adapters and other objectives, and its skipped updates."""

import functools
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from zerosearch_jax.data.packing import PackedBatch, TokenSequence, pack
from zerosearch_jax.models.lora import LoRA
from zerosearch_jax.models.transformer import abstract_model, init_params
from zerosearch_jax.parallel.mesh import make_mesh
from zerosearch_jax.rl import learner as learner_module
from zerosearch_jax.rl.config import CriticConfig, KLConfig, LossConfig
from zerosearch_jax.rl.learner import Learner
from zerosearch_jax.rl.objective import Objective
from zerosearch_jax.rl.optimizer import OptimizerSpec, adamw, warmup_cosine
from zerosearch_jax.rl.train_state import TrainState

LENGTHS = (14, 9, 7, 11, 5, 12)
LENGTH = 16
ROW_TOKENS = 32
SIZES = dict(row_tokens=ROW_TOKENS, rows=4, microbatches=2)

VALUE = 0.7  # weight of the value loss
PPO = Objective(
    LossConfig(clip_high=0.3, entropy=0.02),
    KLConfig(apply_to="reward"),
    CriticConfig(coef=VALUE, value_clip=0.3),
    temperature=0.9,
)
GSPO = Objective(
    LossConfig(
        surrogate="sequence",
        clip_low=0.03,
        clip_high=0.04,
        aggregate="sequence_mean",
        llds=0.5,
        importance_cap=1.2,
    ),
    KLConfig(estimator="k2"),
    temperature=0.9,
)
KL_COEF = 0.1

POLICY_RATE, CRITIC_RATE = 1.0, 0.5
LORA = LoRA(rank=2, alpha=4.0, targets=("q", "v", "o", "down"))
HEAD = {
    "weight": np.random.default_rng(1).normal(0, 0.3, 16).astype(np.float32),
    "bias": np.float32(0.2),
}


def descent(rate):
    """Gradient descent with momentum, whose first change is the gradient times -rate."""
    schedule = optax.constant_schedule(rate)
    return OptimizerSpec(optax.sgd(schedule, momentum=0.5), schedule)


def adam():
    """AdamW with first moments in bfloat16."""
    schedule = warmup_cosine(0.01, warmup_steps=3, total_steps=9, final_fraction=0.1)
    optimizer = adamw(
        schedule,
        beta1=0.9,
        beta2=0.99,
        weight_decay=0.1,
        clip_norm=1.0,
        moment_dtype=jnp.bfloat16,
    )
    return OptimizerSpec(optimizer, schedule)


def make_learner(config, kind, policy, critic, mesh=(1, 1, 1)):
    options = {
        "plain": {},
        "own": dict(critic=critic),
        "shared": dict(critic=critic, critic_trunk="shared"),
        "lora": dict(lora=LORA),
        "lora, own": dict(lora=LORA, critic=critic),
    }[kind]
    return Learner(config, mesh=make_mesh(*mesh), policy=policy, logprob_chunk=8, **options)


@dataclass(frozen=True)
class Made:
    """A learner, its start state, and a state without zero parameters."""

    learner: Learner
    start: TrainState
    lively: TrainState


@pytest.fixture(scope="module")
def params0(tiny_config):
    return jax.jit(lambda: init_params(tiny_config, 0))()


@pytest.fixture(scope="module")
def made(tiny_config, params0):
    @functools.cache
    def make(kind, mesh=(1, 1, 1)):
        rates = descent(POLICY_RATE), descent(CRITIC_RATE)
        learner = make_learner(tiny_config, kind, *rates, mesh)
        start = learner.init(params0)
        return Made(learner, start, lively(learner, start))

    return make


def lively(learner, state):
    params = dict(state.params)
    if "critic" in params:
        params["critic"] = params["critic"] | {"head": HEAD}
    if learner.lora:
        rng = np.random.default_rng(2)
        params["policy"] = {
            name: {"a": adapter["a"], "b": rng.normal(0, 0.2, adapter["b"].shape).astype("f4")}
            for name, adapter in sorted(params["policy"].items())
        }
    return jax.device_put(replace(state, params=params), learner.state_shardings)


@pytest.fixture(scope="module")
def naive_hidden(tiny_config):
    """Returns `(params, [N, 16] tokens) -> [N, 16, D]` hidden states, one sequence per row."""
    graphdef, _ = abstract_model(tiny_config)

    def run(params, tokens):
        positions = jnp.broadcast_to(jnp.arange(LENGTH), tokens.shape)
        return nnx.merge(graphdef, params)(tokens, positions, jnp.zeros_like(tokens))

    return jax.jit(run)


@pytest.fixture(scope="module")
def tokens():
    rng = np.random.default_rng(0)
    rows = np.zeros((len(LENGTHS), LENGTH), np.int32)
    for row, length in zip(rows, LENGTHS, strict=True):
        row[:length] = rng.integers(1, 320, length)
    return rows


@pytest.fixture(scope="module")
def naive_logprobs(naive_hidden, tokens):
    """Returns `params -> [n]` log-probs per sequence in float64, 0 at its first token."""

    def run(params):
        hidden = np.asarray(naive_hidden(params, tokens), np.float64)
        logits = hidden @ np.asarray(params["embedding"][...], np.float64).T / PPO.temperature
        table = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        return [
            np.array([0.0] + [table[i, t, tokens[i, t + 1]] for t in range(length - 1)])
            for i, length in enumerate(LENGTHS)
        ]

    return run


def naive_values(hidden):
    return np.asarray(hidden, np.float64) @ HEAD["weight"] + HEAD["bias"]


@pytest.fixture(scope="module")
def unweighted(params0, tokens, naive_hidden, naive_logprobs):
    """Ragged sequences with inserted tokens; log-probs and values differ from the models'."""
    rng = np.random.default_rng(5)
    values = naive_values(naive_hidden(params0, tokens))
    sequences = []
    for i, (length, logprobs) in enumerate(zip(LENGTHS, naive_logprobs(params0), strict=True)):
        old = logprobs + rng.normal(0, 0.3, length)
        columns = {
            "old_logprobs": old,
            "sampler_logprobs": old + rng.normal(0, 0.2, length),
            "ref_logprobs": logprobs + rng.normal(0, 0.3, length),
            "advantages": np.full(length, rng.normal()),
            "values": np.append(0.0, values[i, : length - 1]) + rng.normal(0, 0.4, length),
            "returns": rng.normal(0, 1, length),
            "correct": np.full(length, float(i % 2)),
        }
        mask = [float(t >= 2 and t % 4 != 3) for t in range(length)]
        sequences.append(TokenSequence(tokens[i, :length].tolist(), mask, columns))
    return sequences


@pytest.fixture(scope="module")
def sequences(unweighted, weighted):
    return weighted(unweighted)


@pytest.fixture(scope="module")
def batch(sequences):
    return pack(sequences, **SIZES)


def spread(sequences):
    """Packs each sequence into a separate row, in the shape of `SIZES`."""
    arrays = {}
    for name, array in pack(sequences, **SIZES).arrays().items():
        if array.ndim:
            rows = np.zeros((array.shape[0] * array.shape[1], ROW_TOKENS), array.dtype)
            for row, sequence in zip(rows, sequences, strict=False):
                one = pack([sequence], row_tokens=ROW_TOKENS, rows=1, microbatches=1)
                row[:] = one.arrays()[name][0, 0]
            arrays[name] = rows.reshape(array.shape)
    columns = {name: arrays.pop(name) for name in sequences[0].columns}
    return PackedBatch(
        **arrays,
        columns=columns,
        num_microbatches=np.int32(-(-len(sequences) // SIZES["rows"])),
        places=tuple((row, 0, len(s.tokens)) for row, s in enumerate(sequences)),
    )


def copy(state):
    return jax.tree.map(jnp.copy, state)


def update(learner, state, batch, objective, kl_coef=KL_COEF):
    """Returns the next state and the metrics; does not donate `state`."""
    return learner.rl_step(copy(state), learner.put(batch), objective=objective, kl_coef=kl_coef)


def step(learner, state, batch, objective):
    new, metrics = update(learner, state, batch, objective)
    return jax.device_get((new.params, metrics))


def assert_trees_close(got, want, atol=1e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=atol), got, want)


def assert_same_bits(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())


def descended(params, gradient, rate):
    return jax.tree.map(lambda p, g: p - rate * g, params, gradient)


# ---- critics -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["own", "shared"])
def test_values_are_a_linear_head_on_hidden_states(
    made, kind, params0, batch, tokens, naive_hidden
):
    learner, start, state = made(kind).learner, made(kind).start, made(kind).lively
    arrays = learner.put(batch)
    head = start.params["critic"]["head"]
    assert (head["weight"].shape, head["bias"].shape) == ((16,), ())
    assert not np.any(head["weight"]) and not np.any(head["bias"])
    assert not np.any(learner.values(start, arrays))
    got = batch.unpack(np.asarray(learner.values(state, arrays)))
    want = naive_values(naive_hidden(params0, tokens))
    for i, length in enumerate(LENGTHS):
        assert got[i][0] == 0.0
        np.testing.assert_allclose(got[i][1:length], want[i, : length - 1], rtol=1e-4, atol=1e-5)
    # The policy's layers change the values only with a shared trunk.
    policy = jax.tree.map(lambda p: 1.1 * p, state.params["policy"])
    other = learner.values(replace(state, params=state.params | {"policy": policy}), arrays)
    same = np.array_equal(batch.unpack(np.asarray(other))[0], got[0])
    assert same == (kind == "own")


@pytest.fixture(scope="module")
def value_loss_and_gradient(params0, sequences, tokens, naive_hidden):
    """PPO's value loss and its gradients by (trunk, head), with one sequence per row."""
    columns = {}
    for name in ("values", "returns", "weights"):
        columns[name] = np.zeros((len(LENGTHS), LENGTH), np.float32)
        for row, s in zip(columns[name], sequences, strict=True):
            row[: len(s.tokens) - 1] = (np.asarray(s.columns[name]) * s.mask)[1:]
    clip = PPO.critic.value_clip

    def loss(trunk, head):
        values = naive_hidden(trunk, tokens) @ head["weight"] + head["bias"]
        near = jnp.clip(values - columns["values"], -clip, clip) + columns["values"]
        errors = jnp.stack([values - columns["returns"], near - columns["returns"]])
        return jnp.sum(columns["weights"] * jnp.max(errors**2, axis=0) / 2)

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(params0, HEAD)


@pytest.fixture(scope="module")
def without_critic(made, batch):
    return step(made("plain").learner, made("plain").start, batch, PPO)


def test_a_separate_critic_does_not_change_the_policy(
    made, params0, batch, without_critic, value_loss_and_gradient
):
    learner, state = made("own").learner, made("own").lively
    params, metrics = step(learner, state, batch, PPO)
    assert_trees_close(params["policy"], without_critic[0]["policy"], atol=1e-6)
    for name, value in without_critic[1].items():
        if name != "loss/total":
            np.testing.assert_allclose(metrics[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
    _, (trunk, head) = value_loss_and_gradient
    moved = {
        "trunk": descended(params0, trunk, VALUE * CRITIC_RATE),
        "head": descended(HEAD, head, VALUE * CRITIC_RATE),
    }
    assert_trees_close(params["critic"], moved)
    norm = np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves((trunk, head))))
    np.testing.assert_allclose(metrics["critic/grad_norm"], VALUE * norm, rtol=1e-4)
    assert metrics["critic/learning_rate"] == CRITIC_RATE
    assert max(np.abs(g).max() for g in jax.tree.leaves(trunk)) > 1e-2
    # Policy and critic do not read each other's columns.
    returns = step(learner, state, batch.with_columns(returns=batch.columns["returns"] + 1), PPO)
    assert_same_bits(returns[0]["policy"], params["policy"])
    advantages = batch.with_columns(advantages=-batch.columns["advantages"])
    assert_same_bits(step(learner, state, advantages, PPO)[0]["critic"], params["critic"])


def test_a_shared_trunk_learns_from_both(made, batch, without_critic, value_loss_and_gradient):
    learner, state = made("shared").learner, made("shared").lively
    params, metrics = step(learner, state, batch, PPO)
    _, (trunk, head) = value_loss_and_gradient
    policy = descended(without_critic[0]["policy"], trunk, VALUE * POLICY_RATE)
    assert_trees_close(params["policy"], policy)
    assert params["critic"].keys() == {"head"}
    assert_trees_close(params["critic"]["head"], descended(HEAD, head, VALUE * CRITIC_RATE))
    np.testing.assert_allclose(
        metrics["critic/grad_norm"],
        VALUE * np.hypot(np.linalg.norm(head["weight"]), head["bias"]),
        rtol=1e-4,
    )


@pytest.mark.parametrize("kind", ["own", "shared"])
def test_the_loss_is_the_sum_of_its_terms(
    made, kind, batch, sequences, without_critic, value_loss_and_gradient, tokens, params0,
    naive_hidden,
):  # fmt: skip
    metrics = step(made(kind).learner, made(kind).lively, batch, PPO)[1]
    value_loss = value_loss_and_gradient[0]
    np.testing.assert_allclose(metrics["loss/value"], value_loss, rtol=1e-5)
    # With token_mean weights, the entropy term is the metric "entropy".
    total = metrics["loss/policy"] - PPO.loss.entropy * metrics["entropy"] + VALUE * value_loss
    np.testing.assert_allclose(metrics["loss/total"], total, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        metrics["loss/total"], without_critic[1]["loss/total"] + VALUE * value_loss, rtol=1e-5
    )
    values = naive_values(naive_hidden(params0, tokens))
    read = [v for i, s in enumerate(sequences) for v in values[i, : len(s.tokens) - 1][
        np.array(s.mask[1:]) > 0]]  # fmt: skip
    np.testing.assert_allclose(metrics["critic/value"], np.mean(read), rtol=1e-4)
    assert 0 < metrics["critic/clip_fraction"] < 1
    assert "kl" not in metrics  # it is in the reward


def test_a_critic_that_starts_at_zero_moves_its_head_first(made, batch):
    """A head of zeros passes no gradient, so the trunk stays and the bias moves."""
    params, _ = step(made("own").learner, made("own").start, batch, PPO)
    assert_same_bits(params["critic"]["trunk"], made("own").start.params["critic"]["trunk"])
    assert np.all(params["critic"]["head"]["weight"] != 0)


# ---- adapters ------------------------------------------------------------------------------


def test_only_adapters_are_trained(made, params0, batch):
    learner, start = made("lora").learner, made("lora").start
    # (in + out) · rank of each layer: q 16 + 32, v 16 + 16, o 32 + 16, down 32 + 16.
    assert sum(leaf.size for leaf in jax.tree.leaves(start.params)) == 2 * 2 * (48 + 32 + 48 + 48)
    assert start.params["policy"].keys() == set(LORA.targets)
    params, metrics = step(learner, start, batch, PPO)
    for name in LORA.targets:
        before, after = start.params["policy"][name], params["policy"][name]
        assert np.any(before["a"]) and not np.any(before["b"])
        np.testing.assert_array_equal(after["a"], before["a"])  # its gradient is 0 while b is 0
        assert np.abs(after["b"]).max() > 1e-5
    assert metrics["grad_norm"] > 0
    assert_same_bits(learner.base, params0)


def test_the_first_gradient_of_adapters_is_that_of_the_weights(
    made, batch, without_critic, params0
):
    """The gradient of b in W + s·a·b is s · aᵀ · dW (arXiv 2106.09685, eq. 3)."""
    learner, start = made("lora").learner, made("lora").start
    got = step(learner, start, batch, PPO)[0]["policy"]
    for name in LORA.targets:
        weight = params0["layers"][name][...]
        gradient = np.asarray(weight - without_critic[0]["policy"]["layers"][name][...])
        a = np.asarray(start.params["policy"][name]["a"])
        layers, rank = a.shape[0], a.shape[-1]
        a = a.reshape(layers, -1, rank)
        expected = np.einsum("lir,lio->lro", a, gradient.reshape(layers, a.shape[1], -1))
        expected = -POLICY_RATE * LORA.alpha / LORA.rank * expected
        np.testing.assert_allclose(
            got[name]["b"].reshape(expected.shape), expected, rtol=1e-4, atol=1e-5
        )


def test_the_policy_is_the_base_plus_its_adapters(made, params0, batch, sequences, naive_logprobs):
    learner, state = made("lora").learner, made("lora").lively
    merged = learner.policy(state)
    for path, leaf in nnx.to_flat_state(merged):
        weight = np.asarray(params0["layers"][path[-1]][...] if len(path) > 1 else
                            params0[path[0]][...])  # fmt: skip
        if path[-1] in LORA.targets:
            adapter = jax.tree.map(np.float64, state.params["policy"][path[-1]])
            for layer in range(2):
                change = adapter["a"][layer].reshape(-1, 2) @ adapter["b"][layer].reshape(2, -1)
                want = weight[layer] + 2.0 * change.reshape(weight[layer].shape)
                np.testing.assert_allclose(leaf[...][layer], want, rtol=1e-5, atol=1e-6)
        else:
            np.testing.assert_array_equal(leaf[...], weight)
    arrays = learner.put(batch)
    by_adapters = learner.policy_logprobs(state, arrays, PPO.temperature)
    of_merged = learner.logprobs(merged, arrays, PPO.temperature)
    np.testing.assert_allclose(by_adapters, of_merged, atol=1e-5)
    scores = batch.unpack(np.asarray(by_adapters))
    for s, got, want in zip(sequences, scores, naive_logprobs(merged), strict=True):
        wanted = np.where(s.mask, want, 0.0)
        np.testing.assert_allclose(got[: len(s.tokens)], wanted, atol=1e-5)
    reference = learner.logprobs(params0, arrays, PPO.temperature)
    assert np.abs(reference - by_adapters).max() > 0.01


def test_adapters_can_be_fine_tuned(tiny_config, params0, batch):
    learner = make_learner(tiny_config, "lora", adam(), None)
    state, losses = learner.init(params0), []
    arrays = learner.put(batch)
    for _ in range(4):
        held = float(learner.sft_loss(state, arrays))
        state, metrics = learner.sft_step(state, arrays)
        losses.append(float(metrics["loss/total"]))
        np.testing.assert_allclose(losses[-1], held, rtol=1e-5)
    assert losses[3] < losses[2] < losses[1] < losses[0]
    assert int(state.step) == 4 and metrics["skipped_updates"] == 0
    assert_same_bits(learner.base, params0)


# ---- independence --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "objective", "aggregate"),
    [
        ("plain", GSPO, "sequence_mean"),
        ("own", PPO, "token_mean"),
        ("shared", PPO, "sequence_mean"),
        ("lora", PPO, "token_mean"),
    ],
    ids=["gspo with llds", "ppo", "ppo, shared trunk", "lora"],
)
def test_updates_do_not_depend_on_packing(made, unweighted, weighted, kind, objective, aggregate):
    sequences = weighted(unweighted, aggregate, 12)
    packed, apart = pack(sequences, **SIZES), spread(sequences)
    assert (packed.num_microbatches, apart.num_microbatches) == (1, 2)
    assert packed.segment_ids.max() > 1 and apart.segment_ids.max() == 1
    learner, state = made(kind).learner, made(kind).lively
    params, metrics = step(learner, state, packed, objective)
    other_params, other_metrics = step(learner, state, apart, objective)
    assert_trees_close(params, other_params)
    assert metrics.keys() == other_metrics.keys()
    for name, value in metrics.items():
        np.testing.assert_allclose(value, other_metrics[name], rtol=1e-5, atol=1e-5, err_msg=name)
    # Clipping, the preserving term and the critic have an effect.
    assert 0 < metrics["clip_fraction"] < 1
    assert metrics["skipped_updates"] == 0 and metrics["grad_norm"] > 1e-2
    if objective.loss.llds:
        assert metrics["loss/llds"] > 1e-3 and 0 < metrics["importance_capped"] < 1
    if kind in ("own", "shared"):
        assert metrics["loss/value"] > 1e-2


def test_updates_do_not_depend_on_the_mesh(made, batch):
    """Sharded adapters and a sharded critic equal those of two learners on one device."""
    there = made("lora, own", (2, 2, 2))
    leaves = jax.tree.leaves(there.lively.params)
    assert {len(leaf.sharding.device_set) for leaf in leaves} == {8}
    for name in LORA.targets:
        assert not there.lively.params["policy"][name]["a"].sharding.is_fully_replicated
    params, metrics = step(there.learner, there.lively, batch, PPO)
    for name, kind in (("policy", "lora"), ("critic", "own")):
        here = made(kind)
        assert_trees_close(there.start.params[name], here.start.params[name], atol=1e-6)
        want, want_metrics = step(here.learner, here.lively, batch, PPO)
        assert_trees_close(params[name], want[name])
        if kind == "own":
            names = {metric for metric in metrics if "critic" in metric or "value" in metric}
        else:
            names = want_metrics.keys() - {"loss/total"}
        for metric in names:
            np.testing.assert_allclose(
                metrics[metric], want_metrics[metric], rtol=1e-4, atol=1e-5, err_msg=metric
            )


# ---- skipped updates -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tiny_config, params0, batch):
    """A learner with a critic and AdamW after one update, and its next state.

    Its loss has two more terms. `with_inputs` puts their inputs into the unused column
    `ref_logprobs`. One term is sqrt(1 - s) - (1 - s), which is 0 for s = 0 and s = 1 and has an
    infinite derivative at s = 1. The other is a constant.
    """
    original = learner_module.policy_terms

    def with_root(objective, kl_coef, logprobs, entropy, batch):
        total, sums = original(objective, kl_coef, logprobs, entropy, batch)
        sour, added = batch.ref_logprobs[0, :2]
        under = 1.0 - sour
        root = jnp.sqrt(under + jnp.sum(jnp.square(logprobs - logprobs)))
        return total + root - under + added, sums

    learner = make_learner(tiny_config, "own", adam(), adam())
    state = lively(learner, learner.init(params0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(learner_module, "policy_terms", with_root)
        state, _ = update(learner, state, with_inputs(batch), PPO)
    after, metrics = update(learner, state, with_inputs(batch), PPO)
    assert metrics["skipped_updates"] == 0
    assert (int(state.step), int(after.step)) == (1, 2)
    return learner, state, jax.device_get(after)


def with_inputs(batch, sour=0.0, added=0.0):
    column = np.zeros_like(batch.mask)
    column[..., 0], column[..., 1] = sour, added
    return batch.with_columns(ref_logprobs=column)


def assert_skipped(trained, new, metrics, batch):
    """Checks that the state is unchanged and that the next update is not affected."""
    learner, state, after = trained
    assert metrics["skipped_updates"] == 1
    assert_same_bits(jax.device_get(new), jax.device_get(state))
    assert_same_bits(jax.device_get(update(learner, new, with_inputs(batch), PPO)[0]), after)


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("old_logprobs", np.nan),
        ("advantages", np.nan),
        ("advantages", np.inf),
        ("advantages", -np.inf),
        ("returns", np.nan),
        ("weights", np.inf),
    ],
)
def test_one_bad_token_skips_the_update(trained, batch, column, value):
    learner, state, _ = trained
    bad = batch.columns[column].copy()
    bad[tuple(np.argwhere(batch.mask > 0)[5])] = value
    bad_batch = with_inputs(batch).with_columns(**{column: bad})
    new, metrics = update(learner, state, bad_batch, PPO)
    assert not np.isfinite(metrics["loss/total"])
    assert_skipped(trained, new, metrics, batch)


def test_a_bad_gradient_of_a_finite_loss_skips_the_update(trained, batch):
    """The square root of 0 has a finite value and an infinite derivative."""
    learner, state, _ = trained
    new, metrics = update(learner, state, with_inputs(batch, sour=1.0), PPO)
    assert np.isfinite(metrics["loss/total"]) and not np.isfinite(metrics["grad_norm"])
    assert np.isfinite(metrics["critic/grad_norm"])  # but the critic is skipped, too
    assert_skipped(trained, new, metrics, batch)


@pytest.mark.parametrize("added", [np.nan, np.inf, -np.inf])
def test_a_bad_loss_with_a_finite_gradient_skips_the_update(trained, batch, added):
    learner, state, _ = trained
    new, metrics = update(learner, state, with_inputs(batch, added=added), PPO)
    assert np.isfinite(metrics["grad_norm"]) and np.isfinite(metrics["critic/grad_norm"])
    assert not np.isfinite(metrics["loss/total"])
    assert_skipped(trained, new, metrics, batch)


# ---- the state -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["plain", "own", "shared", "lora"])
def test_the_abstract_state_is_that_of_init(made, kind):
    learner, state = made(kind).learner, made(kind).start
    shapes = learner.abstract_state()
    assert jax.tree.structure(shapes) == jax.tree.structure(state)
    for shape, leaf in zip(jax.tree.leaves(shapes), jax.tree.leaves(state), strict=True):
        assert (shape.shape, shape.dtype) == (leaf.shape, leaf.dtype)
        assert shape.sharding.is_equivalent_to(leaf.sharding, leaf.ndim)


@pytest.mark.parametrize("kind", ["plain", "own", "shared", "lora"])
def test_optimizer_moments_match_the_trained_parameters(tiny_config, kind):
    """Two moments per trained number, the first in bfloat16, and nothing else but counts."""
    state = make_learner(tiny_config, kind, adam(), adam()).abstract_state()
    assert state.opt_state.keys() == state.params.keys()
    for name, params in state.params.items():
        for moment, dtype in (("mu", jnp.bfloat16), ("nu", jnp.float32)):
            moments = optax.tree_utils.tree_get(state.opt_state[name], moment)
            assert jax.tree.structure(moments) == jax.tree.structure(params)
            for one, param in zip(jax.tree.leaves(moments), jax.tree.leaves(params), strict=True):
                assert (one.shape, one.dtype) == (param.shape, dtype)
                assert one.sharding == param.sharding
        held = sum(leaf.size for leaf in jax.tree.leaves(state.opt_state[name])
                   if leaf.dtype != jnp.int32)  # fmt: skip
        assert held == 2 * sum(leaf.size for leaf in jax.tree.leaves(params))


def test_first_moments_in_bfloat16_by_hand():
    """Two equal gradients give (1 - 0.9²)·g up to 8 bits of bfloat16, and (1 - 0.99²)·g²."""
    optimizer = adam().optimizer
    params = {"w": jnp.zeros(3)}
    gradient = {"w": jnp.array([3e-1, -2e-1, 1e-3])}
    updates, state = optimizer.update(gradient, optimizer.init(params), params)
    _, state = optimizer.update(gradient, state, params)
    mu, nu = (optax.tree_utils.tree_get(state, name)["w"] for name in ("mu", "nu"))
    assert (mu.dtype, nu.dtype, updates["w"].dtype) == (jnp.bfloat16, jnp.float32, jnp.float32)
    np.testing.assert_allclose(mu.astype(jnp.float32), 0.19 * gradient["w"], rtol=1 / 128)
    np.testing.assert_allclose(nu, (1 - 0.99**2) * gradient["w"] ** 2, rtol=1e-5)
    plain = adamw(optax.constant_schedule(1.0), beta1=0.9, beta2=0.99, weight_decay=0.0,
                  clip_norm=1.0)  # fmt: skip
    assert optax.tree_utils.tree_get(plain.init(params), "mu")["w"].dtype == jnp.float32


@pytest.mark.parametrize("scale", [1.0, 0.5, 0.0])
def test_rate_scale_is_a_factor_of_the_learning_rate_alone(scale):
    """The factor has no effect on moments, counts or the clip of the gradient."""
    optimizer = adam().optimizer
    params, gradient = {"w": jnp.array([1.0, -2.0])}, {"w": jnp.array([3e-1, -2e1])}
    state = optimizer.init(params)
    plain, after = optimizer.update(gradient, state, params)
    scaled, state = optimizer.update(gradient, state, params, rate_scale=jnp.float32(scale))
    np.testing.assert_array_equal(scaled["w"], scale * plain["w"])
    jax.tree.map(np.testing.assert_array_equal, state, after)
