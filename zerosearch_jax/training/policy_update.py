"""The policy update of an RL step: log-probs, advantages, loss weights and learner steps.

`PolicyUpdater` packs the step's episodes into minibatches, adds columns (arrays with a value per
token, such as advantages), and takes one learner step per minibatch. `rl/losses.py` and
`rl/advantages.py` have the equations.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zerosearch_jax.data.packing import Minibatches, PackedBatch, TokenSequence, pack_minibatches
from zerosearch_jax.parallel.device_clock import DeviceClock
from zerosearch_jax.parallel.processes import to_host
from zerosearch_jax.rl import advantages, losses
from zerosearch_jax.rl.config import BY_TOKEN, AdvantageConfig, KLConfig
from zerosearch_jax.rl.learner import Learner
from zerosearch_jax.rl.objective import Objective
from zerosearch_jax.rl.train_state import TrainState
from zerosearch_jax.rollout.trajectory import Trajectory
from zerosearch_jax.training.config import RLConfig
from zerosearch_jax.training.episode_metrics import answer_scores
from zerosearch_jax.training.nonfinite import NonFiniteCounter

# A step's metrics with these endings, and its losses, are plain means over its updates. All others
# are means over tokens, so an update counts by its tokens.
BY_UPDATE = ("grad_norm", "learning_rate")
# After a step's first update the policy differs from the sampler by design, so these metrics come
# from the first update only.
FIRST_UPDATE_METRICS = ("sampler_logprob_diff_mean", "sampler_logprob_diff_max")


class PolicyUpdater:
    """Updates a training state on the episodes of one step.

    Args:
      reference: parameters of the reference policy, unless the training state has one.
      nonfinite: counts skipped updates; no update follows once its limit is reached.
    """

    def __init__(
        self,
        learner: Learner,
        reference: Any,
        config: RLConfig,
        nonfinite: NonFiniteCounter,
        clock: DeviceClock,
    ):
        self._learner = learner
        self._reference = reference
        self._config = config
        self._nonfinite = nonfinite
        self._clock = clock
        self._objective = objective_of(config)

    def __call__(
        self,
        state: TrainState,
        trajectories: Sequence[Trajectory],
        rewards: np.ndarray,
        kl_coef: float,
        step: int,
        rate_scale: float = 1.0,
    ) -> tuple[TrainState, dict[str, float]]:
        """Makes all updates of training step `step` (from 0); `state` is donated.

        After every `rl.refresh_reference` steps the policy becomes the reference policy.

        The episodes are packed once per epoch. Log-probs, values and advantages are columns of the
        first epoch's minibatches, computed before the first update. A later epoch shuffles the
        episodes into other minibatches and copies these columns.

        With `rl.old_logprobs=learner` the first update is on-policy: it compares the policy with
        itself and not with recomputed log-probs.

        Args:
          trajectories: Q·G episodes, group by group.
          rewards: `[Q, G]` rewards of these episodes.
          rate_scale: factor of all learning rates.

        Returns:
          The state, and the step's metrics (see `combine`).
        """
        rl, loss = self._config.rl, self._config.loss
        sequences = sequences_of(trajectories, rl.overlong, document_mask=rl.document_mask)
        first = self._pack(sequences, step, epoch=0)
        one_update = rl.epochs * len(first.batches) == 1
        scored = [self._score(state, batch, one_update) for batch in first.batches]
        first = replace(first, batches=scored)
        if not rl.document_mask:
            first = _inserted_as_sampled(first, trajectories)
        first, metrics = with_advantages(
            first, rewards, self._config.advantage, self._config.kl, kl_coef
        )
        updates, batches = [], []
        for epoch in range(rl.epochs):
            minibatches = first
            if epoch > 0:
                minibatches = self._pack(sequences, step, epoch).with_columns(**first.columns())
            for batch in minibatches.batches:
                if self._nonfinite.limit_reached:
                    break
                batch = with_weights(batch, loss.aggregate, loss.fixed_tokens)
                on_policy = rl.old_logprobs == "learner" and not updates
                objective = replace(self._objective, on_policy=on_policy)
                with self._clock.working():
                    state, update = self._learner.rl_step(
                        state,
                        self._learner.put(batch),
                        objective=objective,
                        kl_coef=kl_coef,
                        rate_scale=rate_scale,
                    )
                    update = {name: float(value) for name, value in update.items()}
                self._nonfinite.record(step, len(updates), update["skipped_updates"] > 0, batch)
                updates.append(update)
                batches.append(batch)
        if rl.refresh_reference and (step + 1) % rl.refresh_reference == 0:
            state = self._learner.refresh_reference(state)
        return state, metrics | combine(updates, batches)

    def _pack(self, sequences: Sequence[TokenSequence], step: int, epoch: int) -> Minibatches:
        config = self._config
        return pack_minibatches(
            sequences,
            config.episodes_per_update,
            key=(config.seed, step, epoch),
            row_tokens=config.learner.row_tokens,
            rows=config.learner.rows,
        )

    def _score(self, state: TrainState, batch: PackedBatch, one_update: bool) -> PackedBatch:
        """Adds the columns that the step needs: old log-probs, reference log-probs, values.

        Args:
          one_update: the step has only its on-policy update, whose loss reads no old log-probs.
        """
        config, learner, temperature = self._config, self._learner, self._objective.temperature
        scores: dict[str, Callable[..., jax.Array]] = {}
        kl_in_reward = config.kl.coef and config.kl.apply_to == "reward"
        read = not one_update or kl_in_reward or not config.rl.document_mask
        if config.rl.old_logprobs == "learner" and read:
            scores["old_logprobs"] = lambda b: learner.policy_logprobs(state, b, temperature)
        if config.kl.coef:
            moving = config.rl.refresh_reference > 0
            reference = state.reference if moving else self._reference
            scores["ref_logprobs"] = lambda b: learner.logprobs(reference, b, temperature)
        if config.advantage.estimator == "ppo":
            scores["values"] = lambda b: learner.values(state, b)
        if not scores:
            return batch
        rows = batch.tokens.shape[1]  # the mesh may have added empty rows
        with self._clock.working():
            device = learner.put(batch)
            columns = {name: to_host(score(device))[:, :rows] for name, score in scores.items()}
        return batch.with_columns(**columns)


def sequences_of(
    trajectories: Sequence[Trajectory], overlong: str, *, document_mask: bool = True
) -> list[TokenSequence]:
    """Returns token ids and log-probs as sampled, with provenance as the mask.

    Args:
      overlong: "keep", or "mask", which excludes truncated episodes (`Trajectory.finish` "length")
        from the loss: DAPO's overlong filtering, arXiv 2503.14476 §3.4. Their rewards still count
        in their groups.
      document_mask: False also trains on text inserted after the prompt. It only serves to show
        the effect of the mask (Search-R1's ablation, arXiv 2503.09516 §5).
    """
    sequences = []
    for trajectory, em in zip(trajectories, answer_scores(trajectories, "em"), strict=True):
        n = len(trajectory.tokens)
        mask = trajectory.by_policy
        if not document_mask:
            start = mask.index(True) if True in mask else n
            mask = [i >= start for i in range(n)]
        if overlong == "mask" and trajectory.finish == "length":
            mask = [False] * n
        columns = {
            "old_logprobs": trajectory.logprobs,
            "sampler_logprobs": trajectory.logprobs,
            "correct": [float(em == 1.0)] * n,
        }
        sequences.append(TokenSequence(trajectory.tokens, mask, columns))
    return sequences


def with_advantages(
    minibatches: Minibatches,
    rewards: np.ndarray,
    config: AdvantageConfig,
    kl_config: KLConfig,
    kl_coef: float,
) -> tuple[Minibatches, dict[str, float]]:
    """Adds the column `advantages`, and for "ppo" the column `returns`.

    A KL penalty in the reward is subtracted per token ("reinforce_pp", "ppo"), or summed and
    subtracted from the episode's reward (the other estimators).

    Args:
      minibatches: all N = Q·G episodes of the step; with `values` for "ppo", and with
        `old_logprobs` and `ref_logprobs` for a KL in the reward.
      rewards: `[Q, G]` rewards of the episodes.

    Returns:
      The minibatches, and metrics: "kl", the mean KL per policy token, if the KL is in the reward.
    """
    mask = jnp.asarray(minibatches.column("mask") > 0)
    kl, metrics = jnp.zeros(mask.shape), {}
    if kl_config.coef and kl_config.apply_to == "reward":
        old, ref = (jnp.asarray(minibatches.column(f"{name}_logprobs")) for name in ("old", "ref"))
        kl = losses.KL_ESTIMATORS[kl_config.estimator](old, ref, mask)
        metrics["kl"] = float(kl.sum() / max(mask.sum(), 1))
    if config.estimator not in BY_TOKEN:
        penalised = rewards - kl_coef * np.asarray(kl.sum(axis=1)).reshape(rewards.shape)
        of_episodes = group_advantages(config, jnp.asarray(penalised))
        return minibatches.with_columns(advantages=np.asarray(of_episodes).ravel()), metrics
    token_rewards = advantages.token_rewards(
        jnp.asarray(rewards.ravel()), mask, kl=kl, kl_coef=kl_coef
    )
    columns = {}
    if config.estimator == "ppo":
        values = jnp.asarray(minibatches.column("values"))
        raw, columns["returns"] = advantages.gae(
            token_rewards, values, mask, gamma=config.gamma, gae_lambda=config.gae_lambda
        )
    else:
        raw = advantages.returns_to_go(token_rewards, mask, gamma=config.gamma)
    columns["advantages"] = advantages.whiten(raw, mask)
    return minibatches.with_columns(**jax.tree.map(np.asarray, columns)), metrics


def group_advantages(config: AdvantageConfig, rewards: jax.Array) -> jax.Array:
    """Returns one advantage per episode, `[Q, G]`, from rewards `[Q, G]`."""
    if config.estimator == "grpo":
        return advantages.group_advantages(rewards, normalize_std=config.normalize_std)
    if config.estimator == "rloo":
        return advantages.leave_one_out_advantages(rewards)
    return advantages.baseline_advantages(rewards, baseline=config.baseline)


def with_weights(batch: PackedBatch, aggregate: str, fixed_tokens: int) -> PackedBatch:
    """Adds the column `weights`, each token's weight in the mean over this minibatch."""
    lengths = batch.unpack(batch.mask).sum(axis=1)
    weights = losses.aggregation_weights(
        jnp.asarray(lengths), aggregate=aggregate, fixed_tokens=fixed_tokens
    )
    return batch.with_columns(weights=batch.spread(np.asarray(weights)))


def combine(
    updates: Sequence[dict[str, float]], batches: Sequence[PackedBatch]
) -> dict[str, float]:
    """Returns a step's metrics from its updates' metrics.

    Skipped updates are added up. Names that end in "_max" take the maximum. Losses and `BY_UPDATE`
    take the mean over updates, all others the mean over tokens: the correct episodes' tokens for
    `correct_loglik`, else the policy's. Non-finite values, such as `correct_loglik` without a
    correct episode, are dropped. `FIRST_UPDATE_METRICS` come from the first update alone.

    Args:
      batches: the minibatch of each update.
    """
    metrics = {"skipped_updates": sum(update["skipped_updates"] for update in updates)}
    for name in sorted(updates[0].keys() - metrics.keys()):
        last = 1 if name in FIRST_UPDATE_METRICS else len(updates)
        finite = [i for i, update in enumerate(updates[:last]) if np.isfinite(update[name])]
        values, weights = np.array([updates[i][name] for i in finite]), np.ones(len(finite))
        if not (name.startswith("loss/") or name.endswith(BY_UPDATE)):
            weights = np.array([_tokens(batches[i], name == "correct_loglik") for i in finite])
        if finite:
            largest = name.endswith("_max")
            metrics[name] = float(max(values) if largest else values @ (weights / weights.sum()))
    return metrics


def _tokens(batch: PackedBatch, correct: bool) -> float:
    """Returns the number of policy tokens, or of those in correct episodes, at least 1."""
    trained = batch.mask > 0
    return max(1.0, float(np.sum(trained * batch.columns["correct"] if correct else trained)))


def objective_of(config: RLConfig) -> Objective:
    """Returns the settings of the loss that an rl config describes."""
    return Objective(config.loss, config.kl, config.critic, config.rollout.temperature)


def _inserted_as_sampled(
    minibatches: Minibatches, trajectories: Sequence[Trajectory]
) -> Minibatches:
    """Copies `old_logprobs` to `sampler_logprobs` of inserted tokens, which no policy sampled."""
    old, sampler = (minibatches.column(f"{name}_logprobs") for name in ("old", "sampler"))
    by_policy = np.zeros(sampler.shape, bool)
    for row, trajectory in zip(by_policy, trajectories, strict=True):
        row[: len(trajectory.by_policy)] = trajectory.by_policy
    return minibatches.with_columns(sampler_logprobs=np.where(by_policy, sampler, old))
