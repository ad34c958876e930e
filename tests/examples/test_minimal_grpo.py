"""The one-page example learns to search, and trains only on the policy's own tokens."""

from pathlib import Path

import jax
import numpy as np
import pytest

from zerosearch_jax.data.qa import load_qa
from zerosearch_jax.examples import minimal_grpo
from zerosearch_jax.models.transformer import abstract_model
from zerosearch_jax.parallel.mesh import make_mesh
from zerosearch_jax.rollout.scheduler import STOP_STRINGS
from zerosearch_jax.rollout.trajectory import Episode, Trajectory
from zerosearch_jax.search.engine import SearchResult
from zerosearch_jax.training.factory import load_model


class OneDocumentEngine:
    """Answers every request with the same document."""

    name = "one document"

    def search(self, requests):
        return [SearchResult(request.key, ("Peru borders Chile.",)) for request in requests]


def make_trajectory() -> Trajectory:
    """Prompt, a sampled turn, a document, a sampled turn: 3, 2, 4 and 2 tokens."""
    trajectory = Trajectory(Episode(0, "Which?", ("Peru",)))
    trajectory.append_inserted([11, 12, 13])
    trajectory.append_sampled([21, 22], [-1.0, -2.0])
    trajectory.append_inserted([31, 32, 33, 34])
    trajectory.append_sampled([41, 42], [-0.5, -0.25])
    return trajectory


def test_batch_aligns_columns_with_the_predicted_token():
    batch = minimal_grpo.make_batch([make_trajectory()], np.array([1.5], np.float32))
    assert batch.tokens.shape == (1, minimal_grpo.MAX_TOKENS)
    assert batch.tokens[0, :11].tolist() == [11, 12, 13, 21, 22, 31, 32, 33, 34, 41, 0]
    assert batch.targets[0, :11].tolist() == [12, 13, 21, 22, 31, 32, 33, 34, 41, 42, 0]
    assert np.flatnonzero(batch.mask[0]).tolist() == [2, 3, 8, 9]
    assert batch.old_logprobs[0, [2, 3, 8, 9]].tolist() == [-1.0, -2.0, -0.5, -0.25]
    assert set(batch.advantages[0, :10]) == {1.5}


def test_document_tokens_get_zero_gradient(tiny_config, tiny_params, monkeypatch):
    monkeypatch.setattr(minimal_grpo, "MAX_TOKENS", 16)
    graphdef, _ = abstract_model(tiny_config)
    reference = jax.tree.map(lambda x: 0.9 * x, tiny_params)

    def loss_and_grads(batch):
        return minimal_grpo.loss_and_grads(tiny_params, reference, batch, 4, graphdef=graphdef)

    batch = minimal_grpo.make_batch([make_trajectory()], np.array([1.5], np.float32))
    loss, grads = loss_and_grads(batch)
    assert np.isfinite(loss)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
    assert any(np.any(leaf) for leaf in jax.tree.leaves(grads))

    # Predicting other tokens in prompt, document and padding changes neither loss nor gradient.
    others = batch._replace(
        targets=np.where(batch.mask, batch.targets, 99),
        old_logprobs=np.where(batch.mask, batch.old_logprobs, np.nan),
        advantages=np.where(batch.mask, batch.advantages, np.nan),
    )
    same_loss, same_grads = loss_and_grads(others)
    assert same_loss == loss
    jax.tree.map(np.testing.assert_array_equal, same_grads, grads)

    # Predicting another token in a turn of the policy does.
    changed, _ = loss_and_grads(
        batch._replace(targets=np.where(batch.targets == 41, 99, batch.targets))
    )
    assert changed != loss


def test_one_step_changes_the_parameters(markov_model, questions, monkeypatch, capsys):
    for name, value in dict(SLOTS=12, ROWS=4, MAX_TOKENS=384).items():
        monkeypatch.setattr(minimal_grpo, name, value)
    policy = load_model(str(markov_model), make_mesh(), "float32")
    generator = minimal_grpo.make_generator(policy, STOP_STRINGS)
    rows = load_qa(str(questions), "train")
    params = minimal_grpo.train(policy, generator, OneDocumentEngine(), rows, steps=1, questions=4)

    step, reward, em, p_noisy, loss = map(float, capsys.readouterr().out.split())
    assert (step, p_noisy) == (1, 0) and 0 <= em <= 1 and 0 <= reward <= 1 and np.isfinite(loss)
    changes = jax.tree.map(lambda new, old: np.abs(new - old).max(), params, policy.params)
    # Adam's first step moves parameters by the rate of the first warm-up step; decay by far less.
    assert max(jax.tree.leaves(changes)) > 0.4 * minimal_grpo.LEARNING_RATE


@pytest.mark.slow
def test_minimal_grpo_learns_to_search(monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[2])
    before, after = minimal_grpo.main()
    assert before <= 0.05
    assert after >= 0.5
