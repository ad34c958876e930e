"""The learner benchmark: peers compute the same updates, and its measurements are correct."""

import json
import re
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zerosearch_jax import config_flags
from zerosearch_jax.benchmarks import decode, learner, run_peers
from zerosearch_jax.data.packing import pack
from zerosearch_jax.errors import UserError
from zerosearch_jax.models.config import from_hf, read_config
from zerosearch_jax.models.transformer import init_params, param_shardings
from zerosearch_jax.models.weights import load_params
from zerosearch_jax.parallel.mesh import make_mesh
from zerosearch_jax.rl.learner import Learner
from zerosearch_jax.rl.logprobs import chunked_logprobs
from zerosearch_jax.text.tokenizer import load_tokenizer
from zerosearch_jax.training import factory

ROOT = Path(__file__).parents[2]
TOKENS = 24


@pytest.fixture
def config():
    """configs/bench.py:learner with sizes that run in seconds."""
    config = config_flags.load(f"{ROOT / 'configs' / 'bench.py'}:learner")
    config.update(
        repeats=2,
        batch=dict(rows=4, tokens=TOKENS, prompt_tokens=6, micro_rows=(1, 2)),
        step=dict(questions=2, group_size=2, prompt_tokens=8, new_tokens=6),
        packing=dict(model=str(ROOT / config.packing.model), episodes=6, rows=2),
        model=str(ROOT / config.packing.model),
        learner=dict(remat="none"),  # compiles faster
    )
    return config


@pytest.fixture(scope="module")
def tiny():
    """A random one-layer model for the tiny policy's tokenizer."""
    sizes = from_hf(
        dict(
            model_type="qwen3", vocab_size=1536, hidden_size=16, intermediate_size=24,
            num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
            rms_norm_eps=1e-6, tie_word_embeddings=True, max_position_embeddings=64,
        )
    )  # fmt: skip
    tokenizer = load_tokenizer(ROOT / "zerosearch_jax" / "assets" / "policy")
    params = jax.jit(lambda: init_params(sizes, 0))()
    return factory.Model(
        sizes, jax.device_put(params, param_shardings(params, make_mesh())), tokenizer, {}
    )


def llama(directory):
    """Writes a tiny random Llama with transformers; returns our model with the same weights."""
    torch = pytest.importorskip("torch")
    import transformers

    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=96,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            tie_word_embeddings=True,
        )
    )
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.3 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5
            parameter.add_(scale * torch.randn_like(parameter))
    model.save_pretrained(directory)
    sizes = read_config(directory)
    return factory.Model(sizes, load_params(directory, sizes, make_mesh()), None, {})


def test_torch_computes_the_same_updates(config, tmp_path):
    """The four losses differ so much that clip, KL, entropy, norm clip and decay all matter."""
    model = llama(tmp_path)
    config.optimizer.update(learning_rate=0.02, weight_decay=0.5, clip_norm=0.1)
    updater = learner.Updater(model, config, "float32")
    sequences = updater.on_policy(learner.random_sequences(config.batch, 96), TOKENS)
    peer = run_peers.TorchUpdater(
        tmp_path, dtype="float32", threads=1, **learner.peer_settings(config)
    )
    batch = pack(sequences, row_tokens=TOKENS, rows=4, microbatches=1)
    arrays = {name: array[0] for name, array in batch.arrays().items() if array.ndim}
    device = updater.put(sequences, TOKENS, 2, 4)
    ours = [updater.update(device)[1] for _ in range(4)]
    theirs = [peer.update(arrays, micro_rows)[1] for micro_rows in (1, 2, 4, 3)]
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)
    assert np.ptp(ours) > 0.1
    # Only updates after the first have a KL and a ratio. bfloat16 changes the loss a little.
    coarse = run_peers.TorchUpdater(
        tmp_path, dtype="bfloat16", threads=1, **learner.peer_settings(config)
    )
    loss = coarse.update(arrays, 4)[1]
    assert 0 < abs(loss - ours[0]) < 0.02


def test_padding_changes_only_the_time(config, tiny):
    rng = np.random.default_rng(0)
    sequences = []
    for length in (20, 3, 11, 24, 7):
        tokens = rng.integers(0, tiny.config.vocab_size, length).tolist()
        mask = rng.integers(0, 2, length).astype(float)
        columns = {
            "old_logprobs": rng.normal(-7.3, 0.3, length),
            "advantages": rng.normal(size=length),
            "weights": rng.random(length),
        }
        sequences.append(learner.sequence_of(tokens, mask, **columns))
    updater = learner.Updater(tiny, config, "float32")
    alone = [learner.padded(sequence, TOKENS) for sequence in sequences]
    batches = [updater.put(each, TOKENS, 1, 5) for each in (sequences, alone)]
    assert [int(batch.num_microbatches) for batch in batches] == [3, 5]
    assert [int(batch.segment_ids.max()) for batch in batches] == [2, 1]
    losses, params = [], []
    for batch in batches:
        updater.state = updater.learner.init(tiny.params)
        losses.append(updater.update(batch)[1])
        params.append(jax.tree.leaves(updater.state.params))
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    for one, other in zip(*params, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=2e-6)


def test_episodes_are_transcripts_that_fit_a_row(config):
    sizes = config.packing
    tokenizer = load_tokenizer(sizes.model)
    episodes = learner.episodes(tokenizer, sizes)
    lengths = [len(episode.tokens) for episode in episodes]
    assert len(lengths) == 6 and len(set(lengths)) > 1 and max(lengths) <= sizes.row_tokens
    own = [t for t, m in zip(episodes[0].tokens, episodes[0].mask, strict=True) if m]
    assert tokenizer.decode(own).startswith("<think>")
    assert "<answer>" in tokenizer.decode(own)
    assert "<information>" not in tokenizer.decode(own)


def test_update_flops_match_xlas_count(config):
    """One layer, chunk of logits and micro-batch each, because XLA counts a loop's body once."""
    sizes = from_hf(
        dict(
            model_type="llama", vocab_size=512, hidden_size=128, intermediate_size=320,
            num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
            rms_norm_eps=1e-6, tie_word_embeddings=True, max_position_embeddings=128,
        )
    )  # fmt: skip
    config.learner.remat = "full"
    model = factory.Model(sizes, jax.jit(lambda: init_params(sizes, 0))(), None, {})
    updater = learner.Updater(model, config, "float32")
    columns = dict.fromkeys(("old_logprobs", "advantages", "weights"), np.zeros(128))
    sequence = learner.sequence_of(range(128), np.ones(128), **columns)
    batch = updater.put([sequence] * 4, 128, 4, 4)

    def update(state, reference, batch):
        scores = updater.learner.logprobs(reference, batch)
        return updater.learner.rl_step(
            state, replace(batch, ref_logprobs=scores), objective=learner.OBJECTIVE, kl_coef=0.1
        )

    counted = jax.jit(update).lower(updater.state, updater.reference, batch).cost_analysis()
    # In a row of one block each token is scored against all keys, masked ones included.
    flops = 4 * 128 * learner.forward_flops(sizes, attended=128)
    assert counted["flops"] == pytest.approx(learner.DONE_PASSES * flops, rel=0.1)


def test_forward_flops_match_a_hand_count():
    config = from_hf(
        dict(
            model_type="llama", vocab_size=10, hidden_size=4, intermediate_size=8,
            num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1, head_dim=2,
            rms_norm_eps=1e-6, tie_word_embeddings=True, max_position_embeddings=64,
        )
    )  # fmt: skip
    weights = 3 * (4 * 4 + 4 * 2 + 4 * 2 + 4 * 4 + 3 * 4 * 8) + 4 * 10
    assert learner.forward_flops(config, 2.5) == 2 * weights + 3 * 2 * (2 * 2 * 2 * 2.5)


def test_chunked_logprobs_equal_whole_logits_and_need_less_memory():
    rng = np.random.default_rng(0)
    hidden, unembed = rng.normal(size=(1, 12, 8)), rng.normal(size=(8, 40))
    arguments = (jnp.float32(hidden), jnp.float32(unembed), jnp.arange(12)[None] * 3)
    for one, other in zip(
        learner.whole_logprobs(*arguments),
        chunked_logprobs(*arguments, chunk=5),
        strict=True,
    ):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)
    logits = 128 * 4096 * 4  # bytes
    sizes = dict(
        model_type="llama", vocab_size=4096, hidden_size=16, intermediate_size=16,
        num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1, rms_norm_eps=1e-6,
        tie_word_embeddings=True, max_position_embeddings=256,
    )  # fmt: skip
    config = config_flags.load(f"{ROOT / 'configs' / 'bench.py'}:learner")
    with config.unlocked():
        config.memory = dict(tokens=128, logprob_chunk=16, model=sizes)
    (row,) = learner.memory(config)
    assert row.peer[0] < logits < row.ours[0]
    assert row.as_dict()["ratio"] > 3


def test_step_request_has_all_keys_that_peer_scripts_read(config, monkeypatch):
    requests = []

    def answer(python, script, request):
        requests.append((python, script, request))
        return {"step_secs": [2.0, 4.0, 3.0], "version": "1"}

    monkeypatch.setattr(run_peers, "subprocess_peer", answer)
    monkeypatch.setattr(learner, "step_secs", lambda *_: [1.0, 1.0, 1.5])
    config.peers.update(trl_python="one", tunix_python="other")
    rows = list(learner.steps(config))
    assert [(row.name, row.as_dict()["ratio"]) for row in rows] == [
        ("GRPO step / TRL", 3.0),
        ("GRPO step / Tunix", 3.0),
    ]
    for (python, script, request), expected in zip(requests, ("one", "other"), strict=True):
        assert python == expected
        read = set(re.findall(r'request\["(\w+)"\]', script.read_text()))
        assert read >= {"prompts", "group_size", "new_tokens", "repeats"}
        assert read <= json.loads(json.dumps(request)).keys()
        assert request["micro_rows"] % request["group_size"] == 0


def test_peer_without_an_interpreter_is_reported_and_skipped(config, monkeypatch, capsys):
    monkeypatch.setattr(learner, "step_secs", lambda *_: [1.0, 1.5])
    assert list(learner.steps(config)) == []
    out = capsys.readouterr().out
    assert "GRPO step: 1.0, 1.5 s" in out
    assert "TRL: not run" in out and "Tunix: not run" in out


def test_steps_learn_from_their_own_samples(config, tiny, monkeypatch):
    """Each step is on-policy: the learner's log-probs equal the sampler's."""
    config.step.micro_rows.ours = 2
    config.optimizer.learning_rate = 0.01
    seen = []

    def rl_step(self, state, batch, **options):
        state, metrics = original(self, state, batch, **options)
        seen.append((int(batch.mask.sum()), float(metrics["sampler_logprob_diff_max"])))
        return state, metrics

    original = Learner.rl_step
    monkeypatch.setattr(Learner, "rl_step", rl_step)
    prompts = learner.stretches(tiny.tokenizer, 2, 8)
    assert len(learner.step_secs(tiny, prompts, config)) == 2
    assert [tokens for tokens, _ in seen] == [4 * 6] * 3
    assert max(difference for _, difference in seen) < 1e-4


def test_prompts_survive_decoding_and_encoding(config):
    tokenizer = load_tokenizer(config.packing.model)
    prompts = learner.stretches(tokenizer, 5, 24)
    assert [len(prompt) for prompt in prompts] == [24] * 5
    assert len({tuple(prompt) for prompt in prompts}) == 5
    for prompt in prompts:
        assert tokenizer(tokenizer.decode(prompt))["input_ids"] == prompt


def test_fastest_ignores_the_first_update():
    seconds = {1: [9.0, 3.0], 2: [1.0, 5.0], 4: [8.0, 2.0]}
    assert learner.fastest(lambda n: (seconds[n].pop(0), 0.0), (1, 2, 4)) == 4


def test_missing_peak_is_named():
    with pytest.raises(UserError, match="--config.peak_tflops=989"):
        learner.mfu(config_flags.load(f"{ROOT / 'configs' / 'bench.py'}:learner-gpu"))


def test_peer_scripts_say_how_to_make_their_environments():
    for name in ("trl_step.py", "tunix_step.py"):
        text = (decode.PEERS / name).read_text()
        assert re.search(r"pip install \S+==\S+", text)
