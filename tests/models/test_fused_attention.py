"""Compares the fused kernels with XLA's attention.

The TPU kernel is interpreted on CPU devices. The GPU kernel is checked by the arguments of its
call and by the lowered program.
"""

import functools
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from zerosearch_jax.errors import UserError
from zerosearch_jax.models.attention import packed_attention
from zerosearch_jax.models.config import ModelConfig
from zerosearch_jax.models.fused_attention import cudnn_attention, kernel_for, splash_attention
from zerosearch_jax.models.transformer import abstract_model, init_params, param_shardings
from zerosearch_jax.parallel.mesh import make_mesh

ROWS, LENGTH, HEADS, KV_HEADS, SIZE = 2, 256, 4, 2, 128
# Segments that end inside a block, at its edge and before padding.
SEGMENTS = np.stack(
    [np.repeat([1, 2, 3, 0], [100, 28, 90, 38]), np.repeat([1, 2, 0], [60, 68, 128])]
)


@pytest.fixture(scope="module")
def inputs():
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = [(ROWS, LENGTH, heads, SIZE) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]


def _weighted(attention):
    """Returns a scalar loss that weights every output differently and ignores padding."""
    weights = jnp.cos(jnp.arange(ROWS * LENGTH * HEADS * SIZE)).reshape(ROWS, LENGTH, HEADS, SIZE)
    weights = jnp.where((SEGMENTS > 0)[:, :, None, None], weights, 0.0)
    return lambda q, k, v: jnp.sum(weights * attention(q, k, v, jnp.asarray(SEGMENTS)))


def _assert_like_xla(kernel, inputs):
    attention = functools.partial(kernel, mesh=make_mesh(1, 2, 2))
    found = jax.jit(jax.value_and_grad(_weighted(attention), argnums=(0, 1, 2)))(*inputs)
    wanted = jax.jit(jax.value_and_grad(_weighted(packed_attention), argnums=(0, 1, 2)))(*inputs)
    np.testing.assert_allclose(found[0], wanted[0], rtol=1e-4)
    for one, other in zip(found[1], wanted[1], strict=True):
        np.testing.assert_allclose(one, other, atol=2e-4)
        assert np.abs(other).max() > 0.1


def test_splash_attention_equals_xla_on_a_mesh(inputs):
    _assert_like_xla(splash_attention, inputs)


def test_the_cudnn_call_run_by_xla_equals_xla_on_a_mesh(inputs, monkeypatch):
    real, requested = jax.nn.dot_product_attention, []

    def run_by_xla(*args, implementation=None, **options):
        requested.append(implementation)
        return real(*args, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", run_by_xla)
    _assert_like_xla(cudnn_attention, inputs)
    assert requested[0] == "cudnn"


def test_cudnn_forward_and_backward_run_on_each_devices_rows_and_heads(monkeypatch):
    # JAX checks the installed cuDNN version even if it only lowers the program.
    check = "jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version"
    monkeypatch.setattr(check, lambda: 91000)
    mesh = make_mesh(1, 2, 2)
    shapes = [(ROWS, LENGTH, heads, SIZE) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    args = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    loss = _weighted(functools.partial(cudnn_attention, mesh=mesh))
    traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(*args)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    calls = [line for line in text.splitlines() if "__cudnn$fmha" in line]
    names = [re.search(r"__cudnn\$(\w+)", line)[1] for line in calls]
    assert names == ["fmhaScaleBiasSoftmax", "fmhaScaleBiasSoftmaxBackward"]
    for line in calls:  # each device has 1 of 2 rows, 2 of 4 heads and 1 of 2 key-value heads
        assert f"tensor<1x{LENGTH}x2x{SIZE}xbf16>" in line
        assert f"tensor<1x{LENGTH}x1x{SIZE}xbf16>" in line
        assert f"tensor<1x1x{LENGTH}x{LENGTH}xbf16>" in line  # one mask for all heads
        assert re.search(r"mask_type\W+22: \W+22CAUSAL", line)


@pytest.mark.parametrize(
    ("platform", "capability", "dtype", "head_dim", "kernel"),
    [
        ("tpu", None, "float32", 100, "splash"),
        ("gpu", "9.0", "bfloat16", 128, "cudnn"),
        ("gpu", "12.0", "float16", 64, "cudnn"),
        ("gpu", "7.5", "float16", 64, "xla"),
        ("gpu", "gfx90a", "bfloat16", 64, "xla"),
        ("gpu", "9.0", "float32", 64, "xla"),
        ("gpu", "9.0", "bfloat16", 256, "xla"),
        ("gpu", "9.0", "bfloat16", 60, "xla"),
        ("cpu", None, "bfloat16", 64, "xla"),
    ],
)
def test_kernel_for_fits_the_device(platform, capability, dtype, head_dim, kernel):
    device = SimpleNamespace(platform=platform, compute_capability=capability)
    assert kernel_for(device, dtype, head_dim) == kernel


def test_splash_rows_that_no_block_divides_raise(inputs):
    q, k, v = (x[:, :200] for x in inputs)
    with pytest.raises(UserError, match="multiple of 128 tokens, not 200; .*row_tokens"):
        splash_attention(q, k, v, jnp.asarray(SEGMENTS[:, :200]), mesh=make_mesh())


@pytest.mark.slow
def test_hidden_states_do_not_depend_on_the_kernel():
    config = ModelConfig(
        family="qwen2", vocab_size=64, embed_dim=32, mlp_dim=48, num_layers=2, num_heads=HEADS,
        num_kv_heads=KV_HEADS, head_dim=SIZE, rope_theta=1e4, norm_eps=1e-6, tie_embeddings=True,
        qkv_bias=True, qk_norm=False, max_positions=256,
    )  # fmt: skip
    params, mesh = init_params(config, 0), make_mesh(2, 1, 2)
    tokens = jnp.arange(ROWS * 128).reshape(ROWS, 128) % 64
    ones = jnp.ones_like(tokens)

    def hidden(**options):
        graphdef, _ = abstract_model(config, **options)
        run = jax.jit(lambda params: nnx.merge(graphdef, params)(tokens, tokens, ones))
        return run(params)

    found, wanted = hidden(attention="splash", mesh=mesh), hidden()
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    assert np.abs(wanted).max() > 0.1
    with pytest.raises(ValueError, match="'splash' with mesh=None"):
        abstract_model(config, attention="splash")


def test_activations_stay_split_by_row_over_the_data_axes():
    config = ModelConfig(
        family="qwen2", vocab_size=64, embed_dim=32, mlp_dim=48, num_layers=2, num_heads=4,
        num_kv_heads=2, head_dim=8, rope_theta=1e4, norm_eps=1e-6, tie_embeddings=True,
        qkv_bias=True, qk_norm=False, max_positions=256,
    )  # fmt: skip
    mesh = make_mesh(1, 8, 1)
    graphdef, params = abstract_model(config, mesh=mesh)
    tokens = jax.ShapeDtypeStruct((8, 16), jnp.int32)
    run = jax.jit(
        lambda params, tokens: nnx.merge(graphdef, params)(tokens, tokens, tokens),
        in_shardings=(param_shardings(params, mesh), None),
    )
    text = run.lower(params, tokens).compile().as_text()
    # Each device has one of the eight rows, and no partial products are summed over devices.
    assert "f32[1,16,32]" in text
    assert "f32[8,16,48]" not in text
    assert "all-reduce(" not in text
