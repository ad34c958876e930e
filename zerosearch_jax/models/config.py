"""Model configuration: sizes and options of a decoder, from a Hugging Face `config.json`."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zerosearch_jax.errors import UserError

FAMILIES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3's frequency scaling, which stretches long wavelengths by `factor`."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and options of a decoder-only transformer (Llama, SmolLM2, Qwen2.5, Qwen3).

    Attributes:
      family: Hugging Face's `model_type`; a key of `FAMILIES`.
      qkv_bias: the query, key and value projections have a bias (Qwen2).
      qk_norm: queries and keys pass an RMS norm over `head_dim` (Qwen3).
      max_positions: longest sequence that the model supports, in tokens.

    Raises:
      UserError: the family is unknown, or the query heads cannot share the key-value heads evenly.
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
        if self.family not in FAMILIES:
            raise UserError(
                f"model_type {self.family!r} is not supported; use one of {', '.join(FAMILIES)}"
            )
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"{self.num_heads} query heads are not divisible by {self.num_kv_heads} "
                "key-value heads; fix num_attention_heads or num_key_value_heads"
            )


def read_config(directory: str | Path) -> ModelConfig:
    """Reads `config.json` of a Hugging Face model directory.

    Raises:
      UserError: the directory, the file or one of its keys is missing; or the architecture, or
        an option such as sliding-window attention, is not supported.
    """
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise UserError(
            f"{directory} holds no config.json; give a Hugging Face model directory (the head of "
            "the config file names the command that makes one; `make smollm2` makes "
            "models/smollm2-135m)"
        )
    try:
        return from_hf(json.loads(path.read_text()))
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not JSON ({error}); fetch the model again") from error
    except KeyError as error:
        raise UserError(f"{path} lacks the key {error}; fetch the model again") from error
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def from_hf(hf: dict[str, Any]) -> ModelConfig:
    """Returns the `ModelConfig` of a parsed `config.json`.

    Raises:
      UserError: the architecture or one of its options is not supported.
      KeyError: a key is missing.
    """
    family = hf.get("model_type", "(none)")
    if family not in FAMILIES:
        raise UserError(f"model_type {family!r} is not supported; use one of {', '.join(FAMILIES)}")
    if hf.get("use_sliding_window"):
        raise UserError("use_sliding_window=true is not supported; only full attention is")
    if hf.get("hidden_act", "silu") != "silu" or hf.get("mlp_bias"):
        raise UserError(
            f"hidden_act={hf.get('hidden_act', 'silu')!r} with mlp_bias={bool(hf.get('mlp_bias'))} "
            "is not supported; only the SiLU-gated MLP without bias is"
        )
    bias = bool(hf.get("attention_bias", False))
    if bias and family != "qwen2":
        raise UserError(f"attention_bias is not supported for {family}")
    # transformers 5 nests rope_theta in rope_parameters; older files have two separate keys.
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    return ModelConfig(
        family=family,
        vocab_size=hf["vocab_size"],
        embed_dim=hf["hidden_size"],
        mlp_dim=hf["intermediate_size"],
        num_layers=hf["num_hidden_layers"],
        num_heads=hf["num_attention_heads"],
        num_kv_heads=hf.get("num_key_value_heads") or hf["num_attention_heads"],
        head_dim=hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"],
        rope_theta=float(rope.get("rope_theta") or hf.get("rope_theta", 10_000.0)),
        norm_eps=hf["rms_norm_eps"],
        tie_embeddings=bool(hf.get("tie_word_embeddings", False)),
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
        max_positions=hf["max_position_embeddings"],
        rope_scaling=_rope_scaling(rope),
    )


def _rope_scaling(rope: dict[str, Any]) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise UserError(f"rope scaling {kind!r} is not supported; only 'llama3' is")
    return RopeScaling(
        factor=rope["factor"],
        low_freq_factor=rope["low_freq_factor"],
        high_freq_factor=rope["high_freq_factor"],
        original_max_positions=rope["original_max_position_embeddings"],
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
