"""Compares float32 logits with `transformers` on torch."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from zerosearch_jax.models.config import read_config
from zerosearch_jax.models.transformer import abstract_model
from zerosearch_jax.models.weights import load_params, save_params
from zerosearch_jax.parallel.mesh import make_mesh

torch = pytest.importorskip("torch")

KINDS = ("llama", "llama3", "qwen2", "qwen2-untied", "qwen3", "qwen3-untied")
TOLERANCE = 1e-4


def torch_logits(model, tokens):
    with torch.no_grad():
        return model(torch.tensor(tokens)).logits.float().numpy()


def our_logits(directory, tokens):
    config = read_config(directory)
    graphdef, _ = abstract_model(config)
    model = nnx.merge(graphdef, load_params(directory, config, make_mesh()))
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden = model(jnp.asarray(tokens), positions, jnp.zeros(tokens.shape, jnp.int32))
    return np.asarray(model.logits(hidden))


@pytest.mark.parametrize("kind", KINDS)
def test_logits_equal_transformers(hf_models, kind):
    directory, model = hf_models(kind)
    # Longer than the original length in Llama 3's rope scaling.
    tokens = np.random.default_rng(0).integers(0, 96, (2, 120))
    expected = torch_logits(model, tokens)
    assert expected.std() > 0.3, "logits too flat to tell models apart"
    np.testing.assert_allclose(our_logits(directory, tokens), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("kind", KINDS)
def test_an_export_loads_in_transformers_with_the_same_logits(hf_models, kind, tmp_path):
    from transformers import AutoModelForCausalLM

    directory, model = hf_models(kind)
    config = read_config(directory)
    generation = {"eos_token_id": [5, 7], "pad_token_id": 3, "do_sample": True, "top_k": 9}
    params = load_params(directory, config, make_mesh())
    save_params(tmp_path, params, config, generation=generation)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert read_config(tmp_path) == config
    assert exported.config.eos_token_id == [5, 7]
    assert exported.generation_config.to_dict().items() >= generation.items()
    assert exported.dtype == torch.float32
    tokens = np.random.default_rng(1).integers(0, 96, (1, 100))
    np.testing.assert_array_equal(torch_logits(exported, tokens), torch_logits(model, tokens))
