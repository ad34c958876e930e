"""Times greedy decoding of a Llama-architecture model with llama.cpp, through xllamacpp.

Stand-alone: it imports nothing of this project and runs in an environment of its own,

    python3.11 -m venv llamacppenv
    llamacppenv/bin/pip install xllamacpp==2026.10.11549 gguf==0.19.0 safetensors==0.8.0

and is called by `bench_peers.subprocess_peer`: JSON request on stdin, one JSON line on stdout.

Request: model (Hugging Face directory, safetensors), prompts (token ids, one list a row), slots
(rows; prompts are repeated to fill them), new_tokens, repeats, dtype (float32 or bfloat16, of
weights and KV cache), threads.
Response: decode_secs and prefill_secs (seconds of each repeat), tokens (greedy ids of row 0),
version.

The package offers llama.cpp's server only. All rows go into it as one request, so that they are
decoded as one batch; end of text is ignored, prompts are not cached. prefill_secs is that of a
request for one token, decode_secs that of one for new_tokens + 1, less the former. The wheel is
built for AVX2 and uses no AVX-512 or AMX.
"""

import json
import os
import re
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_gguf(directory: Path, dtype: str, out: Path) -> None:
    """The GGUF file `out` of a Hugging Face directory; matrices in `dtype`, norms in float32."""
    import gguf
    import numpy as np
    from safetensors import safe_open

    hf = json.loads((directory / "config.json").read_text())
    heads = {"attn_q": hf["num_attention_heads"], "attn_k": hf["num_key_value_heads"]}
    writer = gguf.GGUFWriter(out, "llama")
    writer.add_context_length(hf["max_position_embeddings"])
    writer.add_embedding_length(hf["hidden_size"])
    writer.add_block_count(hf["num_hidden_layers"])
    writer.add_feed_forward_length(hf["intermediate_size"])
    writer.add_head_count(heads["attn_q"])
    writer.add_head_count_kv(heads["attn_k"])
    writer.add_rope_freq_base(hf["rope_theta"])
    writer.add_layer_norm_rms_eps(hf["rms_norm_eps"])
    tokenizer = json.loads((directory / "tokenizer.json").read_text())
    special = {token["content"] for token in tokenizer["added_tokens"]}
    vocabulary = sorted(tokenizer["model"]["vocab"].items(), key=lambda item: item[1])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([piece for piece, _ in vocabulary])
    writer.add_token_types([3 if piece in special else 1 for piece, _ in vocabulary])
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])
    kind = gguf.GGMLQuantizationType[{"float32": "F32", "bfloat16": "BF16"}[dtype]]
    with safe_open(directory / "model.safetensors", framework="numpy") as file:
        for name in file.keys():  # noqa: SIM118 (not a dict)
            weight = file.get_tensor(name).astype(np.float32)
            layer, part = re.fullmatch(r"(?:model\.layers\.(\d+)\.)?(.+)\.weight", name).groups()
            part = NAMES[part]
            if part in heads:  # halves to neighbouring pairs: llama.cpp's order for rotation
                halves = weight.reshape(heads[part], 2, -1, weight.shape[1])
                weight = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(weight.shape)
            own = kind if weight.ndim == 2 else gguf.GGMLQuantizationType.F32
            part = f"blk.{layer}.{part}.weight" if layer else f"{part}.weight"
            writer.add_tensor(part, gguf.quantize(weight, own), raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def serve(path: Path, request: dict):
    """llama.cpp's server with one slot a row."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_parallel = request["slots"]
    longest = max(map(len, request["prompts"])) + request["new_tokens"] + 2
    params.n_ctx = request["slots"] * (-(-longest // 256) * 256)
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = request["threads"]
    cache = {"float32": "GGML_TYPE_F32", "bfloat16": "GGML_TYPE_BF16"}[request["dtype"]]
    params.cache_type_k = params.cache_type_v = getattr(xllamacpp.ggml_type, cache)
    return xllamacpp.Server(params)


def run(request: dict) -> dict:
    """The response to a request; see the module's docstring."""
    import xllamacpp

    prompts = request["prompts"]
    rows = [prompts[row % len(prompts)] for row in range(request["slots"])]

    def sample(count: int) -> tuple[float, list[int]]:
        """Seconds and row 0's tokens of a request for `count` tokens a row."""
        body = {"prompt": rows, "n_predict": count, "samplers": ["top_k"], "top_k": 1}
        body |= {"ignore_eos": True, "cache_prompt": False, "return_tokens": True}
        post = urllib.request.Request(f"{server.listening_address}/completion")
        start = time.perf_counter()
        with urllib.request.urlopen(post, json.dumps(body).encode()) as reply:
            results = json.load(reply)
        seconds = time.perf_counter() - start
        results = results if isinstance(results, list) else [results]
        return seconds, min(results, key=lambda result: result["index"])["tokens"]

    with tempfile.TemporaryDirectory() as folder:
        write_gguf(Path(request["model"]), request["dtype"], Path(folder) / "model.gguf")
        server = serve(Path(folder) / "model.gguf", request)
        sample(1), sample(request["new_tokens"] + 1)
        decode_secs, prefill_secs = [], []
        for _ in range(request["repeats"]):
            prefill, _ = sample(1)
            total, tokens = sample(request["new_tokens"] + 1)
            prefill_secs.append(prefill)
            decode_secs.append(total - prefill)
    return {
        "decode_secs": decode_secs,
        "prefill_secs": prefill_secs,
        "tokens": tokens[: request["new_tokens"]],
        "version": xllamacpp.__version__,
    }


def main() -> None:
    """Reads the request, prints the response."""
    os.environ["no_proxy"] = "127.0.0.1"
    stdout = os.dup(1)
    os.dup2(2, 1)  # llama.cpp may write to the standard output
    os.write(stdout, json.dumps(run(json.load(sys.stdin))).encode() + b"\n")


if __name__ == "__main__":
    main()
