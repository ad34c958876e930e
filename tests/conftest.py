"""Tests run on the CPU, which plays eight devices so that sharding can be tested anywhere."""

import os

# Read by jax when it is imported, so they must stand before any test module's imports.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
).strip()

import pytest  # noqa: E402  (after the environment is set)

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
