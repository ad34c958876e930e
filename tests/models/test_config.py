"""Tests reading and writing `config.json`."""

import json

import pytest

from zerosearch_jax.errors import UserError
from zerosearch_jax.models.config import ModelConfig, RopeScaling, from_hf, read_config, to_hf

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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "'gpt2' is not supported; use one of llama, qwen2, qwen3"),
        ({"use_sliding_window": True}, "only full attention"),
        ({"attention_bias": True}, "attention_bias is not supported for llama"),
        ({"hidden_act": "gelu"}, "SiLU"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "'yarn' is not supported"),
        ({"num_key_value_heads": 3}, "4 query heads are not divisible by 3"),
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
    with pytest.raises(UserError, match="is not JSON"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UserError, match="lacks the key 'vocab_size'"):
        read_config(tmp_path)


def test_an_unknown_family_raises():
    fields = vars(from_hf(LLAMA3)) | {"family": "mamba"}
    with pytest.raises(UserError, match="'mamba' is not supported"):
        ModelConfig(**fields)
