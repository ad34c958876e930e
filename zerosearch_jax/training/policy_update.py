"""The learning half of an RL step: from rewarded episodes to the updated state."""

from collections.abc import Sequence
from dataclasses import fields, replace

import numpy as np
from ml_collections import ConfigDict

from zerosearch_jax.data.packing import PackedBatch, TokenSequence, pack
from zerosearch_jax.parallel.device_clock import DeviceClock
from zerosearch_jax.parallel.processes import to_host
from zerosearch_jax.rl.experience import (
    AdvantageEstimator,
    minibatches,
    with_advantages,
    with_scores,
    with_weights,
)
from zerosearch_jax.rl.learner import Learner, TrainState
from zerosearch_jax.rl.objective import Objective
from zerosearch_jax.rollout.trajectory import Trajectory
from zerosearch_jax.training.episode_metrics import answer_scores
from zerosearch_jax.training.nonfinite import NonFiniteCounter

# Later updates of a step have moved away from the sampler; the first has not.
OF_THE_FIRST_UPDATE = ("sampler_logprob_diff_mean", "sampler_logprob_diff_max")


class PolicyUpdater:
    """Updates a state on one step's episodes, as `config.rl` says.

    Args:
      reference: parameters of the frozen reference policy.
      nonfinite: is told of skipped updates; no update follows once it is exhausted.
    """

    def __init__(
        self,
        learner: Learner,
        reference,
        config: ConfigDict,
        nonfinite: NonFiniteCounter,
        clock: DeviceClock,
    ):
        self._learner = learner
        self._reference = reference
        self._config = config
        self._nonfinite = nonfinite
        self._clock = clock
        self._estimator = estimator_of(config)
        self._objective = objective_of(config)

    def __call__(
        self,
        state: TrainState,
        trajectories: Sequence[Trajectory],
        rewards: np.ndarray,
        kl_coef: float,
        step: int,
    ) -> tuple[TrainState, dict[str, float]]:
        """All updates of training step `step` (from 0); `state` is donated.

        Args:
          trajectories: Q·G episodes, group by group.
          rewards: `[Q, G]` of them.

        Returns:
          The state, and figures: means over the step's updates that are finite.
        """
        rl, loss, kl = self._config.rl, self._config.loss, self._config.kl
        sequences = sequences_of(trajectories, rl.overlong, document_mask=rl.document_mask)
        sequences = self._scored(state, sequences)
        if not rl.document_mask:
            sequences = [
                _as_if_sampled(s, t.by_policy) for s, t in zip(sequences, trajectories, strict=True)
            ]
        sequences, figures = with_advantages(
            sequences,
            rewards,
            self._estimator,
            row_tokens=self._config.learner.row_tokens,
            kl_in_reward=kl.estimator if kl.coef and kl.apply_to == "reward" else "",
            kl_coef=kl_coef,
        )
        updates = []
        for epoch in range(rl.epochs):
            key = (self._config.seed, step, epoch)
            for part in minibatches(sequences, rl.minibatches, key):
                if self._nonfinite.limit_reached:
                    break
                weighted = with_weights(part, loss.aggregate, loss.fixed_tokens)
                batch = self._pack(weighted, -(-len(sequences) // rl.minibatches))
                with self._clock.working():
                    state, metrics = self._learner.rl_step(
                        state, self._learner.put(batch), objective=self._objective, kl_coef=kl_coef
                    )
                    metrics = {name: float(value) for name, value in metrics.items()}
                self._nonfinite.record(step, len(updates), metrics["skipped_updates"] > 0, batch)
                updates.append(metrics)
        return state, figures | combine(updates)

    def _scored(self, state: TrainState, sequences: list[TokenSequence]) -> list[TokenSequence]:
        """Adds the log-probs and values that the models here give the tokens."""
        config, learner, temperature = self._config, self._learner, self._objective.temperature
        wanted = {}
        if config.rl.old_logprobs == "learner":
            wanted["old_logprobs"] = lambda b: learner.policy_logprobs(state, b, temperature)
        if config.kl.coef:
            wanted["ref_logprobs"] = lambda b: learner.logprobs(self._reference, b, temperature)
        if config.advantage.estimator == "ppo":
            wanted["values"] = lambda b: learner.values(state, b)
        if not wanted:
            return sequences
        batch = self._pack(sequences, len(sequences))
        with self._clock.working():
            device = learner.put(batch)
            scores = {name: to_host(score(device)) for name, score in wanted.items()}
        return with_scores(sequences, batch, scores)

    def _pack(self, sequences: Sequence[TokenSequence], most: int) -> PackedBatch:
        """Packs into the fixed shape that holds `most` sequences of any length."""
        sizes = self._config.learner
        return pack(
            sequences,
            row_tokens=sizes.row_tokens,
            rows=sizes.rows,
            microbatches=-(-most // sizes.rows),
        )


def sequences_of(
    trajectories: Sequence[Trajectory], overlong: str, *, document_mask: bool = True
) -> list[TokenSequence]:
    """Ids and log-probs as sampled, provenance as the mask.

    Args:
      document_mask: False trains on what was inserted behind the prompt, too: only to show what
        the mask is for (Search-R1's ablation, arXiv 2503.09516 §5).
      overlong: "mask" takes episodes that ran out of room out of the loss (DAPO's overlong
        filtering, arXiv 2503.14476 §3.4); their rewards still count in their groups. "keep".
    """
    correct = answer_scores(trajectories, "em")
    sequences = []
    for trajectory, right in zip(trajectories, correct, strict=True):
        n = len(trajectory.tokens)
        filtered = overlong == "mask" and trajectory.finish == "length"
        mask = trajectory.by_policy
        if not document_mask:
            first = mask.index(True) if True in mask else n
            mask = [i >= first for i in range(n)]
        sequences.append(
            TokenSequence(
                trajectory.tokens,
                [0.0] * n if filtered else mask,
                {
                    "old_logprobs": trajectory.logprobs,
                    "sampler_logprobs": trajectory.logprobs,
                    "correct": [float(right == 1.0)] * n,
                },
            )
        )
    return sequences


def _as_if_sampled(sequence: TokenSequence, by_policy: Sequence[bool]) -> TokenSequence:
    """Inserted tokens have no log-prob of a sampler; they get the learner's."""
    columns = sequence.columns
    sampler = np.where(by_policy, columns["sampler_logprobs"], columns["old_logprobs"])
    return replace(sequence, columns={**columns, "sampler_logprobs": sampler})


def combine(updates: Sequence[dict[str, float]]) -> dict[str, float]:
    """One step's figures from its updates': means, maxima of "_max", the sum of skipped ones.

    What is not finite is left out, as are "correct_loglik" without a correct token and the
    sampler's figures of all updates but the first.
    """
    figures = {"skipped_updates": sum(update["skipped_updates"] for update in updates)}
    for name in updates[0].keys() - figures.keys():
        of = updates[:1] if name in OF_THE_FIRST_UPDATE else updates
        values = [update[name] for update in of if np.isfinite(update[name])]
        if values:
            figures[name] = max(values) if name.endswith("_max") else float(np.mean(values))
    return figures


def estimator_of(config: ConfigDict) -> AdvantageEstimator:
    """How `config.rl` turns rewards into advantages."""
    named = {
        f.name: config.advantage[f.name] for f in fields(AdvantageEstimator) if f.name != "name"
    }
    return AdvantageEstimator(name=config.advantage.estimator, **named)


def objective_of(config: ConfigDict) -> Objective:
    """The loss that `config.rl` and `config.critic` describe."""
    named = {f.name: config.loss[f.name] for f in fields(Objective) if f.name in config.loss}
    return Objective(
        **named,
        kl_estimator=config.kl.estimator,
        kl_in=config.kl.apply_to,
        temperature=config.rollout.temperature,
        value=config.critic.value,
        value_clip=config.critic.value_clip,
    )
