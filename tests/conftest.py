"""Shared fixtures. Tests run on eight simulated CPU devices, so that sharding is testable."""

import json
import os
import signal
from pathlib import Path

# jax reads these when it is imported, so they precede all other imports.
os.environ.setdefault("JAX_PLATFORMS", "cpu")  # tests/test_accelerator.py needs more
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
).strip()

# ruff: noqa: E402
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from zerosearch_jax.models.config import ModelConfig
from zerosearch_jax.models.transformer import init_params
from zerosearch_jax.models.weights import save_params
from zerosearch_jax.text import prompts
from zerosearch_jax.text.tokenizer import encode, load_tokenizer, train_tokenizer

# Jobs in the background start with SIGINT ignored, but the tests of Ctrl-C need it.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).parents[1]
TOKENIZER_TEXTS = [
    "<think> The capital of Chad is N'Djamena. </think>\n<search> capital of Chad </search>",
    "\n\n<information>Doc 1: Chad lies in Africa.\nDoc 2: 1234 metres.</information>\n\n",
    "<answer> N'Djamena </answer> Which is the question? Answer the given question. Beijing",
] * 3

# The Markov policy's transitions: piece -> next piece -> probability. "<" follows all other pieces.
CHAIN = {
    "<": {"search": 0.45, "answer": 0.55},
    "search": {">": 1.0},
    "answer": {">": 1.0},
    ">": {" Chad": 0.6, " Peru": 0.4},
    " Chad": {" </": 1.0},
    " Peru": {" </": 1.0},
    " </": {"search": 0.45, "answer": 0.55},
}
EPISODES = (
    "<search> Chad </search>",
    "<answer> Peru </answer>",
    "<search> Peru </search>",
    "<answer> Chad </answer>",
)


@pytest.fixture(autouse=True)
def _restore_compilation_cache():
    """Restores the compilation cache, which commands run in this process set to their workdir."""
    directory = jax.config.jax_compilation_cache_dir
    yield
    jax.config.update("jax_compilation_cache_dir", directory)


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory):
    """A byte-level BPE tokenizer of at most 320 ids, one of them for each byte."""
    return train_tokenizer(TOKENIZER_TEXTS, 320, tmp_path_factory.mktemp("tiny-tokenizer"))


@pytest.fixture(scope="session")
def thinking_tokenizer(tiny_tokenizer, tmp_path_factory):
    """The tiny tokenizer with a chat template that opens a thought, as DeepSeek-R1's."""
    directory = tmp_path_factory.mktemp("thinking-tokenizer")
    tiny_tokenizer.save_pretrained(directory)
    tokenizer = load_tokenizer(directory)
    tokenizer.chat_template = "{{ messages[-1].content }}<think>{{ '\n' }}"
    return tokenizer


@pytest.fixture(scope="session")
def tiny_config() -> ModelConfig:
    """A two-layer decoder with even dimensions, which shard over two devices."""
    return ModelConfig(
        family="qwen3",
        vocab_size=320,
        embed_dim=16,
        mlp_dim=32,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        rope_theta=10_000.0,
        norm_eps=1e-6,
        tie_embeddings=True,
        qkv_bias=False,
        qk_norm=True,
        max_positions=1024,
    )


@pytest.fixture(scope="session")
def tiny_params(tiny_config):
    """Parameters of `tiny_config`, doubled so that tokens influence each other clearly."""
    return jax.jit(lambda: jax.tree.map(lambda x: 2.0 * x, init_params(tiny_config, 0)))()


@pytest.fixture(scope="session")
def _compilation_cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("compilation-cache")


@pytest.fixture(scope="module")
def compiled_once(_compilation_cache):
    """Shares compiled programs on disk between the runs of all modules that use this fixture."""
    changes = dict(
        jax_compilation_cache_dir=str(_compilation_cache),
        jax_persistent_cache_min_compile_time_secs=0.0,
    )
    before = {name: getattr(jax.config, name) for name in changes}
    for name, value in changes.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()  # It reads the directory only once.
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="session")
def markov_model(tmp_path_factory) -> Path:
    """A Hugging Face directory of the Markov policy, which samples text by `CHAIN`.

    The embedding is one-hot over the pieces of `CHAIN` and the unembedding holds their
    log-probabilities; the random layers in between change little. Turns of all kinds occur:
    searches, answers and malformed turns.
    """
    directory = tmp_path_factory.mktemp("markov-model")
    question = "Which is the capital city of the country number 0123456789?"
    texts = [
        prompts.policy_prompt(question),
        prompts.simulator_prompt(question, "Chad", "Peru", True, "finetuned", 2),
        prompts.simulator_prompt(question, "Peru", "Chad", False, "finetuned", 2),
        prompts.INVALID_ACTION + prompts.information_block(prompts.NO_RESULTS),
        *EPISODES,
    ]
    tokenizer = train_tokenizer(texts * 4, 700, directory)
    ids = {piece: encode(tokenizer, piece) for piece in CHAIN}
    assert all(len(tokens) == 1 for tokens in ids.values()), ids
    width = len(CHAIN) + 1
    config = ModelConfig(
        family="qwen3",
        vocab_size=len(tokenizer),
        embed_dim=width,
        mlp_dim=16,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        rope_theta=10_000.0,
        norm_eps=1e-6,
        tie_embeddings=False,
        qkv_bias=False,
        qk_norm=True,
        max_positions=1024,
    )
    params = init_params(config, 0)
    embedding = np.zeros((len(tokenizer), width), np.float32)
    unembed = np.full((width, len(tokenizer)), -13.0, np.float32)
    embedding[:, -1] = 1.0
    unembed[-1, ids["<"]] = 0.0
    for row, (piece, followers) in enumerate(CHAIN.items()):
        embedding[ids[piece]] = np.eye(width)[row]
        for follower, probability in followers.items():
            unembed[row, ids[follower]] = np.log(probability)
    # A large embedding dominates the layers. The final norm scales its largest entry to √width.
    params["embedding"][...] = jnp.asarray(20.0 * embedding)
    params["unembed"][...] = jnp.asarray(unembed / np.sqrt(width))
    generation = {"eos_token_id": tokenizer.eos_token_id, "top_p": 0.9}
    save_params(directory, params, config, generation=generation)
    return directory


@pytest.fixture(scope="session")
def questions(tmp_path_factory) -> Path:
    """A FlashRAG file of 12 questions; the Markov policy answers some of them by chance."""
    path = tmp_path_factory.mktemp("questions") / "questions.jsonl"
    rows = [
        {"id": f"q{i}", "question": f"Which country is number {i}?", "golden_answers": [answer]}
        for i, answer in enumerate(["Chad", "Peru"] * 6)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def rl_config(tmp_path_factory, markov_model, questions) -> Path:
    """A config file: configs/grpo.py for seconds, with evaluation and checkpoint in all 3 steps."""
    generator = dict(
        slots=8, prefill_rows=8, decode_rows=(), chunk_tokens=8, int8_weights=False, dtype="float32"
    )
    changes = dict(
        checkpoint_every=1,
        data=dict(source=str(questions), eval_source=str(questions)),
        policy=dict(
            model=str(markov_model),
            generator=generator
            | dict(max_tokens=384, window_tokens=384, prefill_buckets=(64, 256)),
        ),
        search=dict(
            simulator=dict(
                model=str(markov_model),
                max_new_tokens=8,
                generator=generator
                | dict(max_tokens=288, window_tokens=288, prefill_buckets=(256,)),
            )
        ),
        rollout=dict(
            questions_per_step=2,
            group_size=4,
            max_turns=2,
            response_tokens=12,
            observation_tokens=48,
        ),
        rl=dict(steps=3),
        optimizer=dict(learning_rate=1e-2, warmup_steps=0),
        kl=dict(coef=0.001),
        learner=dict(row_tokens=384, rows=2),
        eval=dict(every=1, questions=4, test_questions=4),
    )
    path = tmp_path_factory.mktemp("config") / "tiny.py"
    path.write_text(
        "from zerosearch_jax import config_flags\n\n\n"
        "def get_config():\n"
        f"    config = config_flags.load({str(ROOT / 'configs' / 'grpo.py')!r})\n"
        f"    config.update({changes!r})\n"
        "    return config\n"
    )
    return path
