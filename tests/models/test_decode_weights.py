"""Compares decode weights with hand-computed values and with the plain matrix product."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zerosearch_jax.models.decode_weights import output_major
from zerosearch_jax.models.layers import dense


def test_int8_weights_have_one_scale_per_output():
    weight = jnp.array([[1.0, -12.7, 0.0], [-0.5, 6.35, 0.0]])
    coarse = output_major(weight, (0,), int8=True)
    np.testing.assert_allclose(coarse.scale, [1 / 127, 0.1, 1.0], rtol=1e-6)
    assert coarse.values.dtype == jnp.int8
    # -0.5 is -63.5 scales and rounds to even; 6.35 is slightly below 63.5 scales.
    assert coarse.values.tolist() == [[127, -64], [-127, 64], [0, 0]]
    np.testing.assert_allclose(coarse.rows(jnp.array([1])), [[-12.7, 6.4]], rtol=1e-6)


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("rows", [(2, 7), (1, 1), (3, 43)])  # small batch, one row, large batch
@pytest.mark.parametrize(("shape", "summed"), [((8, 3, 4), 1), ((4, 2, 6), 2), ((5, 1), 1)])
def test_product_equals_the_plain_product(shape, summed, rows, int8):
    weight = jax.random.normal(jax.random.key(0), shape)
    x = jax.random.normal(jax.random.key(1), (*rows, *shape[:summed]))
    ours = output_major(weight, tuple(range(summed)), int8)
    inner = tuple(range(len(shape) - summed, len(shape)))
    exact = jnp.moveaxis(weight, tuple(range(summed)), inner)
    restored = ours.values
    if int8:
        scale = jnp.expand_dims(ours.scale, inner)
        restored = ours.values * scale
        assert float(jnp.max(jnp.abs(restored - exact) / scale)) <= 0.5 + 1e-5
    else:
        np.testing.assert_array_equal(restored, exact)
    wanted = jnp.tensordot(x, jnp.moveaxis(restored, inner, tuple(range(summed))), axes=summed)
    product = dense(x, ours, summed)
    assert product.shape == (*rows, *shape[summed:])
    np.testing.assert_allclose(product, wanted, atol=1e-5)
    np.testing.assert_allclose(
        dense(x, weight, summed), jnp.tensordot(x, weight, axes=summed), atol=1e-5
    )


def test_bfloat16_products_can_accumulate_in_float32():
    weight = jnp.full((1, 4096), 1.0, jnp.bfloat16)
    rows = jnp.full((1, 4096), 1 + 2**-7, jnp.bfloat16)
    ours = output_major(weight, (1,), int8=False)
    assert float(ours.product(rows, jnp.float32)[0, 0]) == 4096 * (1 + 2**-7)
