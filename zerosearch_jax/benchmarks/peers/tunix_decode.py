"""Peer script: greedy decoding of a Llama-architecture model with Tunix's own sampler.

It imports nothing of this project but `respond.py` next to it. Make its environment with

    python3.11 -m venv tunixenv
    tunixenv/bin/pip install google-tunix==0.1.7 jax==0.10.2 flax==0.12.8

`run_peers.subprocess_peer` calls it with a JSON request on stdin; it prints one JSON line.

Request: model (Hugging Face directory, safetensors), prompts (one list of token ids per row, all of
one length), slots (rows; prompts are repeated to fill them), new_tokens, repeats, dtype, threads.
Response: decode_secs and prefill_secs (seconds of each repeat), tokens (greedy ids of row 0),
version.

It times whole calls of `Sampler`: prefill_secs is a call without steps, decode_secs is a call with
new_tokens steps minus prefill_secs. Tunix's prefill computes the logits of every prompt position;
for Llama no option avoids that.
"""

import functools
import importlib.metadata
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # python -I leaves the script's folder out

from respond import respond  # noqa: E402


class Ids:
    """Tokenizer for Tunix whose texts are JSON lists of token ids."""

    def encode(self, text: str) -> list[int]:
        return json.loads(text)

    def decode(self, ids: list[int]) -> str:
        return json.dumps(ids)

    def bos_id(self) -> int:
        return 0  # Falsy: Tunix then prepends nothing.

    def eos_id(self) -> int:
        return -1  # Never sampled, so that no row ends early.

    def pad_id(self) -> int:
        return -1  # The sampler masks every token equal to it, sampled ones too.


def load(directory: str, dtype: str):
    """Returns Tunix's Llama with the weights of a Hugging Face directory, and its config."""
    import jax.numpy as jnp
    from tunix.models.llama3 import model as llama
    from tunix.models.llama3 import params

    hf = json.loads((Path(directory) / "config.json").read_text())
    config = llama.ModelConfig(
        num_layers=hf["num_hidden_layers"],
        vocab_size=hf["vocab_size"],
        embed_dim=hf["hidden_size"],
        hidden_dim=hf["intermediate_size"],
        num_heads=hf["num_attention_heads"],
        head_dim=hf["head_dim"],
        num_kv_heads=hf["num_key_value_heads"],
        rope_theta=hf["rope_theta"],
        norm_eps=hf["rms_norm_eps"],
        weight_tying=hf["tie_word_embeddings"],
    )
    # Tunix 0.1.7 never reads config.rope_theta: its attention always uses 1,000,000.
    llama.apply_rope = functools.partial(llama.apply_rope, rope_theta=config.rope_theta)
    model = params.create_model_from_safe_tensors(directory, config, dtype=jnp.dtype(dtype))
    return model, config


def run(request: dict) -> dict:
    """Returns the response to a request; see the module's docstring."""
    from tunix.generate.sampler import CacheConfig, Sampler

    model, config = load(request["model"], request["dtype"])
    prompts, steps = request["prompts"], request["new_tokens"]
    length = len(prompts[0])
    if any(len(prompt) != length for prompt in prompts):
        sys.exit("all prompts must have the same length, because Tunix pads shorter ones")
    texts = [json.dumps(prompts[row % len(prompts)]) for row in range(request["slots"])]
    # Attention runs over the whole cache, so the cache is as short as possible.
    cache = CacheConfig(length + steps, config.num_layers, config.num_kv_heads, config.head_dim)
    sampler = Sampler(model, Ids(), cache)

    def sample(count: int) -> tuple[float, list[int]]:
        """Seconds and row 0's tokens of a call with `count` steps after its prefill."""
        start = time.perf_counter()
        out = sampler(texts, max_generation_steps=count, max_prompt_length=length, eos_tokens=[-1])
        return time.perf_counter() - start, [int(token) for token in out.tokens[0]]

    sample(0), sample(steps)  # These calls compile.
    decode_secs, prefill_secs = [], []
    for _ in range(request["repeats"]):
        prefill, _ = sample(0)
        total, tokens = sample(steps)
        prefill_secs.append(prefill)
        decode_secs.append(total - prefill)
    return {
        "decode_secs": decode_secs,
        "prefill_secs": prefill_secs,
        "tokens": tokens,
        "version": importlib.metadata.version("google-tunix"),
    }


if __name__ == "__main__":
    respond(run)
