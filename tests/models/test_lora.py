"""Tests low-rank adapters: forward pass, gradients, merging, sharding and PEFT's format."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file, save_file

from zerosearch_jax.errors import UserError
from zerosearch_jax.models.config import ModelConfig
from zerosearch_jax.models.layers import dense
from zerosearch_jax.models.lora import (
    TARGETS,
    LoRA,
    LowRank,
    adapted,
    adapter_shardings,
    init_adapters,
    merge,
    save_adapters,
)
from zerosearch_jax.models.transformer import abstract_model, init_params, param_shardings
from zerosearch_jax.models.weights import load_params, save_params
from zerosearch_jax.parallel.mesh import GENERATE_RULES, make_mesh

CONFIG = ModelConfig(
    family="llama",
    vocab_size=64,
    embed_dim=32,
    mlp_dim=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    rope_theta=10_000.0,
    norm_eps=1e-6,
    tie_embeddings=True,
    qkv_bias=False,
    qk_norm=False,
    max_positions=128,
)
OPTIONS = LoRA(rank=3, alpha=6.0, targets=TARGETS)
# Number of axes of each weight, without the layer axis, that its product sums over.
SUMMED = {name: 2 if name == "o" else 1 for name in TARGETS}


@pytest.fixture(scope="module")
def params():
    return jax.jit(lambda: init_params(CONFIG, 0))()


@pytest.fixture(scope="module")
def adapters():
    """Adapters with both factors random; their change is about a third of the weight."""
    made = init_adapters(CONFIG, OPTIONS, jax.random.key(1))
    noise = np.random.default_rng(1)
    for adapter in made.values():
        adapter["b"] = jnp.asarray(0.1 * noise.standard_normal(adapter["b"].shape), jnp.float32)
    return made


@pytest.fixture(scope="module")
def merged(params, adapters):
    return jax.jit(lambda *args: merge(*args, OPTIONS))(params, adapters)


def batch(rows=2, length=10):
    tokens = jnp.asarray(np.random.default_rng(2).integers(0, CONFIG.vocab_size, (rows, length)))
    return tokens, jnp.broadcast_to(jnp.arange(length), tokens.shape), jnp.zeros_like(tokens)


def forward(params, remat="none"):
    model = nnx.merge(abstract_model(CONFIG, remat=remat)[0], params)
    return model.logits(model(*batch()))


logits = jax.jit(forward)


def loss(params, remat="none"):
    """Returns a scalar loss that weights every logit differently."""
    every = forward(params, remat)
    weight = np.random.default_rng(3).standard_normal(every.shape)
    return jnp.sum(jax.nn.log_softmax(every) * weight)


def adapter_loss(adapters, params, remat="none"):
    return loss(adapted(params, adapters, OPTIONS), remat)


@pytest.fixture(scope="module")
def gradients(params, adapters):
    return jax.jit(jax.grad(adapter_loss))(adapters, params)


def assert_close(tree, wanted, tolerance=1e-5):
    """Asserts that each leaf is within `tolerance` times its largest value."""
    assert jax.tree.structure(tree) == jax.tree.structure(wanted)
    for ours, theirs in zip(jax.tree.leaves(tree), jax.tree.leaves(wanted), strict=True):
        largest = np.abs(theirs).max()
        assert largest > 0
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * largest)


def test_fresh_adapters_have_the_papers_distribution():
    config = dataclasses.replace(CONFIG, embed_dim=256, mlp_dim=320, head_dim=32)
    fresh = init_adapters(config, LoRA(8, 8.0, ("q", "o", "down")), jax.random.key(0))
    shapes = jax.tree.map(lambda x: x.shape, fresh)
    assert shapes == {
        "q": {"a": (2, 256, 8), "b": (2, 8, 4, 32)},
        "o": {"a": (2, 4, 32, 8), "b": (2, 8, 256)},
        "down": {"a": (2, 320, 8), "b": (2, 8, 256)},
    }
    for name, fan_in in (("q", 256), ("o", 128), ("down", 320)):
        assert fresh[name]["a"].dtype == fresh[name]["b"].dtype == jnp.float32
        assert not fresh[name]["b"].any()
        # 2000 or more draws determine a standard deviation to about 2 %.
        assert np.std(fresh[name]["a"]) == pytest.approx(fan_in**-0.5, rel=0.08)
    alone = init_adapters(config, LoRA(8, 1.0, ("down",)), jax.random.key(0))
    np.testing.assert_array_equal(alone["down"]["a"], fresh["down"]["a"])
    assert np.abs(fresh["q"]["a"][0] - fresh["q"]["a"][1]).max() > 0.01


@settings(deadline=None, max_examples=8)
@given(
    inner=st.lists(st.integers(1, 4), min_size=1, max_size=2),
    outer=st.lists(st.integers(1, 4), min_size=1, max_size=2),
    rank=st.integers(1, 3),
    scale=st.floats(0.25, 4.0),
    seed=st.integers(0, 100),
)
def test_low_rank_product_equals_the_product_with_the_sum(inner, outer, rank, scale, seed):
    noise = np.random.default_rng(seed)
    base, a, b, x = (
        noise.standard_normal(shape)
        for shape in ((*inner, *outer), (*inner, rank), (rank, *outer), (2, 3, *inner))
    )
    weight = base + scale * np.tensordot(a, b, axes=1)
    wanted = np.tensordot(x, weight, axes=len(inner))
    ours = LowRank(*(jnp.asarray(part, jnp.float32) for part in (base, a, b)), scale)
    product = dense(jnp.asarray(x, jnp.float32), ours[...], summed=len(inner))
    assert product.shape == (2, 3, *outer)
    np.testing.assert_allclose(product, wanted, rtol=0, atol=1e-5 * max(np.abs(wanted).max(), 1))


def test_indexing_a_part_of_an_adapted_weight_raises():
    with pytest.raises(IndexError, match="whole"):
        LowRank(jnp.ones((2, 2)), jnp.ones((2, 1)), jnp.ones((1, 2)), 1.0)[0]


def test_fresh_adapters_do_not_change_the_model(params):
    fresh = init_adapters(CONFIG, OPTIONS, jax.random.key(0))
    np.testing.assert_array_equal(logits(adapted(params, fresh, OPTIONS)), logits(params))
    options = dataclasses.replace(OPTIONS, targets=("o",))
    ours = merge(params, fresh, options)["layers"]["o"][...]
    np.testing.assert_array_equal(ours, params["layers"]["o"][...])


def test_merged_parameters_give_the_adapted_logits(params, adapters, merged):
    assert jax.tree.map(lambda x: (x.shape, x.dtype), merged) == jax.tree.map(
        lambda x: (x.shape, x.dtype), params
    )
    ours = logits(adapted(params, adapters, OPTIONS))
    np.testing.assert_allclose(ours, logits(merged), rtol=0, atol=1e-5)
    assert np.abs(ours - logits(params)).max() > 0.05


def test_only_the_targets_are_adapted(params, adapters):
    options = dataclasses.replace(OPTIONS, targets=("v", "down"))
    merged = merge(params, {name: adapters[name] for name in options.targets}, options)
    for path, leaf in nnx.to_flat_state(merged):
        same = np.array_equal(leaf[...], dict(nnx.to_flat_state(params))[path][...])
        assert same == (path not in {("layers", "v"), ("layers", "down")}), path
    ours = logits(adapted(params, adapters, options))
    np.testing.assert_allclose(ours, logits(merged), rtol=0, atol=1e-5)


def test_merging_into_bfloat16_rounds_once(params, adapters):
    """The sum is computed in float32 and rounded to bfloat16; other weights do not change."""
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    merged = merge(half, adapters, dataclasses.replace(OPTIONS, targets=("o",)))
    weight = np.asarray(half["layers"]["o"][...], np.float64)
    a, b = (np.asarray(adapters["o"][factor], np.float64) for factor in "ab")
    wanted = weight + 2.0 * np.einsum("lnhr,lrd->lnhd", a, b)
    ours = np.asarray(merged["layers"]["o"][...], np.float64)
    assert merged["layers"]["o"][...].dtype == jnp.bfloat16
    # Half a unit in the last place of bfloat16's eight bits.
    assert np.all(np.abs(ours - wanted) <= np.abs(wanted) * 2.0**-8 + 1e-6)
    np.testing.assert_array_equal(merged["embedding"][...], half["embedding"][...])


def test_gradients_follow_the_chain_rule(adapters, merged, gradients):
    """The gradient G of a merged weight gives dA = s G Bᵀ and dB = s Aᵀ G."""
    full = jax.jit(jax.grad(loss))(merged)
    wanted = {}
    for name in TARGETS:
        weight = np.asarray(full["layers"][name][...], np.float64)
        inner = weight.shape[1 : 1 + SUMMED[name]]
        a, b = (np.asarray(adapters[name][factor], np.float64) for factor in "ab")
        factors = {"a": np.empty(a.shape), "b": np.empty(b.shape)}
        for layer in range(CONFIG.num_layers):
            g = weight[layer].reshape(np.prod(inner), -1)
            flat_a, flat_b = a[layer].reshape(-1, 3), b[layer].reshape(3, -1)
            factors["a"][layer] = (2.0 * g @ flat_b.T).reshape(a.shape[1:])
            factors["b"][layer] = (2.0 * flat_a.T @ g).reshape(b.shape[1:])
        wanted[name] = factors
    assert_close(gradients, wanted)


def test_remat_does_not_change_gradients(params, adapters, gradients):
    full = jax.jit(lambda *args: jax.grad(adapter_loss)(*args, remat="full"))(adapters, params)
    assert_close(full, gradients)


def test_a_bfloat16_forward_pass_is_close_and_gradients_are_float32(params, adapters):
    def half(adapters):
        tree = adapted(params, adapters, OPTIONS)
        return jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree)

    exact = logits(adapted(params, adapters, OPTIONS))
    difference = logits(half(adapters)) - exact
    assert 0 < np.linalg.norm(difference) < 0.03 * np.linalg.norm(exact)
    shapes = jax.eval_shape(jax.grad(lambda adapters: loss(half(adapters))), adapters)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), shapes) == jax.tree.map(
        lambda x: (x.shape, x.dtype), adapters
    )


def test_gradients_of_frozen_weights_are_not_computed(params, adapters):
    """LoRA saves the FLOPs of these gradients and adds the FLOPs of the adapters' products."""

    def flops(function, *args):
        # FLOPs before XLA removes dead code; the body of a scan counts once.
        return jax.jit(function).lower(*args).cost_analysis()["flops"]

    full = flops(jax.grad(loss), params)
    lora = flops(jax.grad(adapter_loss), adapters, params)
    tokens = batch()[0].size
    saved = 2 * tokens * params["embedding"][...].size  # used as the unembedding
    spent = 0
    for name in TARGETS:
        a, b = (adapters[name][factor][0].size for factor in "ab")
        saved += 2 * tokens * params["layers"][name][0].size
        spent += 3 * 2 * tokens * (a + b)  # forward, and backward to input and adapter
    assert spent < saved / 2
    # The gradient of the smallest of the seven matrices would be 13 % of this difference.
    assert full - lora > 0.95 * (saved - spent)


def test_sharded_gradients_equal_unsharded_ones(params, adapters, merged, gradients):
    mesh = make_mesh(2, 2, 2)
    shardings = adapter_shardings(adapters, mesh)
    sharded = jax.device_put(adapters, shardings)
    base = jax.device_put(params, param_shardings(params, mesh))
    step = jax.jit(jax.grad(adapter_loss), out_shardings=shardings)
    ours = step(sharded, base)
    assert jax.tree.map(lambda x: x.sharding, ours) == shardings
    assert_close(ours, gradients)
    merge_sharded = jax.jit(
        lambda *args: merge(*args, OPTIONS), out_shardings=param_shardings(params, mesh)
    )
    assert_close(merge_sharded(base, sharded), merged, 1e-6)


def test_adapters_are_sharded_like_their_weights(adapters):
    mesh = make_mesh(2, 2, 2)
    specs = jax.tree.map(lambda x: x.spec, adapter_shardings(adapters, mesh))
    assert specs["q"] == {"a": P(None, "fsdp", None), "b": P(None, None, "tensor", None)}
    assert specs["o"] == {"a": P(None, "tensor", None, None), "b": P(None, None, "fsdp")}
    assert specs["up"] == {"a": P(None, "fsdp", None), "b": P(None, None, "tensor")}
    assert specs["down"] == {"a": P(None, "tensor", None), "b": P(None, None, "fsdp")}
    whole = adapter_shardings(adapters, mesh, GENERATE_RULES)
    assert whole["q"]["a"].spec == P(None, None, None)
    with pytest.raises(UserError, match="kv_heads of size 2 does not divide by 4"):
        adapter_shardings(adapters, make_mesh(1, 2, 4))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 0}, "rank is 0; it must be at least 1"),
        ({"alpha": 0.0}, "alpha is 0.0; it must be above 0"),
        ({"alpha": float("nan")}, "alpha is nan"),
        ({"targets": ()}, "no targets; choose some of q, k, v, o, gate, up, down"),
        ({"targets": ("q", "embedding")}, "target 'embedding' is not one of q, k, v"),
    ],
)
def test_invalid_options_raise(change, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(OPTIONS, **change)


def test_saved_adapters_have_pefts_names_and_config(tmp_path, adapters):
    options = LoRA(rank=3, alpha=6.0, targets=("q", "o", "gate"))
    save_adapters(tmp_path, adapters, options, CONFIG, "some/base")
    assert {path.name for path in tmp_path.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    wanted = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": 3,
        "lora_alpha": 6.0,
        "lora_dropout": 0.0,
        "target_modules": ["q_proj", "o_proj", "gate_proj"],
        "bias": "none",
        "fan_in_fan_out": False,
        "base_model_name_or_path": "some/base",
    }
    assert {key: config[key] for key in wanted} == wanted
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    prefix = "base_model.model.model.layers"
    shapes = {"self_attn.q_proj": (32, 64), "self_attn.o_proj": (64, 32), "mlp.gate_proj": (32, 48)}
    assert {name: x.shape for name, x in tensors.items()} == {
        f"{prefix}.{layer}.{module}.lora_{factor}.weight": shape
        for layer in range(2)
        for module, (inner, outer) in shapes.items()
        for factor, shape in (("A", (3, inner)), ("B", (outer, 3)))
    }
    # Element 5 of head 2, in the query and in the output projection.
    q_b = tensors[f"{prefix}.1.self_attn.q_proj.lora_B.weight"]
    assert q_b[2 * 16 + 5, 1] == adapters["q"]["b"][1, 1, 2, 5]
    o_a = tensors[f"{prefix}.0.self_attn.o_proj.lora_A.weight"]
    assert o_a[2, 2 * 16 + 5] == adapters["o"]["a"][0, 2, 5, 2]


def test_sharded_adapters_replace_older_ones_with_the_same_bytes(tmp_path, adapters):
    sharded = jax.device_put(adapters, adapter_shardings(adapters, make_mesh(2, 2, 2)))
    save_adapters(tmp_path / "a", adapters, OPTIONS, CONFIG, "base")
    zeros = jax.tree.map(jnp.zeros_like, adapters)
    save_adapters(tmp_path / "b", zeros, OPTIONS, CONFIG, "older")
    save_adapters(tmp_path / "b", sharded, OPTIONS, CONFIG, "base")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_saved_adapters_applied_in_torch_equal_the_merged_export(
    tmp_path, params, adapters, merged
):
    """Computes W + alpha / r · B A from the saved files and compares logits in torch."""
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    save_params(tmp_path / "base", params, CONFIG)
    save_params(tmp_path / "merged", merged, CONFIG)
    save_adapters(tmp_path / "adapter", adapters, OPTIONS, CONFIG, "base")
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    weights = load_file(tmp_path / "base" / "model.safetensors")
    for name in [name for name in saved if name.endswith("lora_A.weight")]:
        weight = weights[name.replace("lora_A.", "").removeprefix("base_model.model.")]
        weight += config["lora_alpha"] / config["r"] * saved[name.replace("_A", "_B")] @ saved[name]
    save_file(weights, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    tokens = np.asarray(batch()[0])

    def torch_logits(name):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name, attn_implementation="eager")
        with torch.no_grad():
            return model(torch.tensor(tokens)).logits.numpy()

    wanted = torch_logits("base")
    np.testing.assert_allclose(torch_logits("merged"), wanted, rtol=0, atol=1e-5)
    loaded = load_params(tmp_path / "merged", CONFIG, make_mesh())
    np.testing.assert_allclose(logits(loaded), wanted, rtol=0, atol=1e-5)
