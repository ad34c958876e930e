"""Compares an accelerator with the CPU of the same machine.

Skipped without an accelerator. On a machine with an NVIDIA GPU:

  JAX_PLATFORMS=cuda,cpu python -m pytest tests/test_accelerator.py -s
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zerosearch_jax.data.packing import TokenSequence, pack
from zerosearch_jax.generate.generator import Generator
from zerosearch_jax.generate.sampling import Sampling
from zerosearch_jax.generate.stops import build_stop_table
from zerosearch_jax.models.attention import packed_attention
from zerosearch_jax.models.config import from_hf
from zerosearch_jax.models.fused_attention import cudnn_attention, kernel_for
from zerosearch_jax.models.transformer import init_params
from zerosearch_jax.parallel.mesh import make_mesh
from zerosearch_jax.rl.config import LossConfig
from zerosearch_jax.rl.learner import Learner
from zerosearch_jax.rl.objective import Objective
from zerosearch_jax.rl.optimizer import OptimizerSpec, adamw, warmup_cosine

pytestmark = pytest.mark.skipif(
    jax.default_backend() == "cpu", reason="no accelerator; see the docstring for the command"
)

CONFIG = from_hf(
    dict(
        model_type="qwen2", vocab_size=2048, hidden_size=256, intermediate_size=512,
        num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, rope_theta=1e4,
        rms_norm_eps=1e-6, tie_word_embeddings=True, max_position_embeddings=1024,
    )
)  # fmt: skip


def test_cudnn_attention_and_its_gradient_equal_float32_attention():
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [(2, 512, heads, 64) for heads in (8, 2, 2, 8)]
    q, k, v, weights = (jax.random.normal(key, s) for key, s in zip(keys, shapes, strict=True))
    segments = jnp.asarray(np.repeat([[1, 2, 3, 0], [1, 1, 2, 2]], [200, 56, 200, 56], axis=1))
    if kernel_for(jax.devices()[0], jnp.bfloat16, 64) != "cudnn":
        pytest.skip("this accelerator does not use cuDNN")
    weights = jnp.where((segments > 0)[..., None, None], weights, 0.0)

    def value_and_grad(attention, dtype):
        def loss(q, k, v):
            out = attention(q.astype(dtype), k.astype(dtype), v.astype(dtype), segments)
            return jnp.sum(weights * out.astype(jnp.float32))

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(q, k, v)

    mesh = make_mesh(devices=jax.devices()[:1])
    fused = value_and_grad(lambda *args: cudnn_attention(*args, mesh=mesh), jnp.bfloat16)
    with jax.default_matmul_precision("highest"):
        exact = value_and_grad(packed_attention, jnp.float32)
    for name, one, other in zip("qkv", fused[1], exact[1], strict=True):
        error = float(jnp.linalg.norm(one - other) / jnp.linalg.norm(other))
        print(f"gradient of {name}: relative error {error:.2e}")
        assert error < 0.02
    assert abs(float(fused[0] - exact[0])) < 0.01 * float(jnp.linalg.norm(weights))


def test_decoding_samples_from_the_learners_distribution():
    learner = make_learner(jax.devices()[:1], jnp.bfloat16)
    params = learner.policy(learner.init(init_params(CONFIG, 0)))
    generator = Generator(
        CONFIG, stop_table=build_stop_table([b""] * CONFIG.vocab_size, ()), end_ids=[], slots=8,
        max_tokens=192, mesh=learner.mesh, prefill_rows=8, prefill_buckets=(64,), chunk_tokens=64,
        window_tokens=64, dtype=jnp.bfloat16,
    )  # fmt: skip
    generator.load(params)
    prompts = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (8, 64)).tolist()
    generator.start(range(8), prompts)
    sampled = generator.decode(
        range(8), key=jax.random.key(0), streams=[(i, 0) for i in range(8)], max_new_tokens=128,
        sampling=Sampling(1.0),
    )  # fmt: skip
    sequences = [
        TokenSequence(prompt + one.tokens, [0] * 64 + [1] * 128, {})
        for prompt, one in zip(prompts, sampled, strict=True)
    ]
    batch = pack(sequences, row_tokens=192, rows=8, microbatches=1)
    found = batch.unpack(np.asarray(learner.logprobs(params, learner.put(batch))))
    difference = np.abs(found[:, 64:192] - np.array([one.logprobs for one in sampled]))
    print(f"|log-prob difference|: mean {difference.mean():.2e}, maximum {difference.max():.2e}")
    assert difference.mean() < 0.02


@pytest.mark.parametrize(("precision", "tolerance"), [("highest", 1e-4), ("default", 1e-2)])
def test_an_rl_step_equals_the_cpus(precision, tolerance):
    rng = np.random.default_rng(0)
    sequences = [
        TokenSequence(
            rng.integers(0, CONFIG.vocab_size, n).tolist(),
            [0] * 10 + [1] * (n - 10),
            {
                "old_logprobs": np.full(n, -7.6),
                "sampler_logprobs": np.full(n, -7.6),
                "ref_logprobs": np.full(n, -7.7),
                "advantages": np.full(n, advantage),
                "weights": np.full(n, 0.01),
                "correct": np.zeros(n),
            },
        )
        for n, advantage in ((100, 1.0), (60, -1.0), (120, 0.5))
    ]
    metrics = []
    for devices in (jax.devices()[:1], jax.devices("cpu")[:1]):
        learner = make_learner(devices, jnp.float32)
        with jax.default_matmul_precision(precision), jax.default_device(devices[0]):
            state = learner.init(init_params(CONFIG, 0))
            batch = learner.put(pack(sequences, row_tokens=128, rows=4, microbatches=1))
            objective = Objective(LossConfig(entropy=0.01))
            _, found = learner.rl_step(state, batch, objective=objective, kl_coef=0.01)
        metrics.append({name: float(value) for name, value in found.items()})
    for name in ("loss/total", "grad_norm", "kl", "entropy"):
        here, cpu = (one[name] for one in metrics)
        print(f"{precision} {name}: {here:.6g}, CPU {cpu:.6g}, relative {here / cpu - 1:.1e}")
        assert here == pytest.approx(cpu, rel=tolerance)


def make_learner(devices, dtype) -> Learner:
    schedule = warmup_cosine(1e-3, warmup_steps=0, total_steps=10, final_fraction=1.0)
    optimizer = adamw(schedule, beta1=0.9, beta2=0.99, weight_decay=0.0, clip_norm=1.0)
    return Learner(
        CONFIG, mesh=make_mesh(devices=devices), policy=OptimizerSpec(optimizer, schedule),
        compute_dtype=dtype, logprob_chunk=64,
    )  # fmt: skip
