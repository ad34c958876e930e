"""Benchmark rows, engines and rollout variants; variants must differ only in time."""

import json
import sys
from dataclasses import fields, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from ml_collections import ConfigDict

from zerosearch_jax import config_flags
from zerosearch_jax.benchmarks import bench, decode, learner, rollout
from zerosearch_jax.benchmarks import config as bench_config
from zerosearch_jax.benchmarks.rollout import (
    LOCKSTEP,
    Features,
    LongDocuments,
    Mix,
    SlowService,
    TimedRollouts,
)
from zerosearch_jax.benchmarks.rows import Row, report
from zerosearch_jax.benchmarks.run_peers import subprocess_peer
from zerosearch_jax.errors import UserError
from zerosearch_jax.models.config import from_hf
from zerosearch_jax.models.transformer import init_params
from zerosearch_jax.rollout.scheduler import Limits
from zerosearch_jax.rollout.trajectory import Episode
from zerosearch_jax.search.engine import SearchRequest

ROOT = Path(__file__).parents[2]
GROUP = 3
EPISODES = [Episode(n, f"Which country is number {n // GROUP}?", ("Chad",)) for n in range(18)]


def test_names_repeated_in_the_config_are_those_of_the_suites():
    assert tuple(rollout.MIXES) == bench_config.MIXES
    assert tuple(rollout.VARIANTS) == bench_config.VARIANTS
    assert tuple(learner.PARTS) == bench_config.PARTS


def test_report_writes_medians_and_their_ratio(tmp_path, capsys):
    rows = [
        Row("one", [1.0, 9.0, 4.0], [2.0, 1.0, 30.0], "tokens/s"),
        Row("two", [1.0], [4.0], "GB/s"),
    ]
    report(rows, tmp_path / "new")
    assert json.loads((tmp_path / "new" / "bench.json").read_text()) == [
        {"name": "one", "ours": 4.0, "peer": 2.0, "unit": "tokens/s", "ratio": 2.0},
        {"name": "two", "ours": 1.0, "peer": 4.0, "unit": "GB/s", "ratio": 0.25},
    ]
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["one", "4", "2", "tokens/s", "2.00", "3"] in printed
    assert "ratio 2.00, 3 repeats" in str(rows[0])


@pytest.fixture(scope="module")
def rollouts_with(markov_model):
    """Runs all episodes with given features; returns the trajectories and prefilled tokens."""
    policy = ConfigDict(
        dict(
            model=str(markov_model),
            slots=4,
            lockstep_slots=18,
            prefill_rows=4,
            prefill_buckets=(64, 384),
            decode_rows=(2,),
            chunk_tokens=8,
            window_tokens=512,
        )
    )
    config = ConfigDict(dict(policy=policy, group_size=GROUP))
    engine = SlowService(LongDocuments((5, 12)), (0.0, 0.01))
    mix = Mix(EPISODES, Limits(4, 12, 60), 512, lambda features: engine, concurrent=2)

    def run(features):
        timed = TimedRollouts(mix, config, features)
        kept = []
        inner = timed.rollouts.run
        timed.rollouts.run = lambda *args: kept.append(inner(*args)) or kept[-1]
        timed.measure()
        assert len(timed.rates) == 1 and timed.rates[0] > 0
        return kept[0], timed.generator.prefilled_tokens

    return run


@pytest.mark.slow
def test_every_variant_samples_the_same_episodes(rollouts_with):
    ours, prefilled = rollouts_with(Features())
    assert sum(len(t.searches) for t in ours) >= 4
    assert max(len(t.turns) for t in ours) >= 3
    variants = [LOCKSTEP] + [replace(Features(), **{f.name: False}) for f in fields(Features)]
    counts = []
    for variant in variants:
        trajectories, tokens = rollouts_with(variant)
        assert [t.tokens for t in trajectories] == [t.tokens for t in ours]
        counts.append(tokens)
    lockstep, no_cache, no_sharing, no_refill, no_early, no_compact, no_overlap = counts
    assert no_early == no_compact == no_overlap == prefilled
    assert no_refill >= prefilled  # A batch of episodes may begin in the middle of a group.
    prompts = [t.by_policy.index(True) - 1 for t in ours]
    shared = sum(prompts[::GROUP])
    assert no_sharing == prefilled - shared + sum(prompts)
    # Every later turn prefills all earlier tokens again; in lockstep, for all episodes.
    assert lockstep > no_cache > prefilled
    # Without the cache alone, contexts with a common start still share it, so this prefills less.
    turns = max(len(t.turns) for t in ours)
    assert lockstep >= turns * sum(prompts)


def test_long_documents_depend_on_the_request_key_and_have_the_drawn_length():
    engine = LongDocuments((40, 50))
    request = SearchRequest(3, 1, "q", "Q?", ("A",))
    (first,), (again,) = engine.search([request]), engine.search([request])
    (other,) = engine.search([replace(request, turn=2)])
    assert first == again and first.documents != other.documents
    assert 40 <= sum(len(d.split()) for d in first.documents) < 50 + 60


def test_slow_service_takes_as_long_as_its_slowest_request(monkeypatch):
    slept = []
    monkeypatch.setattr(rollout.time, "sleep", slept.append)
    requests = [SearchRequest(n, 0, "q", "Q?", ("A",)) for n in range(20)]
    service = SlowService(LongDocuments((5, 12)), (0.3, 1.5))
    alone = [service.search([request]) for request in requests]
    assert all(0.3 <= seconds <= 1.5 for seconds in slept) and len(set(slept)) == 20
    assert service.search(requests) == [result for (result,) in alone]
    assert slept[-1] == max(slept[:-1])


def test_decode_flops_and_bytes_match_a_hand_count():
    """FLOPs: two per multiplied weight, and per layer four per cached token, head and its size."""
    from zerosearch_jax.models.config import ModelConfig

    config = ModelConfig(
        family="llama", vocab_size=10, embed_dim=4, mlp_dim=8, num_layers=3, num_heads=2,
        num_kv_heads=1, head_dim=2, rope_theta=1e4, norm_eps=1e-6, tie_embeddings=False,
        qkv_bias=False, qk_norm=False, max_positions=64,
    )  # fmt: skip
    weights = {"a": jax.ShapeDtypeStruct((100,), "float32")}
    model = decode.factory.Model(config, weights, None, {})
    sizes = ConfigDict(dict(prompt_tokens=6, new_tokens=4))
    assert decode.flops_per_token(model, sizes) == 2 * (100 - 40) + 4 * 8 * 3 * 2 * 2
    cache = 2 * 8 * 2 * 3 * 1 * 2 * 4  # rows, tokens, keys and values, layers, heads, size, bytes
    for int8, width in ((False, 4), (True, 1)):
        sizes.int8_weights = int8
        assert decode.bytes_per_step(model, 2, sizes) == width * (100 - 40) + cache


@pytest.fixture
def gpu_config():
    """The preset `decode-gpu` with small sizes and a model of 11,920 weights."""
    config = config_flags.load(f"{ROOT / 'configs' / 'bench.py'}:decode-gpu")
    with config.unlocked():
        config.models = dict(
            tiny=dict(
                model_type="qwen2", vocab_size=256, hidden_size=16, intermediate_size=64,
                num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, rope_theta=1e4,
                rms_norm_eps=1e-6, tie_word_embeddings=True, max_position_embeddings=64,
            )
        )  # fmt: skip
    config.update(repeats=2, slots=(1, 3), prompt_tokens=6, new_tokens=4)
    return config


@pytest.fixture
def gpu_model(gpu_config):
    config = from_hf(gpu_config.models.tiny.to_dict())
    return decode.factory.Model(config, init_params(config, 0, dtype=jnp.bfloat16), None, {})


def test_bytes_per_step_match_a_hand_count(gpu_config, gpu_model):
    """Two bytes per weight, plus in each row two bytes per cached key and value element."""
    attention = 2 * 16 * 16 + 2 * 16 * 8 + 16 + 2 * 8  # q and o, k and v, their biases
    weights = 256 * 16 + 16 + 2 * (attention + 3 * 16 * 64 + 2 * 16)
    cached = (6 + 4 / 2) * 2 * 2 * 2 * 4
    assert decode.bytes_per_step(gpu_model, 3, gpu_config) == 2 * (weights + 3 * cached)


def test_accelerator_decoding_is_compared_with_the_given_bandwidth(gpu_config):
    with pytest.raises(UserError, match="--config.peak_gb_per_s=3350"):
        decode.accelerator(gpu_config)
    gpu_config.peak_gb_per_s = 50.0
    gpu_config.torch_device = ""
    one, three = decode.accelerator(gpu_config)
    assert [one.name, three.name] == ["decode tiny 1 / bandwidth", "decode tiny 3 / bandwidth"]
    assert one.peer == [50.0] and len(one.ours) == 2 and min(one.ours) > 0


def test_transformers_decodes_the_same_random_model(gpu_config, gpu_model):
    pytest.importorskip("torch")
    gpu_config.update(peak_gb_per_s=50.0, slots=(3,), torch_device="cuda")
    with pytest.raises(UserError, match="torch sees no GPU"):
        decode.accelerator(gpu_config)
    gpu_config.torch_device = "cpu"
    ours, peer = decode.accelerator(gpu_config)
    assert peer.name == "decode tiny 3 / transformers" and len(peer.peer) == len(peer.ours) == 2
    per_token = decode.bytes_per_step(gpu_model, 3, gpu_config) / 3 / 1e9
    assert ours.ours == pytest.approx([rate * per_token for rate in peer.ours])


def test_missing_interpreter_or_suite_is_named(tmp_path):
    script = decode.PEERS / "tunix_decode.py"
    with pytest.raises(UserError, match="no-python"):
        subprocess_peer(tmp_path / "no-python", script, {})
    with pytest.raises(UserError, match="rollout, decode"):
        bench.run(ConfigDict(dict(suite="speed")), str(tmp_path))


def test_peer_script_answers_with_one_line_of_json(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        f"""# pip install nothing
import os, sys
sys.path.insert(0, {str(decode.PEERS)!r})
from respond import respond

def run(request):
    print("a library prints")
    return {{"cores": len(os.sched_getaffinity(0)), "prompts": request["prompts"]}}

respond(run)
"""
    )
    response = subprocess_peer(sys.executable, script, {"threads": 1, "prompts": [[1, 2]]})
    assert response == {"cores": 1, "prompts": [[1, 2]]}
