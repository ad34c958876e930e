"""Tests the union of the end-of-text ids of a model directory, and its way through an export."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zerosearch_jax.errors import UserError
from zerosearch_jax.models.config import from_hf, to_hf
from zerosearch_jax.models.generation_config import read_generation_config
from zerosearch_jax.models.transformer import abstract_model
from zerosearch_jax.models.weights import save_params
from zerosearch_jax.parallel.mesh import make_mesh
from zerosearch_jax.text.tokenizer import load_tokenizer, train_tokenizer
from zerosearch_jax.training import factory
from zerosearch_jax.training.sections import GeneratorConfig

SIZES = dict(
    model_type="llama", vocab_size=300, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
    num_attention_heads=2, num_key_value_heads=1, rms_norm_eps=1e-5, max_position_embeddings=64,
    tie_word_embeddings=True,
)  # fmt: skip


def write(directory, generation, config):
    """Writes the two files; None leaves one out."""
    for name, content in (("generation_config.json", generation), ("config.json", config)):
        if content is not None:
            (directory / name).write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("generation", "config", "tokenizer", "expected"),
    [
        (None, {}, 2, [2]),
        (None, {"eos_token_id": 1}, 2, [1, 2]),
        (None, {"eos_token_id": [1, 0]}, None, [0, 1]),
        ({"eos_token_id": [5, 3, 5]}, {"eos_token_id": None}, 3, [3, 5]),
        ({"eos_token_id": 5}, {"eos_token_id": [7, 6]}, 4, [4, 5, 6, 7]),
        ({"temperature": 0.6}, None, 9, [9]),
    ],
)
def test_end_ids_are_the_union_of_all_three_files(
    tmp_path, generation, config, tokenizer, expected
):
    write(tmp_path, generation, config)
    assert read_generation_config(tmp_path, tokenizer, 10)["eos_token_id"] == expected


@pytest.mark.parametrize(
    ("generation", "config", "tokenizer", "message"),
    [
        ({"eos_token_id": [3, 10]}, {}, 3, "generation_config.json: .* 10 .* 10 token ids"),
        (None, {"eos_token_id": -1}, 3, "config.json: .* -1 "),
        (None, {"eos_token_id": "</s>"}, 3, "config.json: .*'</s>'"),
        ({"eos_token_id": True}, {}, 3, "generation_config.json: .* True"),
        (None, {}, 12, "tokenizer_config.json: .* 12 "),
        ({"eos_token_id": []}, {}, None, "names no end-of-text token"),
        ([3], {}, 3, "generation_config.json: expected an object"),
        ({"eos_token_id": [[3]]}, {}, 3, "generation_config.json: .*\\[3\\]"),
        ({"eos_token_id": {"a": 3}}, {}, 3, "generation_config.json: .*'a'"),
        ({"eos_token_id": 3.0}, {}, 3, "generation_config.json: .* 3.0 "),
        ({"pad_token_id": "<pad>"}, {}, 3, "pad_token_id is '<pad>'"),
        ({}, {"bos_token_id": [1]}, 3, "bos_token_id is \\[1\\]"),
    ],
)
def test_end_ids_outside_the_vocabulary_or_absent_are_refused(
    tmp_path, generation, config, tokenizer, message
):
    write(tmp_path, generation, config)
    with pytest.raises(UserError, match=message):
        read_generation_config(tmp_path, tokenizer, 10)


def test_settings_of_the_base_are_kept(tmp_path):
    write(
        tmp_path,
        {"do_sample": True, "temperature": 0.6, "pad_token_id": 8, "_from_model_config": True},
        {"bos_token_id": 7, "pad_token_id": 6, "eos_token_id": 5},
    )
    assert read_generation_config(tmp_path, None, 10) == dict(
        do_sample=True, temperature=0.6, pad_token_id=8, bos_token_id=7, eos_token_id=[5]
    )


@pytest.fixture(scope="module")
def instruct(tmp_path_factory):
    """A directory like Llama 3's: of three end-of-text ids, the tokenizer has one."""
    directory = tmp_path_factory.mktemp("instruct")
    tokenizer = train_tokenizer(["a b"], 257, directory)
    names = ["<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"]
    tokenizer.add_tokens(names, special_tokens=True)
    tokenizer.eos_token = "<|eot_id|>"
    tokenizer.save_pretrained(directory)
    config = from_hf(SIZES)
    noise = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(noise.standard_normal(leaf.shape).astype(np.float32)),
        abstract_model(config)[1],
    )
    ids = tokenizer.convert_tokens_to_ids(names)
    save_params(directory, params, config, generation={"eos_token_id": ids, "top_p": 0.9})
    (directory / "config.json").write_text(json.dumps(to_hf(config) | {"eos_token_id": ids[0]}))
    return directory, ids


def test_an_export_ends_texts_at_the_same_ids(instruct, tmp_path):
    directory, ids = instruct
    model = factory.load_model(str(directory), make_mesh(), "float32")
    save_params(tmp_path, model.params, model.config, generation=model.generation)
    model.tokenizer.save_pretrained(tmp_path)
    again = factory.load_model(str(tmp_path), make_mesh(), "float32")
    assert again.end_ids == model.end_ids == ids
    assert again.generation == model.generation
    assert again.generation["top_p"] == 0.9
    # A server may read only config.json.
    assert json.loads((tmp_path / "config.json").read_text())["eos_token_id"] == ids
    assert load_tokenizer(tmp_path).eos_token_id == ids[2]


def test_the_generator_gets_every_end_id(instruct, monkeypatch):
    directory, ids = instruct
    made = {}

    class Recorder:
        def __init__(self, config, **options):
            made.update(options)

        def load(self, params):
            pass

    monkeypatch.setattr(factory, "Generator", Recorder)
    settings = GeneratorConfig(
        slots=1, max_tokens=64, prefill_rows=1, prefill_buckets=(8,), decode_rows=(),
        chunk_tokens=1, window_tokens=64, dtype="float32", int8_weights=False,
    )  # fmt: skip
    model = factory.load_model(str(directory), make_mesh(), "float32")
    factory.make_generator(model, settings, make_mesh(), ("</search>",))
    assert made["end_ids"] == ids
