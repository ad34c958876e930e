"""Tests run on the CPU, which plays eight devices so that sharding can be tested anywhere."""

import json
import os
from pathlib import Path

# Read by jax when it is imported, so they must stand before any test module's imports.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
).strip()

# ruff: noqa: E402  (jax reads the environment when it is imported)
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from zerosearch_jax.models.config import ModelConfig
from zerosearch_jax.models.transformer import init_params
from zerosearch_jax.models.weights import save_params
from zerosearch_jax.text import prompts
from zerosearch_jax.text.tokenizer import encode, train_tokenizer

TOKENIZER_TEXTS = [
    "<think> The capital of Chad is N'Djamena. </think>\n<search> capital of Chad </search>",
    "\n\n<information>Doc 1: Chad lies in Africa.\nDoc 2: 1234 metres.</information>\n\n",
    "<answer> N'Djamena </answer> Which is the question? Answer the given question. Beijing",
] * 3


@pytest.fixture(autouse=True)
def _compilation_cache_stays():
    """A command that is run in the test's process sets it for its own workdir."""
    import jax

    directory = jax.config.jax_compilation_cache_dir
    yield
    jax.config.update("jax_compilation_cache_dir", directory)


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory):
    """A byte-level BPE of at most 320 ids; every byte is an id of its own."""
    from zerosearch_jax.text.tokenizer import train_tokenizer

    return train_tokenizer(TOKENIZER_TEXTS, 320, tmp_path_factory.mktemp("tiny-tokenizer"))


@pytest.fixture(scope="session")
def tiny_config():
    """A two-layer decoder whose every dimension divides by two."""
    from zerosearch_jax.models.config import ModelConfig

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
    """Stacked parameters, large enough that tokens matter to each other."""
    import jax

    from zerosearch_jax.models.transformer import init_params

    return jax.jit(lambda: jax.tree.map(lambda x: 2.0 * x, init_params(tiny_config, 0)))()


ROOT = Path(__file__).parents[1]

# What follows what: the next piece and how likely it is. All other pieces are followed by "<".
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


@pytest.fixture(scope="session")
def _programs(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("programs")


@pytest.fixture(scope="module")
def compiled_once(_programs):
    """In modules that use this, what one run compiled the next one reads from the disk."""
    changes = dict(
        jax_compilation_cache_dir=str(_programs), jax_persistent_cache_min_compile_time_secs=0.0
    )
    before = {name: getattr(jax.config, name) for name in changes}
    for name, value in changes.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()  # it asks for the directory once
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="session")
def markov_model(tmp_path_factory) -> Path:
    """A Hugging Face directory of a policy that follows `CHAIN`, with random layers on top.

    Its embedding tells the pieces of `CHAIN` apart and its unembedding holds the log-odds, so
    turns of all kinds occur: searches, answers, malformed ones.
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
    # The layers only whisper; the final norm makes the largest entry of a hidden state √width.
    params["embedding"][...] = jnp.asarray(20.0 * embedding)
    params["unembed"][...] = jnp.asarray(unembed / np.sqrt(width))
    save_params(directory, params, config, eos_token_id=tokenizer.eos_token_id)
    return directory


@pytest.fixture(scope="session")
def questions(tmp_path_factory) -> Path:
    """A FlashRAG file of 12 questions whose answers the policy may hit by chance."""
    path = tmp_path_factory.mktemp("questions") / "questions.jsonl"
    rows = [
        {"id": f"q{i}", "question": f"Which country is number {i}?", "golden_answers": [answer]}
        for i, answer in enumerate(["Chad", "Peru"] * 6)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def rl_config(tmp_path_factory, markov_model, questions) -> Path:
    """A config file: configs/grpo.py with sizes for seconds, three steps, everything in each."""
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
