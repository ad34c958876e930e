"""Fixtures of the learner's tests."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from zerosearch_jax.rl.losses import aggregation_weights


@pytest.fixture(scope="session")
def weighted():
    """Returns a function that adds the column `weights` of a mean over all given sequences."""

    def add(sequences, aggregate="token_mean", fixed_tokens=0):
        lengths = jnp.array([sum(s.mask[1:]) for s in sequences], jnp.float32)
        weights = aggregation_weights(lengths, aggregate=aggregate, fixed_tokens=fixed_tokens)
        return [
            replace(s, columns={**s.columns, "weights": np.full(len(s.tokens), weight)})
            for s, weight in zip(sequences, np.asarray(weights), strict=True)
        ]

    return add
