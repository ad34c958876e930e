"""An RL step and its checkpoint give the same result on meshes of eight, four and one device."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from zerosearch_jax.checkpoints import Checkpoints
from zerosearch_jax.data.packing import TokenSequence, pack
from zerosearch_jax.errors import UserError
from zerosearch_jax.models.transformer import init_params
from zerosearch_jax.parallel.mesh import make_mesh
from zerosearch_jax.rl.config import LossConfig
from zerosearch_jax.rl.learner import Learner
from zerosearch_jax.rl.objective import Objective
from zerosearch_jax.rl.optimizer import OptimizerSpec, adamw, warmup_cosine
from zerosearch_jax.training.policy_update import with_weights

OBJECTIVE = Objective(LossConfig(clip_high=0.3, entropy=0.02), temperature=0.9)
EIGHT = ((2, 2, 2), (1, 8, 1), (1, 1, 8), (8, 1, 1))
FEWER = ((1, 1, 1), (2, 2, 1), (1, 1, 4))
ROWS = 3  # not a multiple of the data axes of these meshes


def _first_is_fast(meshes):
    """Marks all meshes but the first as slow, because each compiles its own step."""
    rest = [pytest.param(sizes, marks=pytest.mark.slow, id=str(sizes)) for sizes in meshes[1:]]
    return [pytest.param(meshes[0], id=str(meshes[0])), *rest]


@pytest.fixture(scope="module")
def config(tiny_config):
    """Model sizes with eight heads and key-value heads, which shard over eight devices."""
    return replace(tiny_config, num_heads=8, num_kv_heads=8)


@pytest.fixture(scope="module")
def parameters(config):
    """Parameters on the host: a policy and a reference close to it."""

    @jax.jit
    def make():
        first, other = init_params(config, 0), init_params(config, 1)
        return first, jax.tree.map(lambda a, b: 0.9 * a + 0.3 * b, first, other)

    return jax.device_get(make())


def learner_on(config, *sizes, optimizer=None):
    schedule = warmup_cosine(1.0, warmup_steps=0, total_steps=10, final_fraction=1.0)
    policy = OptimizerSpec(optimizer or optax.sgd(1.0), schedule)
    return Learner(config, mesh=make_mesh(*sizes), policy=policy, logprob_chunk=8)


def grpo_step(learner, parameters):
    """Runs a whole step: reference log-probs, advantages, one packed update with KL."""
    rng = np.random.default_rng(0)
    sequences = []
    for number, length in enumerate((14, 9, 7, 11, 5, 12)):
        old = np.where(np.arange(length) > 0, rng.normal(-5.5, 0.3, length), 0.0)
        advantage = (1.5, -0.5, -1.0)[number % 3]
        columns = {
            "old_logprobs": old.tolist(),
            "sampler_logprobs": old.tolist(),
            "advantages": [advantage] * length,
            "correct": [float(number % 2 == 0)] * length,
        }
        mask = [float(i >= 2 and i % 4 != 3) for i in range(length)]
        sequences.append(TokenSequence(rng.integers(0, 320, length).tolist(), mask, columns))
    policy, reference = parameters
    # The reference is sharded as the parameters are.
    reference = jax.device_put(reference, learner.params_shardings)
    state = learner.init(policy)
    batch = pack(sequences, row_tokens=16, rows=ROWS, microbatches=2)
    scores = learner.logprobs(reference, learner.put(batch), OBJECTIVE.temperature)
    batch = batch.with_columns(ref_logprobs=np.asarray(scores)[:, :ROWS])
    batch = with_weights(batch, "token_mean", 0)
    return learner.rl_step(state, learner.put(batch), objective=OBJECTIVE, kl_coef=0.05)


@pytest.fixture(scope="module")
def alone(config, parameters):
    """Parameters and metrics after the step on one device, at learning rate 1."""
    state, metrics = grpo_step(learner_on(config, 1, 1, 1), parameters)
    return jax.device_get((state.params["policy"], metrics))


def assert_relatively_close(got, wanted, start):
    """Compares parameters to 1e-5 of their largest entry, changes to 1e-5 of the largest change."""
    largest = max(np.abs(a - b).max() for a, b in zip(wanted, start, strict=True))
    assert largest > 0.01
    for a, b, c in zip(got, wanted, start, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())
        np.testing.assert_allclose(a - c, b - c, rtol=0, atol=1e-5 * largest)


@pytest.mark.parametrize("sizes", _first_is_fast(EIGHT))
def test_a_sharded_step_equals_that_of_one_device(config, parameters, alone, sizes):
    learner = learner_on(config, *sizes)
    state, metrics = grpo_step(learner, parameters)
    policy = state.params["policy"]
    for leaf, sharding in zip(
        jax.tree.leaves(policy), jax.tree.leaves(learner.params_shardings), strict=True
    ):
        assert leaf.sharding == sharding and len(leaf.sharding.device_set) == 8
    split = [not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(policy)]
    assert any(split) == (sizes != (8, 1, 1))
    for name, value in jax.device_get(metrics).items():
        np.testing.assert_allclose(value, alone[1][name], rtol=1e-5, atol=1e-9, err_msg=name)
    assert metrics["kl"] > 0.01 and metrics["clip_fraction"] > 0
    leaves = (jax.tree.leaves(jax.device_get(t)) for t in (policy, alone[0], parameters[0]))
    assert_relatively_close(*leaves)


@pytest.mark.parametrize("to", _first_is_fast(FEWER))
def test_a_checkpoint_of_eight_devices_resumes_on_fewer(config, parameters, tmp_path, to):
    def adam(sizes):
        schedule = warmup_cosine(0.01, warmup_steps=0, total_steps=10, final_fraction=1.0)
        optimizer = adamw(schedule, beta1=0.9, beta2=0.99, weight_decay=0.01, clip_norm=1.0)
        return learner_on(config, *sizes, optimizer=optimizer)

    state, _ = grpo_step(adam((2, 2, 2)), parameters)
    saved = jax.device_get(state)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
        restored, _ = checkpoints.restore(1, adam(to).abstract_state())
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(restored), saved)
    assert int(restored.step) == 1
    devices = {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(restored)}
    assert devices == {int(np.prod(to))}


def test_a_mesh_that_does_not_divide_is_refused_with_the_nearest_one(config):
    heads = replace(config, num_kv_heads=2)
    with pytest.raises(UserError, match="kv_heads of size 2 does not divide by 8") as refused:
        learner_on(heads, 1, 1, 8)
    nearest = "--config.mesh.data=4 --config.mesh.fsdp=1 --config.mesh.tensor=2"
    assert nearest in str(refused.value)
    assert learner_on(heads, 4, 1, 2).mesh.size == 8
    odd = replace(config, vocab_size=321)
    with pytest.raises(UserError, match="vocab of size 321 does not divide by 2"):
        learner_on(odd, 2, 2, 2)
    assert jnp.isfinite(learner_on(odd, 4, 2, 1).init(init_params(odd, 0)).step)
