"""Checks of the sections of an RL update."""

import pytest

from zerosearch_jax.errors import UserError
from zerosearch_jax.models import lora, transformer
from zerosearch_jax.rl import config, losses
from zerosearch_jax.rl.config import KLConfig, LossConfig
from zerosearch_jax.training import config as training_config


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LossConfig("sequence"), r"loss\.aggregate=sequence_mean"),
        (lambda: LossConfig("cispo", dual_clip=3.0), r"loss\.dual_clip=3.0"),
        (lambda: LossConfig(dual_clip=0.5), r"loss\.dual_clip=0.5 .* above 1"),
        (lambda: LossConfig(aggregate="fixed_length"), r"loss\.fixed_tokens"),
        (lambda: KLConfig(estimator="k1"), r"kl\.estimator=k1"),
        (lambda: KLConfig(target=0.1), r"kl\.target=0.1 .* kl\.apply_to=reward"),
    ],
)
def test_a_section_refuses_contradictions_and_names_the_key(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_names_repeated_in_modules_without_jax_are_those_of_the_code():
    assert losses.AGGREGATES == config.AGGREGATES
    assert tuple(losses.KL_ESTIMATORS) == config.KL_ESTIMATORS
    assert set(transformer.REMAT_POLICIES) == set(training_config.REMAT)
    assert lora.TARGETS == training_config.LORA_TARGETS
