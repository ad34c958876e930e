"""Tests import and export of Hugging Face weights."""

import dataclasses
import json
import shutil
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from zerosearch_jax.errors import UserError
from zerosearch_jax.models import weights
from zerosearch_jax.models.config import ModelConfig, read_config
from zerosearch_jax.models.transformer import abstract_model, param_shardings
from zerosearch_jax.models.weights import check_headers, load_params, save_params
from zerosearch_jax.parallel.mesh import make_mesh

CONFIG = ModelConfig(
    family="qwen2",
    vocab_size=64,
    embed_dim=32,
    mlp_dim=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    rope_theta=10_000.0,
    norm_eps=1e-6,
    tie_embeddings=False,
    qkv_bias=True,
    qk_norm=False,
    max_positions=128,
)

CONFIGS = ("config.json", "generation_config.json")


def random_params(config=CONFIG, dtype=jnp.float32):
    """Returns random parameters, also for leaves that are ones or zeros in a fresh model."""
    noise = np.random.default_rng(0)
    _, abstract = abstract_model(config, dtype=dtype)
    return jax.tree.map(
        lambda leaf: jnp.asarray(noise.standard_normal(leaf.shape).astype(leaf.dtype)), abstract
    )


def assert_same(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert a.dtype == b.dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_round_trip_is_bitwise(tmp_path, dtype):
    params = random_params(dtype=dtype)
    save_params(tmp_path, params, CONFIG)
    assert {path.name for path in tmp_path.iterdir()} == {*CONFIGS, "model.safetensors"}
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == jnp.dtype(dtype).name
    assert_same(load_params(tmp_path, read_config(tmp_path), make_mesh(), dtype=dtype), params)


def test_a_bfloat16_file_loads_as_float32(tmp_path):
    params = random_params(dtype=jnp.bfloat16)
    save_params(tmp_path, params, CONFIG)
    loaded = load_params(tmp_path, CONFIG, make_mesh(), dtype=jnp.float32)
    assert_same(loaded, jax.tree.map(lambda x: x.astype(jnp.float32), params))


def test_one_file_and_several_files_replace_each_other(tmp_path, monkeypatch):
    params = random_params()
    save_params(tmp_path, random_params(), CONFIG)
    (tmp_path / "tokenizer.json").write_text("{}")
    monkeypatch.setattr(weights, "MAX_FILE_BYTES", 20_000)
    save_params(tmp_path, params, CONFIG)
    names = {path.name for path in tmp_path.iterdir()}
    files = {name for name in names if name.endswith(".safetensors")}
    assert len(files) > 2 and "model.safetensors" not in files
    assert names - files == {*CONFIGS, "model.safetensors.index.json", "tokenizer.json"}
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == files
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in jax.tree.leaves(params))
    assert_same(load_params(tmp_path, CONFIG, make_mesh()), params)
    # A tensor counts only in the file that the index names for it.
    last = load_file(tmp_path / max(files))
    save_file(last | {Q0: np.zeros((32, 32), "f4")}, tmp_path / max(files))
    assert index["weight_map"][Q0] != max(files)
    assert_same(load_params(tmp_path, CONFIG, make_mesh()), params)
    monkeypatch.undo()
    save_params(tmp_path, params, CONFIG)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {*CONFIGS, "model.safetensors", "tokenizer.json"}


def test_a_failed_export_keeps_the_older_one(tmp_path, monkeypatch):
    params = random_params()
    save_params(tmp_path, params, CONFIG)

    def full_disk(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(weights, "save_file", full_disk)
    with pytest.raises(OSError, match="No space"):
        save_params(tmp_path, jax.tree.map(jnp.zeros_like, params), CONFIG)
    assert_same(load_params(tmp_path, read_config(tmp_path), make_mesh()), params)


@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 4, 2), (8, 1, 1), (1, 8, 1)])
def test_parameters_load_with_the_meshs_shardings(tmp_path, sizes):
    params = random_params()
    save_params(tmp_path, params, CONFIG)
    mesh = make_mesh(*sizes)
    loaded = load_params(tmp_path, CONFIG, mesh)
    wanted = dict(nnx.to_flat_state(param_shardings(params, mesh)))
    for path, leaf in nnx.to_flat_state(loaded):
        assert leaf[...].sharding == wanted[path].get_value(), path
    assert_same(loaded, params)


def test_sharded_parameters_export_like_unsharded_ones(tmp_path):
    params = random_params()
    sharded = jax.device_put(params, param_shardings(params, make_mesh(2, 2, 2)))
    save_params(tmp_path / "a", params, CONFIG)
    save_params(tmp_path / "b", sharded, CONFIG)
    name = "model.safetensors"
    assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_only_a_copy_of_the_embedding_may_be_the_head_of_a_tied_model(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "CHECKED_ROWS", 24)  # several parts of different sizes
    config = dataclasses.replace(CONFIG, tie_embeddings=True)
    params = random_params(config)
    save_params(tmp_path, params, config)
    head = np.array(params["embedding"][...])
    edit(tmp_path, lambda tensors: tensors.update({"lm_head.weight": head}))
    assert_same(load_params(tmp_path, config, make_mesh()), params)
    head[63, 31] += 0.5
    edit(tmp_path, lambda tensors: tensors.update({"lm_head.weight": head}))
    with pytest.raises(UserError, match="lm_head.weight differs from model.embed_tokens.weight"):
        load_params(tmp_path, config, make_mesh())
    edit(tmp_path, lambda tensors: tensors.update({"lm_head.weight": head[1:]}))
    with pytest.raises(UserError, match=r"\(63, 32\).*\(64, 32\)"):
        check_headers(tmp_path, config)


def edit(directory, change):
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


Q0 = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(Q0), rf"lacks the tensor {Q0}"),
        (lambda t: t.pop("lm_head.weight"), "lacks the tensor lm_head.weight"),
        (lambda t: t.update({Q0: t[Q0][:-1]}), rf"{Q0} has shape \(31, 32\).*\(32, 32\)"),
        (lambda t: t.update({Q0: t[Q0].astype(np.int8)}), rf"model.safetensors: {Q0} is I8"),
        (lambda t: t.update({"model.extra.bias": t[Q0]}), "model.extra.bias does not belong"),
        (lambda t: t.update({Q0.replace("0", "2"): t[Q0]}), "3 layers.*num_hidden_layers=2"),
    ],
)
def test_wrong_tensors_are_refused_by_their_headers(tmp_path, change, message):
    save_params(tmp_path, random_params(), CONFIG)
    edit(tmp_path, change)
    for read in (check_headers, partial(load_params, mesh=make_mesh())):
        with pytest.raises(UserError, match=message):
            read(tmp_path, config=CONFIG)


@given(
    dtype=st.sampled_from([np.float32, np.float16, ml_dtypes.bfloat16]),
    bad=st.sampled_from([[np.nan], [np.inf], [-np.inf, np.inf]]),
    name=st.sampled_from(["model.norm.weight", Q0.replace("0", "1"), "lm_head.weight"]),
    data=st.data(),
)
@settings(max_examples=8, deadline=None)
def test_weights_that_are_not_finite_are_refused_with_file_and_tensor(
    tmp_path_factory, dtype, bad, name, data
):
    directory = tmp_path_factory.mktemp("not-finite")
    save_params(directory, random_params(dtype=dtype), CONFIG)

    def spoil(tensors):
        places = st.lists(
            st.integers(0, tensors[name].size - 1),
            min_size=len(bad),
            max_size=len(bad),
            unique=True,
        )
        tensors[name].flat[data.draw(places)] = bad

    edit(directory, spoil)
    with pytest.raises(UserError, match=rf"model.safetensors: {name} holds .*NaN"):
        load_params(directory, CONFIG, make_mesh())


def test_the_largest_finite_weights_are_accepted(tmp_path):
    largest = jax.tree.map(
        lambda x: jnp.full_like(x, jnp.finfo(jnp.float32).max), random_params(dtype=jnp.float32)
    )
    save_params(tmp_path, largest, CONFIG)
    assert_same(load_params(tmp_path, CONFIG, make_mesh()), largest)


def test_missing_and_damaged_files_raise(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="holds neither model.safetensors nor"):
        load_params(tmp_path, CONFIG, make_mesh())
    save_params(tmp_path, random_params(), CONFIG)
    whole = (tmp_path / "model.safetensors").read_bytes()
    for size in (0, 20, len(whole) - 1):
        (tmp_path / "model.safetensors").write_bytes(whole[:size])
        with pytest.raises(UserError, match="model.safetensors is damaged"):
            load_params(tmp_path, CONFIG, make_mesh())
    monkeypatch.setattr(weights, "MAX_FILE_BYTES", 40_000)
    save_params(tmp_path, random_params(), CONFIG)
    file = sorted(tmp_path.glob("model-*"))[1]
    file.unlink()
    with pytest.raises(UserError, match=f"names '{file.name}', which is missing"):
        load_params(tmp_path, CONFIG, make_mesh())
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(UserError, match="no readable weight_map"):
        load_params(tmp_path, CONFIG, make_mesh())


@pytest.fixture
def sharded(tmp_path, monkeypatch):
    """A directory with several files of weights, and its index."""
    monkeypatch.setattr(weights, "MAX_FILE_BYTES", 40_000)
    directory = tmp_path / "model"
    save_params(directory, random_params(), CONFIG)
    return directory, json.loads((directory / INDEX).read_text())


INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize(
    "index",
    [b"[]", b"\xff", b"{", b'{"weight_map": []}', b'{"weight_map": null}', b"[" * 100_000],
)
def test_a_damaged_index_is_refused_by_name(sharded, index):
    directory, _ = sharded
    (directory / INDEX).write_bytes(index)
    with pytest.raises(UserError, match=f"^{directory}/{INDEX}"):
        check_headers(directory, CONFIG)


@pytest.mark.parametrize(
    "file",
    ["../out.safetensors", "{parent}/out.safetensors", "sub/../../out.safetensors", "sub/x", ".."]
    + ["", "\0", "x" * 300, 5, None, ["x"]],
)
def test_the_index_may_not_name_a_file_outside_its_directory(sharded, file):
    directory, index = sharded
    name = index["weight_map"][Q0]
    (directory / "sub").mkdir()
    shutil.copy(directory / name, directory / "sub" / "x")
    shutil.move(directory / name, directory.parent / "out.safetensors")
    if isinstance(file, str):
        file = file.format(parent=directory.parent)
    for tensor, kept in index["weight_map"].items():
        index["weight_map"][tensor] = file if kept == name else kept
    (directory / INDEX).write_text(json.dumps(index))
    with pytest.raises(UserError, match=f"^{directory}/{INDEX}"):
        check_headers(directory, CONFIG)


def test_files_may_be_links_to_another_directory_as_in_the_hubs_cache(sharded, tmp_path):
    directory, index = sharded
    (tmp_path / "blobs").mkdir()
    for name in (*set(index["weight_map"].values()), INDEX, "config.json"):
        shutil.move(directory / name, tmp_path / "blobs" / name)
        (directory / name).symlink_to(Path("..", "blobs", name))
    assert_same(load_params(directory, read_config(directory), make_mesh()), random_params())


def test_a_tensor_in_two_files_must_be_in_the_index(sharded):
    directory, index = sharded
    first, last = min(index["weight_map"].values()), max(index["weight_map"].values())
    for file in (first, last):
        tensors = load_file(directory / file)
        save_file(tensors | {"extra": np.zeros(2, "f4")}, directory / file)
    with pytest.raises(UserError, match=f"does not list extra, .* {first} .* {last}"):
        check_headers(directory, CONFIG)


@pytest.mark.parametrize("size", [10**10, 2**63, 10])
def test_a_header_of_false_length_is_refused(tmp_path, size):
    save_params(tmp_path, random_params(), CONFIG)
    path = tmp_path / "model.safetensors"
    path.write_bytes(size.to_bytes(8, "little") + path.read_bytes()[8:])
    with pytest.raises(UserError, match=f"^{path} is damaged"):
        check_headers(tmp_path, CONFIG)


def test_offsets_that_overlap_are_refused(tmp_path):
    save_params(tmp_path, random_params(), CONFIG)
    path = tmp_path / "model.safetensors"
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header["model.norm.weight"]["data_offsets"] = header["lm_head.weight"]["data_offsets"]
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size :])
    with pytest.raises(UserError, match=f"^{path} is damaged"):
        check_headers(tmp_path, CONFIG)


def test_absurd_sizes_are_refused_before_anything_of_that_size_is_made(tmp_path):
    save_params(tmp_path, random_params(), CONFIG)
    largest = 2**31 - 1
    layers = dataclasses.replace(CONFIG, num_layers=largest)
    sizes = dict(embed_dim=largest, mlp_dim=largest, vocab_size=largest, head_dim=largest - 1)
    for config in (layers, dataclasses.replace(CONFIG, **sizes)):
        with pytest.raises(UserError, match="config.json (gives|requires)"):
            check_headers(tmp_path, config)
