"""Tests packed rows, cached decoding, rematerialisation and parameter shardings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from zerosearch_jax.errors import UserError
from zerosearch_jax.models import attention
from zerosearch_jax.models.config import ModelConfig, RopeScaling
from zerosearch_jax.models.kv_cache import append_to_cache, empty_cache
from zerosearch_jax.models.layers import add_bias, embed, rms_norm
from zerosearch_jax.models.transformer import REMAT_POLICIES, abstract_model, param_shardings
from zerosearch_jax.parallel.mesh import make_mesh

CONFIG = ModelConfig(
    family="qwen3",
    vocab_size=64,
    embed_dim=32,
    mlp_dim=48,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    rope_theta=10_000.0,
    norm_eps=1e-6,
    tie_embeddings=False,
    qkv_bias=True,
    qk_norm=True,
    max_positions=128,
    rope_scaling=RopeScaling(8.0, 1.0, 4.0, 16),
)


@pytest.fixture(scope="module")
def params():
    """Random parameters: norms near 1, all others small but not zero."""
    rng = np.random.default_rng(0)

    def fill(path, leaf):
        noise = 0.2 * rng.standard_normal(leaf.shape)
        return jnp.asarray(noise + ("norm" in jax.tree_util.keystr(path)), jnp.float32)

    return jax.tree_util.tree_map_with_path(fill, abstract_model(CONFIG)[1])


@pytest.fixture(scope="module")
def full_logits(params):
    graphdef, _ = abstract_model(CONFIG)

    @jax.jit
    def run(tokens, positions, segments):
        model = nnx.merge(graphdef, params)
        return model.logits(model(tokens, positions, segments))

    def forward(tokens, positions=None, segments=None):
        tokens = jnp.asarray(tokens)
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        if segments is None:
            segments = jnp.zeros_like(tokens)
        return np.asarray(run(tokens, jnp.asarray(positions), jnp.asarray(segments)))

    return forward


def test_packed_segments_equal_separate_rows(full_logits):
    first, second = np.random.default_rng(0).integers(0, 64, (2, 9))
    second = second[:6]
    packed = np.concatenate([first, second])[None]
    positions = np.concatenate([np.arange(9), np.arange(6)])[None]
    segments = np.array([[1] * 9 + [2] * 6])
    together = full_logits(packed, positions, segments)[0]
    np.testing.assert_allclose(together[:9], full_logits(first[None])[0], atol=2e-5)
    np.testing.assert_allclose(together[9:], full_logits(second[None])[0], atol=2e-5)
    one_segment = full_logits(packed, positions, np.ones_like(segments))[0]
    assert np.abs(one_segment[9:] - together[9:]).max() > 0.1


def test_later_tokens_do_not_change_earlier_logits(full_logits):
    tokens = np.random.default_rng(1).integers(0, 64, (1, 12))
    changed = tokens.copy()
    changed[0, 8:] = (changed[0, 8:] + 1) % 64
    before, after = full_logits(tokens), full_logits(changed)
    np.testing.assert_allclose(before[:, :8], after[:, :8], atol=1e-6)
    assert np.abs(before[:, 8:] - after[:, 8:]).max() > 0.1


def test_prefill_and_decode_equal_the_full_forward(params, full_logits, unstacked, monkeypatch):
    """Prefills ragged prompts in chunks of four, then decodes three steps at a time.

    Cached keys are scored in blocks of five; the last block overlaps the one before.
    """
    monkeypatch.setattr(attention, "KEY_BLOCK", 5)
    lengths, total = np.array([5, 13, 2]), 14
    tokens = np.random.default_rng(2).integers(0, 64, (3, total))
    expected = full_logits(tokens)
    graphdef, _ = abstract_model(CONFIG, stacked=False)
    layered = unstacked(params, CONFIG.num_layers)

    @jax.jit
    def prefill(chunk, cache, rows, starts):
        model = nnx.merge(graphdef, layered)
        hidden, block = model.prefill(chunk, cache, rows, starts)
        return model.logits(hidden), block

    @jax.jit
    def decode(tokens, past, past_length, recent, at):
        model = nnx.merge(graphdef, layered)
        hidden, recent = model.decode(tokens, past, past_length, recent, at)
        return model.logits(hidden), recent

    def garbage(length):
        """Returns a cache of sevens, because positions not yet written must not be read."""
        return jax.tree.map(lambda x: x + 7.0, empty_cache(CONFIG, 3, length, jnp.float32))

    cache, held = garbage(total), np.zeros(3, np.int32)
    append = jax.jit(append_to_cache)

    def check(logits, row, at):
        np.testing.assert_allclose(logits, expected[row, at], atol=5e-5)

    while (held < lengths).any():
        places = np.minimum(held[:, None] + np.arange(4), total - 1)
        chunk = np.take_along_axis(tokens, places, 1)
        new = np.clip(lengths - held, 0, 4)
        # Rows go in reverse order, and the blocks of finished rows are dropped.
        rows = np.where(new > 0, np.arange(3), 3 + np.arange(3))
        logits, block = prefill(chunk[::-1], cache, rows[::-1], held[::-1])
        for row in range(3):
            for column in range(new[row]):
                check(logits[2 - row, column], row, held[row] + column)
        cache = append(cache, rows[::-1], held[::-1], block)
        held = held + new
    while (held < total).any():
        recent, steps = garbage(3), np.minimum(3, total - held)
        for step in range(3):
            places = np.minimum(held + step, total - 1)
            last = np.take_along_axis(tokens, places[:, None], 1)[:, 0]
            logits, recent = decode(last, cache, held, recent, step)
            for row in np.flatnonzero(step < steps):
                check(logits[row], row, held[row] + step)
        cache = append(cache, np.arange(3), held, recent)
        held = held + steps


def test_prefill_of_a_row_is_bit_identical_next_to_a_longer_one(params, unstacked, monkeypatch):
    """Key blocks that only the longer row needs do not change the shorter row."""
    monkeypatch.setattr(attention, "KEY_BLOCK", 4)
    graphdef, _ = abstract_model(CONFIG, stacked=False)
    layered = unstacked(params, CONFIG.num_layers)
    tokens = np.random.default_rng(6).integers(0, 64, (2, 5))
    cache = jax.tree.map(lambda x: x + 7.0, empty_cache(CONFIG, 2, 16, jnp.float32))

    @jax.jit
    def prefill(starts):
        return nnx.merge(graphdef, layered).prefill(tokens, cache, jnp.arange(2), starts)[0]

    short, long = prefill(jnp.array([3, 2])), prefill(jnp.array([3, 15]))
    np.testing.assert_array_equal(short[0], long[0])
    assert np.abs(short[1] - long[1]).max() > 0.1


def test_append_past_the_end_of_a_row_keeps_the_tokens_before_the_block():
    def filled(rows, length, start):
        """Returns keys and values of one layer with distinct numbers."""
        size = rows * length
        keys = start + jnp.arange(size, dtype=jnp.float32).reshape(rows, 1, 1, length)
        return [(keys, keys.transpose(0, 1, 3, 2))]

    cache, block = filled(3, 6, 0.0), filled(2, 4, 100.0)
    ((keys, values),) = append_to_cache(cache, jnp.array([2, 0]), jnp.array([4, 1]), block)
    assert keys[:, 0, 0].tolist() == [
        [0, 104, 105, 106, 107, 5],
        [6, 7, 8, 9, 10, 11],
        [12, 13, 14, 15, 100, 101],
    ]
    np.testing.assert_array_equal(values[:, 0, :, 0], keys[:, 0, 0])
    ((dropped, _),) = append_to_cache(cache, jnp.array([3, 4]), jnp.array([0, 0]), block)
    np.testing.assert_array_equal(dropped, cache[0][0])


def test_remat_does_not_change_gradients(params):
    tokens = jnp.asarray(np.random.default_rng(3).integers(0, 64, (2, 8)))
    positions = jnp.broadcast_to(jnp.arange(8), (2, 8))

    def gradient(remat):
        graphdef, _ = abstract_model(CONFIG, remat=remat)

        def loss(params):
            model = nnx.merge(graphdef, params)
            logits = model.logits(model(tokens, positions, jnp.zeros_like(tokens)))
            return jnp.mean(jax.nn.logsumexp(logits, axis=-1))

        return jax.tree.leaves(jax.jit(jax.grad(loss))(params))

    plain = gradient("none")
    assert all(np.abs(x).max() > 0 for x in plain)
    for remat in REMAT_POLICIES.keys() - {"none"}:
        for x, y in zip(plain, gradient(remat), strict=True):
            np.testing.assert_allclose(x, y, atol=1e-6)


def bfloat16(array):
    """Returns the array rounded to bfloat16, and the same numbers in float64."""
    rounded = jnp.asarray(array, jnp.bfloat16)
    return rounded, np.asarray(rounded, np.float64)


def relative_error(function, weight, by_output, wanted):
    """Relative error of the gradient of sum(by_output * function(weight)) by `weight`."""

    def loss(weight):
        return (function(weight).astype(jnp.float32) * by_output.astype(jnp.float32)).sum()

    got = jax.jit(jax.grad(loss))(weight)
    assert got.dtype == jnp.bfloat16
    return np.linalg.norm(np.asarray(got, np.float64) - wanted) / np.linalg.norm(wanted)


def test_bfloat16_gradients_are_summed_over_tokens_in_float32():
    """One token fills 70% of the positions. Rounding the sum once costs less than 0.4%."""
    rng = np.random.default_rng(5)
    tokens = np.where(rng.random((2, 2048)) < 0.7, 3, rng.integers(0, 8, (2, 2048)))
    grad, grad64 = bfloat16(1 + 0.1 * rng.standard_normal((2, 2048, 4)))
    weight, _ = bfloat16(np.ones((8, 4)))
    of_tokens = np.zeros((8, 4))
    np.add.at(of_tokens, tokens, grad64)
    x, x64 = bfloat16(1 + 0.1 * rng.standard_normal((2, 2048, 4)))
    normalised = x64 / np.sqrt((x64**2).mean(-1, keepdims=True))
    ones = weight[0]
    for name, function, at, wanted in (
        ("embedding", lambda w: embed(w, jnp.asarray(tokens)), weight, of_tokens),
        ("bias", lambda b: add_bias(x, b), ones, grad64.sum((0, 1))),
        ("norm", lambda s: rms_norm(x, s, 0.0), ones, (grad64 * normalised).sum((0, 1))),
    ):
        assert relative_error(function, at, grad, wanted) < 0.004, name


def test_bfloat16_gradients_of_values_are_summed_over_query_blocks_in_float32(monkeypatch):
    """All queries attend to the first token; the last block's gradient is 256, the others' 1."""
    monkeypatch.setattr(attention, "QUERY_BLOCK", 4)
    by_output, _ = bfloat16(np.repeat([0.25] * 4 + [64.0], 4)[None, :, None, None])
    q, _ = bfloat16(np.ones((1, 20, 1, 8)))
    k, v = q.at[:, 1:].set(-100), q
    wanted = np.zeros((1, 20, 1, 8))
    wanted[:, 0] = 256 + 4
    segments = jnp.ones((1, 20), jnp.int32)

    def attend(v):
        return attention.packed_attention(q, k, v, segments)

    assert relative_error(attend, v, by_output, wanted) < 0.004


def test_unstacked_parameters_fit_the_unstacked_model(params, unstacked):
    _, wanted = abstract_model(CONFIG, stacked=False)
    given = unstacked(params, CONFIG.num_layers)
    assert jax.tree.map(lambda x: x.shape, given) == jax.tree.map(lambda x: x.shape, wanted)
    np.testing.assert_array_equal(given["layers"][2]["q"][...], params["layers"]["q"][...][2])


def test_parameter_shardings_follow_the_axes(params):
    mesh = make_mesh(2, 2, 2)
    specs = {
        ".".join(map(str, path)): leaf.get_value().spec
        for path, leaf in nnx.to_flat_state(param_shardings(params, mesh))
    }
    assert specs["embedding"] == P("tensor", "fsdp")
    assert specs["unembed"] == P("fsdp", "tensor")
    assert specs["layers.q"] == P(None, "fsdp", "tensor", None)
    assert specs["layers.o"] == P(None, "tensor", None, "fsdp")
    assert specs["layers.k_bias"] == P(None, "tensor", None)
    assert specs["layers.q_norm"] == P(None, None)
    assert specs["layers.down"] == P(None, "tensor", "fsdp")


def test_sharded_forward_equals_unsharded(params, full_logits):
    mesh = make_mesh(2, 2, 2)
    sharded = jax.device_put(params, param_shardings(params, mesh))
    tokens = jnp.asarray(np.random.default_rng(4).integers(0, 64, (4, 10)))
    positions = jnp.broadcast_to(jnp.arange(10), (4, 10))
    graphdef, _ = abstract_model(CONFIG)

    @jax.jit
    def forward(params):
        model = nnx.merge(graphdef, params)
        return model.logits(model(tokens, positions, jnp.zeros_like(tokens)))

    np.testing.assert_allclose(forward(sharded), full_logits(tokens), atol=2e-5)


def test_heads_not_divisible_by_the_mesh_raise(params):
    with pytest.raises(UserError, match="kv_heads of size 2 does not divide by 4"):
        param_shardings(params, make_mesh(1, 2, 4))
