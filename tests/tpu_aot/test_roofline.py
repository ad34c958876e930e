"""The roofline formulas against the products of traced programs and against XLA's cost analysis."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from zerosearch_jax.models.attention import KEY_BLOCK, QUERY_BLOCK, packed_attention
from zerosearch_jax.models.config import ModelConfig
from zerosearch_jax.models.kv_cache import empty_cache
from zerosearch_jax.models.transformer import abstract_model
from zerosearch_jax.rl.logprobs import chunked_logprobs
from zerosearch_jax.tpu_aot import roofline
from zerosearch_jax.tpu_aot.roofline import Work

CONFIG = ModelConfig(
    family="qwen2",
    vocab_size=320,
    embed_dim=96,
    mlp_dim=160,
    num_layers=3,
    num_heads=6,
    num_kv_heads=2,
    head_dim=16,
    rope_theta=1e6,
    norm_eps=1e-6,
    tie_embeddings=False,
    qkv_bias=True,
    qk_norm=False,
    max_positions=1024,
)
ROWS, LENGTH, CHUNK = 2, 160, 32  # one whole block of queries and a partial one


def product_flops(jaxpr, trips: int) -> int:
    """FLOPs of all products of a traced program; loops of unknown length run `trips` times."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            inner = 1
            for axis in contracted:
                inner *= eqn.invars[0].aval.shape[axis]
            total += 2 * inner * eqn.outvars[0].aval.size
        repeats = {"scan": eqn.params.get("length"), "while": trips}.get(eqn.primitive.name, 1)
        for value in eqn.params.values():
            inside = getattr(value, "jaxpr", value)
            if hasattr(inside, "eqns"):
                total += repeats * product_flops(inside, trips)
    return total


def _int(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def _attention(passes: float) -> Work:
    tokens = ROWS * LENGTH
    pairs = ROWS * roofline.causal_pairs(LENGTH, QUERY_BLOCK)
    return roofline.attention(CONFIG, queries=tokens, keys=tokens, pairs=pairs, tensor=1) * passes


def _logprob_sum(graphdef):
    def run(params, tokens):
        model = nnx.merge(graphdef, params)
        hidden = model(tokens, tokens, tokens)
        logprobs, _ = chunked_logprobs(hidden, model.unembedding(), tokens, chunk=CHUNK)
        return logprobs.sum()

    return run


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_training_work_matches_the_products_of_a_traced_gradient(remat):
    graphdef, params = abstract_model(CONFIG, remat=remat)
    traced = jax.make_jaxpr(jax.grad(_logprob_sum(graphdef)))(params, _int(ROWS, LENGTH))
    formula = roofline.training_work(CONFIG, rows=ROWS, length=LENGTH, tensor=1, remat=remat)
    # The formula is for splash's kernels: replace its attention by that of XLA's attention.
    again = remat != "none"
    pairs = ROWS * roofline.causal_pairs(LENGTH, roofline.SPLASH_BLOCK)
    splash = roofline.attention(CONFIG, queries=0, keys=0, pairs=pairs, tensor=1)
    expected = formula.flops - splash.flops * (4.5 + again) + _attention(3 + again).flops
    assert product_flops(traced.jaxpr, LENGTH // CHUNK) == expected


def test_logprob_work_matches_the_products_of_a_traced_reference():
    graphdef, params = abstract_model(CONFIG)
    traced = jax.make_jaxpr(_logprob_sum(graphdef))(params, _int(ROWS, LENGTH))
    formula = roofline.logprob_work(CONFIG, rows=ROWS, length=LENGTH, tensor=1)
    pairs = ROWS * roofline.causal_pairs(LENGTH, roofline.SPLASH_BLOCK)
    splash = roofline.attention(CONFIG, queries=0, keys=0, pairs=pairs, tensor=1)
    expected = formula.flops - splash.flops + _attention(1).flops
    assert product_flops(traced.jaxpr, LENGTH // CHUNK) == expected


def test_prefill_work_matches_the_products_of_a_traced_prefill():
    """The prefill follows a full window of two blocks."""
    window, tokens = 2 * KEY_BLOCK, 24
    graphdef, params = abstract_model(CONFIG, stacked=False)

    def run(params, ids, rows):
        model = nnx.merge(graphdef, params)
        cache = empty_cache(CONFIG, ROWS, window, jnp.float32)
        return model.prefill(ids, cache, rows, rows)[0]

    traced = jax.make_jaxpr(run)(params, _int(ROWS, tokens), _int(ROWS))
    sizes = dict(rows=ROWS, window=window, tensor=1, weight=2)
    formula = roofline.prefill_work(CONFIG, tokens=tokens, **sizes).flops
    assert product_flops(traced.jaxpr, window // KEY_BLOCK) == formula


def test_decode_work_matches_the_products_of_a_traced_decode_step():
    window, chunk = 64, 8
    graphdef, params = abstract_model(CONFIG, stacked=False)

    def run(params, ids, lengths):
        model = nnx.merge(graphdef, params)
        past, recent = (empty_cache(CONFIG, ROWS, n, jnp.float32) for n in (window, chunk))
        return model.logits(model.decode(ids, past, lengths, recent, 0)[0])

    traced = jax.make_jaxpr(run)(params, _int(ROWS), _int(ROWS))
    sizes = dict(rows=ROWS, window=window, tensor=1, weight=2)
    formula = roofline.decode_work(CONFIG, chunk_tokens=chunk, **sizes).flops / chunk
    assert product_flops(traced.jaxpr, 0) == formula


def test_xla_counts_at_most_15_percent_more_on_an_unrolled_model():
    graphdef, params = abstract_model(CONFIG, stacked=False)

    def run(params, x, segments):
        model = nnx.merge(graphdef, params)
        angles = model._angles(segments)
        for block in model.layers:
            x = block(x, angles, segments, packed_attention)
        return model.logits(x).sum()

    x = jax.ShapeDtypeStruct((ROWS, LENGTH, CONFIG.embed_dim), jnp.float32)
    gradients = jax.jit(jax.value_and_grad(run, argnums=(0, 1)))
    counted = gradients.lower(params, x, _int(ROWS, LENGTH)).cost_analysis()["flops"]
    tokens = ROWS * LENGTH
    trunk = roofline.trunk_products(CONFIG, tokens, 1) + _attention(1)
    products = (trunk + roofline.vocab_product(CONFIG, tokens, 1)) * 3
    # XLA's count also includes norms, rotations and the softmax.
    assert products.flops < counted < 1.15 * products.flops


def test_tensor_axis_divides_the_products():
    whole, half = (
        roofline.training_work(CONFIG, rows=ROWS, length=LENGTH, tensor=tensor, remat="full").flops
        for tensor in (1, 2)
    )
    assert whole == 2 * half


def test_bytes_of_a_product_and_of_attention_match_a_hand_count():
    # 3 × 5 by 5 × 7, with operands of 2 and 1 bytes and a result of 4 bytes.
    assert roofline.product(3, 5, 7, weight=1, result=4) == Work(210, 30 + 35 + 84)
    one = roofline.attention(CONFIG, queries=10, keys=20, pairs=50, tensor=2)
    # Per layer: 3 query heads and 1 key-value head of 16; q, the result, k and v have 2 bytes.
    assert one.hbm_bytes == 3 * 2 * 16 * (2 * 10 * 3 + 2 * 20 * 1)
    assert one.flops == 3 * 4 * 50 * 3 * 16


def test_int8_weights_halve_the_weight_bytes_of_decoding():
    sizes = dict(rows=1, chunk_tokens=1, window=0, tensor=1)
    plain, int8 = (roofline.decode_work(CONFIG, weight=weight, **sizes) for weight in (2, 1))
    _, params = abstract_model(CONFIG)
    multiplied = sum(
        leaf.size
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        if not any(name in jax.tree_util.keystr(path) for name in ("norm", "bias", "embedding"))
    )
    assert plain.hbm_bytes - int8.hbm_bytes == multiplied
    assert plain.flops == int8.flops


def test_bound_names_the_slowest_part():
    chip = roofline.Chip(flops=10.0, hbm_bytes=1, hbm=4.0, ici=2.0)
    of_compute = roofline.bound(Work(100, 4), 2.0, chip)
    assert (of_compute.name, of_compute.seconds) == ("compute", 10.0)
    assert roofline.bound(Work(100, 80), 2.0, chip).name == "hbm"
    of_links = roofline.bound(Work(100, 80), 60.0, chip)
    assert (of_links.name, of_links.seconds) == ("interconnect", 30.0)
