"""Peer script: greedy decoding of a Llama-architecture model with llama.cpp.

It imports nothing of this project but `respond.py` next to it. llama.cpp is compiled for this
machine, which needs a C++ compiler and about ten minutes. Make the environment with

    python3.11 -m venv llamacppenv
    llamacppenv/bin/pip install --no-binary llama-cpp-python \\
        llama-cpp-python==0.3.36 gguf==0.19.0 safetensors==0.8.0

`run_peers.subprocess_peer` calls it with a JSON request on stdin; it prints one JSON line.

Request: model (Hugging Face directory, safetensors), prompts (one list of token ids per row), slots
(rows; prompts are repeated to fill them), new_tokens, repeats, dtype (of weights and KV cache:
float32 or bfloat16), threads.
Response: decode_secs and prefill_secs (seconds of each repeat), tokens (greedy ids of row 0),
version.

It calls llama.cpp's C functions. A step is one `llama_decode` with one token per row and an argmax
of each row's logits. Prefill calls `llama_decode` with as many prompt tokens as a batch holds.
"""

import json
import re
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # python -I leaves the script's folder out

from respond import respond  # noqa: E402

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


def ggml_type(dtype: str):
    """Returns ggml's type for a dtype."""
    import gguf

    return gguf.GGMLQuantizationType[{"float32": "F32", "bfloat16": "BF16"}[dtype]]


def write_gguf(directory: Path, dtype: str, out: Path) -> None:
    """Converts a Hugging Face directory to the GGUF file `out`: `dtype` matrices, float32 norms."""
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
    kind = ggml_type(dtype)
    with safe_open(directory / "model.safetensors", framework="numpy") as file:
        for name in file.keys():  # noqa: SIM118 (not a dict)
            weight = file.get_tensor(name).astype(np.float32)
            layer, part = re.fullmatch(r"(?:model\.layers\.(\d+)\.)?(.+)\.weight", name).groups()
            part = NAMES[part]
            if part in heads:  # llama.cpp rotates adjacent pairs, HF halves.
                halves = weight.reshape(heads[part], 2, -1, weight.shape[1])
                weight = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(weight.shape)
            own = kind if weight.ndim == 2 else gguf.GGMLQuantizationType.F32
            part = f"blk.{layer}.{part}.weight" if layer else f"{part}.weight"
            writer.add_tensor(part, gguf.quantize(weight, own), raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Model:
    """llama.cpp's model and a context with one sequence per row."""

    def __init__(self, path: Path, request: dict):
        import llama_cpp

        self.cpp = llama_cpp
        llama_cpp.llama_backend_init()
        options = llama_cpp.llama_context_default_params()
        longest = max(map(len, request["prompts"])) + request["new_tokens"] + 2
        options.n_seq_max = request["slots"]
        options.n_ctx = request["slots"] * (-(-longest // 256) * 256)
        options.n_threads = options.n_threads_batch = request["threads"]
        options.type_k = options.type_v = ggml_type(request["dtype"]).value
        self.batch_tokens = options.n_batch
        model = llama_cpp.llama_model_load_from_file(
            str(path).encode(), llama_cpp.llama_model_default_params()
        )
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        self.context = llama_cpp.llama_init_from_model(model, options)
        if not self.context:
            raise RuntimeError("llama.cpp made no context; its messages above say why")
        self.batch = llama_cpp.llama_batch_init(self.batch_tokens, 0, 1)

    def forget(self) -> None:
        """Empties all sequences."""
        self.cpp.llama_memory_clear(self.cpp.llama_get_memory(self.context), True)

    def feed(self, entries) -> list[int]:
        """Decodes (row, position, token, is_last) entries; returns the argmax after each last."""
        import numpy as np

        batch, last = self.batch, []
        for i, (row, position, token, is_last) in enumerate(entries):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, is_last
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, row
            if is_last:
                last.append(i)
        batch.n_tokens = len(entries)
        if self.cpp.llama_decode(self.context, batch):
            raise RuntimeError("llama_decode failed; llama.cpp's messages above say why")
        found = []
        for i in last:
            logits = self.cpp.llama_get_logits_ith(self.context, i)
            found.append(int(np.argmax(np.ctypeslib.as_array(logits, (self.vocabulary,)))))
        return found


def run(request: dict) -> dict:
    """Returns the response to a request; see the module's docstring."""
    import llama_cpp

    prompts = request["prompts"]
    rows = [prompts[row % len(prompts)] for row in range(request["slots"])]

    def prefill(model: Model) -> list[int]:
        entries = [
            (row, at, token, at == len(prompt) - 1)
            for row, prompt in enumerate(rows)
            for at, token in enumerate(prompt)
        ]
        size, tokens = model.batch_tokens, []
        for start in range(0, len(entries), size):
            tokens += model.feed(entries[start : start + size])
        return tokens

    decode_secs, prefill_secs = [], []
    with tempfile.TemporaryDirectory() as folder:
        write_gguf(Path(request["model"]), request["dtype"], Path(folder) / "model.gguf")
        model = Model(Path(folder) / "model.gguf", request)
        for _ in range(request["repeats"] + 1):
            model.forget()
            start = time.perf_counter()
            tokens = prefill(model)
            prefill_secs.append(time.perf_counter() - start)
            first = [tokens[0]]
            start = time.perf_counter()
            for step in range(request["new_tokens"]):
                tokens = model.feed(
                    [(row, len(rows[row]) + step, token, True) for row, token in enumerate(tokens)]
                )
                first.append(tokens[0])
            decode_secs.append(time.perf_counter() - start)
    return {
        "decode_secs": decode_secs[1:],
        "prefill_secs": prefill_secs[1:],
        "tokens": first[: request["new_tokens"]],
        "version": llama_cpp.__version__,
    }


if __name__ == "__main__":
    respond(run, limit_cores=False)  # llama.cpp has an option for its threads
