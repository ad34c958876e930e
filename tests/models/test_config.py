"""Tests reading and writing `config.json`."""

import copy
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zerosearch_jax.errors import UserError
from zerosearch_jax.models.config import (
    SUPPORTED,
    ModelConfig,
    RopeScaling,
    from_hf,
    read_config,
    to_hf,
)

LLAMA3 = {
    "model_type": "llama",
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 1024,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 256,
    },
}


def test_old_and_new_rope_keys_give_the_same_config():
    new = {k: v for k, v in LLAMA3.items() if not k.startswith("rope")}
    new["rope_parameters"] = LLAMA3["rope_scaling"] | {"rope_theta": 500000.0}
    config = from_hf(LLAMA3)
    assert config == from_hf(new)
    assert config.rope_theta == 500000.0 and config.head_dim == 8
    assert config.rope_scaling == RopeScaling(8.0, 1.0, 4.0, 256)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_written_config_reads_back(tmp_path, family):
    config = from_hf(LLAMA3 | {"model_type": family, "tie_word_embeddings": True})
    assert config.qkv_bias == (family == "qwen2") and config.qk_norm == (family == "qwen3")
    (tmp_path / "config.json").write_text(json.dumps(to_hf(config)))
    assert read_config(tmp_path) == config


MINIMAL = {
    "vocab_size": 128,
    "hidden_size": 512,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 32,
    "max_position_embeddings": 1024,
}
OPTIONAL = ("head_dim", "layer_types", "rope_parameters", "tie_word_embeddings")
SCALING = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LATER = {"rope_theta": 7e5}
CHANGES = (
    {},
    {"head_dim": 64},
    {"num_key_value_heads": None},
    {"num_key_value_heads": 8},
    {"rms_norm_eps": 1e-5},
    {"tie_word_embeddings": True},
    {"attention_bias": False, "mlp_bias": False, "attention_dropout": 0.0},
    {"sliding_window": 16, "use_sliding_window": False, "max_window_layers": 1},
    {"layer_types": ["full_attention"] * 2},
    {"rope_theta": 5e5},
    {"rope_scaling": None, "rope_parameters": LATER},
    {"rope_scaling": {}, "rope_parameters": LATER, "rope_theta": 5e5},
    {"rope_scaling": SCALING, "rope_theta": 5e5},
    {"rope_scaling": SCALING, "original_max_position_embeddings": 77},
    {"rope_scaling": SCALING | {"type": "default", "original_max_position_embeddings": 256}},
    {"rope_scaling": SCALING, "rope_parameters": LATER},
    {"rope_scaling": {"type": "default"}, "rope_parameters": SCALING | LATER, "rope_theta": 3e5},
)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: " ".join(change) or "minimal")
def test_keys_and_their_defaults_mean_what_they_mean_in_transformers(family, change):
    from transformers import AutoConfig

    theirs = AutoConfig.for_model(family, **copy.deepcopy(MINIMAL | change))
    ours = from_hf({"model_type": family} | MINIMAL | change)
    rope = theirs.rope_parameters
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or 512 // 32)
    assert ours.num_kv_heads == theirs.num_key_value_heads
    assert ours.norm_eps == theirs.rms_norm_eps
    assert ours.tie_embeddings == theirs.tie_word_embeddings
    assert ours.rope_theta == rope["rope_theta"]
    scaling = RopeScaling(8.0, 1.0, 4.0, rope.get("original_max_position_embeddings", 0))
    assert ours.rope_scaling == (scaling if rope["rope_type"] == "llama3" else None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "'gpt2' is not supported; use one of llama, qwen2, qwen3"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"attention_bias": True}, "attention_bias"),
        ({"attention_dropout": 0.1}, "attention_dropout"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_act": "gelu"}, "hidden_act.*silu"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "'yarn' is not supported"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}, "rope_scaling": None}, "partial_rot"),
        ({"rope_parameters": {"full_attention": {}}, "rope_scaling": None}, "each layer type"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "lacks the key 'factor'"),
        ({"num_key_value_heads": 3}, "4 query heads are not divisible by 3"),
        ({"hidden_size": 30}, "hidden_size=30"),
        ({"hidden_size": 30, "head_dim": None}, "hidden_size=30"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers='2'"),
        ({"num_attention_heads": 0}, "num_attention_heads=0"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0"),
        ({"num_hidden_layers": True}, "num_hidden_layers=True"),
        ({"vocab_size": 128.0}, "vocab_size=128.0"),
        ({"vocab_size": 2**31}, "vocab_size=2147483648"),
        ({"head_dim": 7}, "head_dim=7"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps=nan"),
        ({"rope_theta": 10**400}, "rope_theta=1000"),
        ({"rope_theta": -1}, "rope_theta=-1"),
        ({"rope_scaling": "llama3"}, "rope_scaling='llama3'"),
        ({"rope_scaling": SCALING | {"factor": 0}}, "factor=0"),
        ({"rope_scaling": SCALING | {"low_freq_factor": 4.0}}, "high_freq_factor=4.0"),
        ({"layer_types": 2}, "layer_types=2"),
        ({"layer_types": [["full_attention"]]}, "layer_types="),
        ({"model_type": ["llama"]}, r"model_type \['llama'\]"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings='false'"),
    ],
)
def test_unsupported_options_raise(tmp_path, change, message):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA3 | change))
    with pytest.raises(UserError, match=message) as error:
        read_config(tmp_path)
    assert str(tmp_path / "config.json") in str(error.value)


def test_missing_and_damaged_files_raise(tmp_path):
    with pytest.raises(UserError, match="holds no config.json"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="Expecting property name"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UserError, match="lacks the key"):
        read_config(tmp_path)


@pytest.mark.parametrize("content", [b"[]", b"null", b"\xff", b"[" * 100_000, b"9" * 5000])
def test_a_file_that_is_not_an_object_is_refused(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=f"^{tmp_path}/config.json: "):
        read_config(tmp_path)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=4,
)


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(st.sampled_from([*LLAMA3, *SUPPORTED, *OPTIONAL]), JSON_VALUES, min_size=1))
def test_any_values_of_the_keys_are_read_or_refused(changes):
    try:
        config = from_hf(LLAMA3 | changes)
    except UserError:
        return
    assert all(value > 0 for value in vars(config).values() if type(value) in (int, float))


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(st.sampled_from([*SCALING, "rope_theta", "type"]), JSON_VALUES, min_size=1))
def test_any_values_of_the_rope_keys_are_read_or_refused(changes):
    try:
        config = from_hf(LLAMA3 | {"rope_scaling": SCALING | changes})
    except UserError:
        return
    if scaling := config.rope_scaling:
        assert scaling.high_freq_factor > scaling.low_freq_factor and scaling.factor > 0


def test_an_unknown_family_raises():
    fields = vars(from_hf(LLAMA3)) | {"family": "mamba"}
    with pytest.raises(UserError, match="'mamba' is not supported"):
        ModelConfig(**fields)
