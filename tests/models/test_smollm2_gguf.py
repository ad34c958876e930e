"""Tests the GGUF conversion on synthetic values, and on the real model if it is present."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from zerosearch_jax.errors import UserError
from zerosearch_jax.models.config import read_config
from zerosearch_jax.models.kv_cache import empty_cache
from zerosearch_jax.models.smollm2_gguf import hf_name, read_metadata, unpermute, write_tokenizer
from zerosearch_jax.models.transformer import abstract_model
from zerosearch_jax.models.weights import load_params
from zerosearch_jax.parallel.mesh import make_mesh
from zerosearch_jax.text.tokenizer import decode, encode, encode_prompt, load_tokenizer, token_bytes

MODEL = Path(__file__).parents[2] / "models" / "smollm2-135m"
PROMPTS = (
    "What is the capital of France?",
    "Write one sentence about the river Nile.",
    "Who wrote Hamlet?",
    "List three noble gases.",
    "What is 12 plus 30?",
)
NEW_TOKENS = 64
NEAR_TIE = 1e-3
META = {
    "general.architecture": "llama",
    "llama.attention.head_count": 2,
    "llama.attention.head_count_kv": 1,
    "llama.embedding_length": 8,
    "llama.feed_forward_length": 16,
    "llama.block_count": 1,
    "llama.rope.freq_base": 100000.0,
    "llama.attention.layer_norm_rms_epsilon": float(np.float32(1e-5)),
    "llama.context_length": 64,
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "a", "b", "ab", "1"],
    "tokenizer.ggml.token_type": [3, 3, 3, 1, 1, 1, 1],
    "tokenizer.ggml.merges": ["a b"],
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.unknown_token_id": 0,
    "tokenizer.ggml.padding_token_id": 2,
    "tokenizer.chat_template": "<|im_start|>{{ messages[-1]['content'] }}<|im_end|>",
}


def test_unpermute_restores_rotary_halves():
    # For one head of size 4, llama.cpp has Hugging Face's rows 0, 2, 1, 3.
    rows = np.array([0, 2, 1, 3, 4, 6, 5, 7])[:, None] * np.ones((1, 3))
    np.testing.assert_array_equal(unpermute(rows, 2)[:, 0], np.arange(8))


def test_hf_name_maps_gguf_names():
    assert hf_name("blk.11.attn_q.weight") == "model.layers.11.self_attn.q_proj.weight"
    assert hf_name("output_norm.weight") == "model.norm.weight"


def test_read_metadata_returns_the_config():
    config = read_metadata(META)
    assert config.norm_eps == 1e-5
    assert (config.head_dim, config.num_kv_heads, config.vocab_size) == (4, 1, 7)
    with pytest.raises(UserError, match="a qwen2 model"):
        read_metadata(META | {"general.architecture": "qwen2"})


def test_write_tokenizer_rebuilds_the_tokenizer(tmp_path):
    write_tokenizer(META, tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert encode(tokenizer, "aba11") == [5, 3, 6, 6]
    assert token_bytes(tokenizer) == [b"", b"", b"", b"a", b"b", b"ab", b"1"]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert encode_prompt(tokenizer, "ab") == [1, 5, 2]


@pytest.fixture(scope="module")
def real():
    """(config, parameters, tokenizer, torch model) of SmolLM2-135M."""
    pytest.importorskip("torch")
    if not (MODEL / "config.json").is_file():
        pytest.skip(f"{MODEL} does not exist; run `make smollm2`")
    from transformers import AutoModelForCausalLM

    config = read_config(MODEL)
    reference = AutoModelForCausalLM.from_pretrained(MODEL, attn_implementation="eager")
    return config, load_params(MODEL, config, make_mesh()), load_tokenizer(MODEL), reference.eval()


@pytest.mark.slow
def test_logits_of_the_real_model_agree_with_torch(real):
    import torch

    config, params, tokenizer, reference = real
    text = "Chad is a landlocked country in Africa. Its capital is N'Djamena, on 2 rivers. " * 8
    tokens = np.array([encode(tokenizer, text)])
    graphdef, _ = abstract_model(config)
    model = nnx.merge(graphdef, params)
    positions = jnp.arange(tokens.shape[1])[None]
    ours = model.logits(model(jnp.asarray(tokens), positions, jnp.zeros_like(positions)))
    with torch.no_grad():
        theirs = reference(torch.tensor(tokens)).logits.numpy()
    worst = np.abs(np.asarray(ours) - theirs).max()
    print(f"largest logit difference over {tokens.shape[1]} tokens: {worst:.2e}")
    assert worst <= 2e-3


def greedy(reference, ids):
    """Returns the reference's `NEW_TOKENS` greedy tokens after `ids`, past any end token."""
    import torch

    with torch.no_grad():
        output = reference.generate(
            torch.tensor([ids]),
            # Without a mask the <|im_end|> of the prompt would be masked as padding.
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=None,
        )
    return output[0, len(ids) :].tolist()


@pytest.mark.slow
def test_greedy_tokens_of_the_real_model_agree_with_torch(real, unstacked):
    """Decodes with the KV cache until the two best logits are closer than NEAR_TIE."""
    config, params, tokenizer, reference = real
    graphdef, _ = abstract_model(config, stacked=False)

    @jax.jit
    def step(params, tokens, at, cache):
        model = nnx.merge(graphdef, params)
        nothing = empty_cache(config, len(tokens), 0, jnp.float32)
        lengths = jnp.zeros(len(tokens), jnp.int32)
        hidden, cache = model.decode(tokens, nothing, lengths, cache, at)
        logits = model.logits(hidden)
        best = jax.lax.top_k(logits, 2)[0]
        return logits.argmax(-1), best[:, 0] - best[:, 1], cache

    prompts = [encode_prompt(tokenizer, prompt, system="") for prompt in PROMPTS]
    rows = [ids + greedy(reference, ids) for ids in prompts]
    slots = max(map(len, rows))
    tokens = np.array([row + [0] * (slots - len(row)) for row in rows])
    cache = empty_cache(config, len(rows), slots, jnp.float32)
    layered = unstacked(params, config.num_layers)
    choices, gaps = [], []
    for position in range(slots):
        choice, gap, cache = step(layered, jnp.asarray(tokens[:, position]), position, cache)
        choices.append(np.asarray(choice))
        gaps.append(np.asarray(gap))
    for i, (ids, row) in enumerate(zip(prompts, rows, strict=True)):
        here = slice(len(ids) - 1, len(row) - 1)
        wrong = np.array(choices)[here, i] != row[len(ids) :]
        tie = np.array(gaps)[here, i] < NEAR_TIE
        agreed = int(np.argmax(wrong | tie)) if (wrong | tie).any() else NEW_TOKENS
        text = decode(tokenizer, row[len(ids) :])
        print(f"{PROMPTS[i]} {agreed} of {NEW_TOKENS} tokens: {text!r}")
        assert agreed == NEW_TOKENS or tie[agreed], f"{PROMPTS[i]}: differs at {agreed}"
        assert agreed >= 8
