"""Fixtures: tiny random models that `transformers` writes as Hugging Face directories."""

import jax
import pytest

from zerosearch_jax.models.transformer import join_layers, split_layers

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
KINDS = {
    "llama": ("llama", {"tie_word_embeddings": True}),
    "llama3": ("llama", {"tie_word_embeddings": False, "rope_parameters": LLAMA3_ROPE}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2-untied": ("qwen2", {"tie_word_embeddings": False}),
    # Qwen3's heads are together wider than the embedding.
    "qwen3": ("qwen3", {"tie_word_embeddings": True, "head_dim": 16}),
    "qwen3-untied": ("qwen3", {"tie_word_embeddings": False, "head_dim": 16}),
}


def make_hf_model(kind, seed=0):
    torch = pytest.importorskip("torch")
    import transformers

    family, options = KINDS[kind]
    classes = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
        "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
    }
    config_class, model_class = classes[family]
    config = config_class(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        rms_norm_eps=1e-6,
        attn_implementation="eager",
        **options,
    )
    torch.manual_seed(seed)
    model = model_class(config).eval()
    with torch.no_grad():
        # Constant parameters (ones, zeros) would hide swapped names, so all become random.
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            if parameter.ndim == 1:
                parameter.copy_(0.3 * noise + (0.0 if name.endswith("bias") else 1.0))
            else:
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)
    return model


@pytest.fixture(scope="session")
def hf_models(tmp_path_factory):
    """A function from a kind to its (directory, torch model); each is made once."""
    made = {}

    def get(kind):
        if kind not in made:
            directory = tmp_path_factory.mktemp(kind)
            model = make_hf_model(kind)
            model.save_pretrained(directory)
            made[kind] = (directory, model)
        return made[kind]

    return get


@pytest.fixture(scope="session")
def unstacked():
    """A function from stacked training parameters to the parameters of an unstacked model."""

    def unstack(params, num_layers):
        rest, layers = split_layers(params)
        return join_layers(rest, (_layer(layers, i) for i in range(num_layers)))

    return unstack


def _layer(layers, index):
    return jax.tree.map(lambda x: x[index], layers)
