"""Model configuration: sizes and options of a decoder, from a Hugging Face `config.json`."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zerosearch_jax.errors import UserError, shown
from zerosearch_jax.files import read_json
from zerosearch_jax.ranges import MAX_FLOAT, MAX_INT

FAMILIES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}

# Keys that change what transformers computes, and the only value that this model implements. A
# missing or null key has this value. Qwen2 has its bias whatever `attention_bias` says.
SUPPORTED = {
    "hidden_act": "silu",
    "mlp_bias": False,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "use_sliding_window": False,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
}

# Sizes that transformers gives a model of the family if the key is missing.
DEFAULT_KV_HEADS = {"qwen2": 32, "qwen3": 32}  # elsewhere: the query heads
DEFAULT_HEAD_DIM = {"qwen3": 128}  # elsewhere: hidden_size / query heads


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3's frequency scaling, which stretches long wavelengths by `factor`.

    Raises:
      UserError: `high_freq_factor` is not above `low_freq_factor`.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int

    def __post_init__(self):
        if self.high_freq_factor <= self.low_freq_factor:
            raise UserError(
                f"high_freq_factor={self.high_freq_factor} must be above "
                f"low_freq_factor={self.low_freq_factor}; fix it or fetch the model again"
            )


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and options of a decoder-only transformer (Llama, SmolLM2, Qwen2.5, Qwen3).

    Attributes:
      family: Hugging Face's `model_type`; a key of `FAMILIES`.
      qkv_bias: the query, key and value projections have a bias (Qwen2).
      qk_norm: queries and keys pass an RMS norm over `head_dim` (Qwen3).
      max_positions: longest sequence that the model supports, in tokens.

    Raises:
      UserError: the family is unknown, the query heads cannot share the key-value heads evenly, or
        `head_dim` is odd.
    """

    family: str
    vocab_size: int
    embed_dim: int
    mlp_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float
    norm_eps: float
    tie_embeddings: bool
    qkv_bias: bool
    qk_norm: bool
    max_positions: int
    rope_scaling: RopeScaling | None = None

    def __post_init__(self):
        _check_family(self.family)
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"{self.num_heads} query heads are not divisible by {self.num_kv_heads} "
                "key-value heads; fix num_attention_heads or num_key_value_heads"
            )
        if self.head_dim % 2:
            raise UserError(f"head_dim={self.head_dim} is odd; rotary embeddings need an even one")


def read_config(directory: str | Path) -> ModelConfig:
    """Reads `config.json` of a Hugging Face model directory.

    Raises:
      UserError: the directory, the file or one of its keys is missing; or the architecture, or
        an option such as sliding-window attention, is not supported.
    """
    path = Path(directory) / "config.json"
    if not os.path.isfile(path):  # `Path.is_file` raises for a name that is too long
        raise UserError(
            f"{directory} holds no config.json; give a Hugging Face model directory (the head of "
            "the config file names the command that makes one; `make smollm2` makes "
            "models/smollm2-135m)"
        )
    hf = read_json(path, dict, "fetch the model again")
    try:
        return from_hf(hf)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def from_hf(hf: dict[str, Any]) -> ModelConfig:
    """Returns the `ModelConfig` of a parsed `config.json`.

    Missing keys have the defaults of transformers' config classes.

    Raises:
      UserError: the architecture or one of its options is not supported, a value has the wrong type
        or size, or a key is missing that published models have.
    """
    family = hf.get("model_type", "(none)")
    _check_family(family)
    # As in transformers, rope_scaling replaces rope_parameters if a file has both.
    rope = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise UserError(f"rope_scaling={shown(rope)} must be an object; fix it")
    _check_supported(family, hf | rope)
    heads, width = _value(hf, "num_attention_heads", int), _value(hf, "hidden_size", int)
    if hf.get("head_dim") is None and family not in DEFAULT_HEAD_DIM and width % heads:
        raise UserError(
            f"hidden_size={width} is not divisible by num_attention_heads={heads}; add head_dim"
        )
    kv_heads = heads
    if "num_key_value_heads" not in hf:
        kv_heads = DEFAULT_KV_HEADS.get(family, heads)
    return ModelConfig(
        family=family,
        vocab_size=_value(hf, "vocab_size", int),
        embed_dim=width,
        mlp_dim=_value(hf, "intermediate_size", int),
        num_layers=_value(hf, "num_hidden_layers", int),
        num_heads=heads,
        num_kv_heads=_value(hf, "num_key_value_heads", int, kv_heads),
        head_dim=_value(hf, "head_dim", int, DEFAULT_HEAD_DIM.get(family, width // heads)),
        rope_theta=_value({"rope_theta": 10_000.0} | hf | rope, "rope_theta", float),
        norm_eps=_value(hf, "rms_norm_eps", float, 1e-6),
        tie_embeddings=_value(hf, "tie_word_embeddings", bool, False),
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
        max_positions=_value(hf, "max_position_embeddings", int),
        rope_scaling=_rope_scaling(rope, hf),
    )


def _check_family(family: Any) -> None:
    if family not in list(FAMILIES):  # not `in FAMILIES`: a list is not hashable
        raise UserError(
            f"model_type {shown(family)} is not supported; use one of {', '.join(FAMILIES)}"
        )


def _check_supported(family: str, options: dict[str, Any]) -> None:
    for key, value in SUPPORTED.items():
        ignored = key == "attention_bias" and family == "qwen2"
        if not ignored and options.get(key) not in (value, None):
            raise UserError(f"{key}={shown(options[key])} is not supported; only {value!r} is")
    types = options.get("layer_types") or []
    if not isinstance(types, list) or any(kind != "full_attention" for kind in types):
        raise UserError(f"layer_types={shown(types)} is not supported; only full_attention is")
    if "full_attention" in options:
        raise UserError("rope_parameters of each layer type are not supported; only one set is")


def _value(hf: dict[str, Any], key: str, kind: type, default: Any = None) -> Any:
    """Returns `hf[key]`, or the default if it is missing or null; refuses other types and sizes."""
    value = default if hf.get(key) is None else hf[key]
    if value is None:
        raise UserError(f"lacks the key {key!r}; add it or fetch the model again")
    is_bool = isinstance(value, bool)
    wanted, fits = {
        int: (
            f"an integer from 1 to {MAX_INT}",
            isinstance(value, int) and not is_bool and 1 <= value <= MAX_INT,
        ),
        float: (
            f"a number above 0 and at most {MAX_FLOAT}",
            isinstance(value, int | float) and not is_bool and 0 < value <= MAX_FLOAT,
        ),
        bool: ("true or false", is_bool),
    }[kind]
    if not fits:
        raise UserError(f"{key}={shown(value)} must be {wanted}; fix it or fetch the model again")
    return kind(value)


def _rope_scaling(rope: dict[str, Any], hf: dict[str, Any]) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise UserError(f"rope scaling {shown(kind)} is not supported; only 'llama3' is")
    longest = hf["max_position_embeddings"]
    return RopeScaling(
        factor=_value(rope, "factor", float),
        low_freq_factor=_value(rope, "low_freq_factor", float),
        high_freq_factor=_value(rope, "high_freq_factor", float),
        original_max_positions=_value(rope, "original_max_position_embeddings", int, longest),
    )


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """Returns the content of the `config.json` that `transformers` loads for this model."""
    hf = {
        "architectures": [FAMILIES[config.family]],
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.embed_dim,
        "intermediate_size": config.mlp_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "rope_theta": config.rope_theta,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "max_position_embeddings": config.max_positions,
        "hidden_act": "silu",
    }
    if config.rope_scaling is not None:
        scaling = config.rope_scaling
        hf["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_positions,
        }
    return hf
