"""The policy update: the episodes and columns of each learner step, and the step's metrics."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from zerosearch_jax import config_flags
from zerosearch_jax.data.packing import pack
from zerosearch_jax.parallel.device_clock import DeviceClock
from zerosearch_jax.rollout.trajectory import Episode, Trajectory, Turn
from zerosearch_jax.text.actions import INVALID, Action
from zerosearch_jax.training.config import RLConfig
from zerosearch_jax.training.nonfinite import NonFiniteCounter
from zerosearch_jax.training.policy_update import PolicyUpdater, combine, sequences_of

ROOT = Path(__file__).parents[2]
NAN = float("nan")
FIRST_ID = 1000  # the second token of an episode is this plus the episode's number


class RecordingLearner:
    """Learner that records the input of every update; its state is the number of updates."""

    def __init__(self, skipped=()):
        self.batches, self.arguments, self._skipped = [], [], skipped

    def put(self, batch):
        return batch

    def rl_step(self, state, batch, *, objective, kl_coef, rate_scale):
        self.batches.append(batch)
        self.arguments.append((objective, kl_coef))
        skipped = len(self.batches) in self._skipped
        return state + (not skipped), {"skipped_updates": float(skipped), "grad_norm": 1.0}


class ScoringLearner(RecordingLearner):
    """RecordingLearner whose models score a token by its id, each model differently."""

    def policy_logprobs(self, state, batch, temperature):
        return jnp.asarray(-(state + batch.targets / 1000.0) / temperature)

    def logprobs(self, params, batch, temperature):
        return jnp.asarray(-(params + batch.targets / 1000.0) / temperature)

    def values(self, state, batch):
        return jnp.asarray(state + batch.targets / 500.0)


@pytest.fixture
def config():
    config = config_flags.load(str(ROOT / "configs" / "grpo.py"))
    config.update(dict(learner=dict(row_tokens=16, rows=2), kl=dict(coef=0.0)))
    return config


def _episode(number: int, tokens: int = 4, answer: str = "Chad", finish: str = "answer"):
    trajectory = Trajectory(Episode(number, f"question {number}", ("Chad",)))
    trajectory.append_inserted([1, FIRST_ID + number])
    trajectory.append_sampled(range(2, 2 + tokens), [-0.125 * (number + 1)] * tokens)
    action = Action("answer", answer) if answer else INVALID
    trajectory.turns.append(Turn(f"<answer>{answer}</answer>", action))
    trajectory.finish = finish
    return trajectory


def _updater(learner, config, workdir, limit=3, reference=2.0):
    nonfinite = NonFiniteCounter(workdir, limit)
    config = config_flags.typed(RLConfig, config)
    return PolicyUpdater(learner, reference, config, nonfinite, DeviceClock()), nonfinite


def _numbers(batch) -> list[int]:
    """Returns the numbers of a batch's episodes, in its order."""
    rows = batch.tokens.reshape(-1, batch.tokens.shape[-1])
    return [int(rows[row, offset + 1]) - FIRST_ID for row, offset, _ in batch.places]


def _of(batch, name: str) -> dict[int, np.ndarray]:
    """Returns a column at each episode's policy tokens, by the episode's number."""
    rows = batch.columns[name].reshape(-1, batch.tokens.shape[-1])
    masks = batch.mask.reshape(rows.shape)
    spans = [(row, slice(start, start + length - 1)) for row, start, length in batch.places]
    values = [rows[row, span][masks[row, span] > 0] for row, span in spans]
    return dict(zip(_numbers(batch), values, strict=True))


def _packed(answers):
    """Packs one episode per answer; "Chad" is correct."""
    episodes = [_episode(i, answer=answer) for i, answer in enumerate(answers)]
    return pack(sequences_of(episodes, "keep"), row_tokens=16, rows=2, microbatches=None)


def test_a_steps_metrics_by_hand():
    updates = [
        {
            "skipped_updates": 0.0,
            "loss/total": 1.0,
            "entropy": 1.0,
            "grad_norm": 2.0,
            "correct_loglik": NAN,
            "critic/value": NAN,
            "some_max": 1.0,
            "sampler_logprob_diff_mean": 0.125,
            "sampler_logprob_diff_max": 0.5,
        },
        {
            "skipped_updates": 1.0,
            "loss/total": NAN,
            "entropy": 2.0,
            "grad_norm": float("inf"),
            "correct_loglik": -0.5,
            "critic/value": NAN,
            "some_max": 4.0,
            "sampler_logprob_diff_mean": 9.0,
            "sampler_logprob_diff_max": 9.0,
        },
        {
            "skipped_updates": 1.0,
            "loss/total": 4.0,
            "entropy": 3.0,
            "grad_norm": 3.0,
            "correct_loglik": -0.25,
            "critic/value": -float("inf"),
            "some_max": 2.0,
            "sampler_logprob_diff_mean": 9.0,
            "sampler_logprob_diff_max": 9.0,
        },
    ]
    # Episodes of 4 policy tokens each: 2, 1 and 5 episodes, of which 2, 1 and 3 are correct.
    batches = [
        _packed(answers) for answers in (["Chad"] * 2, ["Chad"], ["Chad"] * 3 + ["Peru"] * 2)
    ]
    assert combine(updates, batches) == {
        "skipped_updates": 2.0,
        "loss/total": 2.5,
        "grad_norm": 2.5,
        "entropy": (2 * 1.0 + 1 * 2.0 + 5 * 3.0) / 8,
        "correct_loglik": (1 * -0.5 + 3 * -0.25) / 4,
        "some_max": 4.0,
        "sampler_logprob_diff_mean": 0.125,
        "sampler_logprob_diff_max": 0.5,
    }
    # A later update's value does not replace that of the first.
    updates[0]["sampler_logprob_diff_mean"] = NAN
    assert "sampler_logprob_diff_mean" not in combine(updates, batches)


@pytest.mark.parametrize("overlong", ["keep", "mask"])
def test_overlong_masks_only_episodes_that_ran_out_of_tokens(overlong):
    finishes = ("answer", "turns", "length", "answer")
    answers = ("Chad", "", "", "Peru")
    trajectories = [
        _episode(i, tokens=2 + i, answer=answer, finish=finish)
        for i, (answer, finish) in enumerate(zip(answers, finishes, strict=True))
    ]
    sequences = sequences_of(trajectories, overlong)
    for i, (sequence, finish) in enumerate(zip(sequences, finishes, strict=True)):
        n = 2 + (2 + i)
        assert list(sequence.tokens) == [1, FIRST_ID + i, *range(2, 4 + i)]
        trained = 0 if overlong == "mask" and finish == "length" else 2 + i
        assert list(sequence.mask) == [0] * (n - trained) + [1] * trained
        for name in ("old_logprobs", "sampler_logprobs"):
            assert list(sequence.columns[name]) == [0, 0] + [-0.125 * (i + 1)] * (2 + i)
        assert list(sequence.columns["correct"]) == [float(i == 0)] * n
    assert trajectories[2].by_policy[-1]  # the provenance does not change


def test_every_epoch_updates_on_each_episode_once(config, tmp_path):
    config.rl.update(dict(minibatch_episodes=6, epochs=2))
    trajectories = [_episode(i) for i in range(12)]
    rewards = np.tile(np.float32([1, 0]), (6, 1))

    def updates_of(seed, step):
        config.seed = seed
        learner = RecordingLearner()
        update_policy, _ = _updater(learner, config, tmp_path)
        state, metrics = update_policy(0, trajectories, rewards, 0.0, step)
        assert state == 4 and metrics == {"skipped_updates": 0.0, "grad_norm": 1.0}
        for batch in learner.batches:
            weights = np.concatenate(list(_of(batch, "weights").values()))
            np.testing.assert_allclose(weights, 1 / 24, rtol=1e-6)  # 6 episodes of 4 tokens
            # The group of an advantage may be spread over the minibatches.
            for number, advantages in _of(batch, "advantages").items():
                sign = 1 if number % 2 == 0 else -1
                np.testing.assert_allclose(advantages, sign * 0.5**0.5, rtol=1e-5)
        return [frozenset(_numbers(batch)) for batch in learner.batches]

    given = updates_of(seed=0, step=3)
    for epoch in (given[:2], given[2:]):
        assert [len(part) for part in epoch] == [6, 6]
        assert epoch[0] | epoch[1] == set(range(12))
    assert set(given[:2]) != set(given[2:])
    assert updates_of(seed=0, step=3) == given
    for other in (updates_of(seed=0, step=4), updates_of(seed=1, step=3)):
        assert set(other[:2]) != set(given[:2]) and set(other[2:]) != set(given[2:])


def test_later_epochs_take_their_columns_from_the_first(config, tmp_path):
    config.update(
        dict(
            advantage=dict(estimator="ppo"),
            rl=dict(old_logprobs="learner", minibatch_episodes=4, epochs=2),
            kl=dict(coef=0.25),
        )
    )
    learner = ScoringLearner()
    update_policy, _ = _updater(learner, config, tmp_path)
    trajectories = [_episode(i, tokens=3 + i) for i in range(6)]
    update_policy(7, trajectories, np.float32([[1, 0.5, 0, 1, 0.25, 0]]), 0.25, 0)
    names = learner.batches[0].columns.keys()
    epochs = [
        {name: _of(first, name) | _of(second, name) for name in names}
        for first, second in (learner.batches[:2], learner.batches[2:])
    ]
    assert names >= {"old_logprobs", "ref_logprobs", "values", "advantages", "returns", "correct"}
    for name in names - {"weights"}:  # which depend on the minibatch
        for number in range(6):
            np.testing.assert_array_equal(epochs[1][name][number], epochs[0][name][number])


@pytest.mark.parametrize(("size", "updates"), [(0, 1), (3, 2), (2, 3), (4, 2), (5, 1)])
def test_updates_have_one_shape_for_episodes_of_any_length(config, tmp_path, size, updates):
    config.rl.minibatch_episodes = size
    config.rollout.update(dict(questions_per_step=1, group_size=5))
    shapes = set()
    for step, lengths in enumerate([(1, 1, 1, 1, 1), (14, 14, 14, 14, 14), (1, 14, 2, 13, 7)]):
        learner = RecordingLearner()
        update_policy, _ = _updater(learner, config, tmp_path)
        trajectories = [_episode(i, tokens) for i, tokens in enumerate(lengths)]
        update_policy(0, trajectories, np.float32([[1, 0, 0, 1, 1]]), 0.0, step)
        assert len(learner.batches) == updates
        shapes |= {batch.tokens.shape for batch in learner.batches}
    # In the worst case each episode fills a row. A microbatch has 2 rows.
    assert shapes == {({0: 3, 2: 1}.get(size, (size + 1) // 2), 2, 16)}


def test_columns_hold_the_scores_of_their_models(config, tmp_path):
    config.update(
        dict(
            rollout=dict(temperature=0.5),
            advantage=dict(estimator="ppo"),
            rl=dict(old_logprobs="learner", minibatch_episodes=3),
            kl=dict(coef=0.25),
        )
    )
    learner = ScoringLearner()
    update_policy, _ = _updater(learner, config, tmp_path, reference=2.0)
    trajectories = [_episode(i, tokens=3 + i) for i in range(4)]
    update_policy(7, trajectories, np.float32([[1], [0.5], [0], [1]]), 0.25, 0)
    advantages = []
    for batch in learner.batches:
        targets = {n: np.arange(2, 2 + 3 + n) for n in _numbers(batch)}
        for number, ids in targets.items():
            for name, wanted in (
                # Both updates read scores from before the first.
                ("old_logprobs", -(7 + ids / 1000) / 0.5),
                ("ref_logprobs", -(2 + ids / 1000) / 0.5),
                ("sampler_logprobs", np.full(len(ids), -0.125 * (number + 1))),
                ("values", 7 + ids / 500),
                # Undiscounted, without a KL in the reward: the episode's reward.
                ("returns", np.full(len(ids), (1, 0.5, 0, 1)[number])),
            ):
                np.testing.assert_allclose(_of(batch, name)[number], wanted, atol=1e-5)
        advantages += list(_of(batch, "advantages").values())
    whitened = np.concatenate(advantages)  # over the step, not over each minibatch
    assert abs(whitened.mean()) < 1e-5 and abs(whitened.std() - 1) < 1e-5
    assert all(kl_coef == 0.25 for _, kl_coef in learner.arguments)
    objective = learner.arguments[0][0]
    assert objective.temperature == 0.5 and objective.critic.value_clip == config.critic.value_clip


def test_a_kl_in_the_reward_is_subtracted_and_reported(config, tmp_path):
    config.update(
        dict(kl=dict(coef=0.5, apply_to="reward", estimator="k1"), advantage=dict(estimator="rloo"))
    )
    learner = ScoringLearner()
    update_policy, _ = _updater(learner, config, tmp_path, reference=0.0)
    trajectories = [_episode(i, tokens=2) for i in range(2)]
    _, metrics = update_policy(0, trajectories, np.float32([[1, 0]]), 0.25, 0)
    # k1 = sampled - reference: -0.125 (number + 1) + id / 1000 for the ids 2 and 3.
    penalties = [0.25 * (2 * -0.125 * (number + 1) + 0.005) for number in range(2)]
    wanted = (1 - penalties[0]) - (0 - penalties[1])
    for number, sign in ((0, 1), (1, -1)):
        advantages = _of(learner.batches[0], "advantages")[number]
        np.testing.assert_allclose(advantages, sign * wanted, rtol=1e-5)
    assert metrics["kl"] == pytest.approx((-0.25 - 0.5 + 0.01) / 4, rel=1e-5)


@pytest.mark.parametrize("old_logprobs", ["learner", "sampler"])
def test_only_a_steps_first_update_is_on_policy(config, tmp_path, old_logprobs):
    config.rl.update(dict(minibatch_episodes=2, epochs=2, old_logprobs=old_logprobs))
    learner = ScoringLearner()
    update_policy, _ = _updater(learner, config, tmp_path)
    for step in range(2):
        update_policy(7, [_episode(i) for i in range(4)], np.float32([[1, 0], [0, 1]]), 0.0, step)
    flags = [objective.on_policy for objective, _ in learner.arguments]
    assert flags == [old_logprobs == "learner", False, False, False] * 2


@pytest.mark.parametrize(
    ("change", "scored"),
    [({}, False), (dict(rl=dict(epochs=2)), True), (dict(rl=dict(document_mask=False)), True),
     (dict(kl=dict(coef=0.5, apply_to="reward")), True), (dict(kl=dict(coef=0.5)), False)],
)  # fmt: skip
def test_the_learner_scores_old_logprobs_only_where_they_are_read(config, tmp_path, change, scored):
    config.rl.old_logprobs = "learner"
    config.update(change)
    learner = ScoringLearner()
    update_policy, _ = _updater(learner, config, tmp_path)
    update_policy(7, [_episode(0), _episode(1)], np.float32([[1, 0]]), 0.0, 0)
    for batch in learner.batches:
        for number, old in _of(batch, "old_logprobs").items():
            assert (old < -7).all() == scored, number  # the sampler's are above -1


def test_models_score_nothing_that_the_config_does_not_need(config, tmp_path):
    update_policy, _ = _updater(RecordingLearner(), config, tmp_path)  # has no scoring method
    state, _ = update_policy(0, [_episode(0), _episode(1)], np.float32([[1, 0]]), 0.0, 0)
    assert state == 1


def test_a_masked_episodes_reward_still_counts_in_its_group(config, tmp_path):
    config.rl.overlong = "mask"
    learner = RecordingLearner()
    update_policy, _ = _updater(learner, config, tmp_path)
    trajectories = [_episode(0, finish="length"), _episode(1, answer="Peru")]
    update_policy(0, trajectories, np.float32([[1, 0]]), 0.0, 0)
    advantages = _of(learner.batches[0], "advantages")
    assert len(advantages[0]) == 0 and learner.batches[0].mask.sum() == 4
    np.testing.assert_allclose(advantages[1], -(0.5**0.5), rtol=1e-5)
    np.testing.assert_allclose(_of(learner.batches[0], "weights")[1], 0.25)


def test_updates_stop_once_the_limit_of_skipped_ones_is_reached(config, tmp_path):
    config.rl.update(dict(minibatch_episodes=2, epochs=2))
    given = ([_episode(i) for i in range(4)], np.float32([[1, 0], [0, 1]]), 0.0, 6)

    learner = RecordingLearner(skipped={2, 3, 4})
    update_policy, nonfinite = _updater(learner, config, tmp_path / "two", limit=2)
    state, metrics = update_policy(0, *given)
    assert (state, metrics["skipped_updates"], len(learner.batches)) == (1, 2.0, 3)
    assert nonfinite.limit_reached

    learner = RecordingLearner(skipped={1, 3, 4})  # the second update resets the count
    update_policy, nonfinite = _updater(learner, config, tmp_path / "three", limit=3)
    state, metrics = update_policy(0, *given)
    assert (state, metrics["skipped_updates"], len(learner.batches)) == (1, 3.0, 4)
    assert not nonfinite.limit_reached and nonfinite.in_a_row == 2
    names = sorted(path.name for path in (tmp_path / "three" / "skipped_batches").iterdir())
    assert names == [f"step000007_update{i}.npz" for i in (1, 3, 4)]


def test_without_the_document_mask_all_tokens_after_the_prompt_are_trained(config, tmp_path):
    config.rl.update(dict(document_mask=False, old_logprobs="learner"))
    trajectory = _episode(0, tokens=2, answer="")
    trajectory.append_inserted([50, 51])  # documents
    trajectory.append_sampled([60], [-0.5])
    trajectory.turns.append(Turn("<answer>Chad</answer>", Action("answer", "Chad")))
    masked, bare = (
        sequences_of([trajectory], "keep", document_mask=mask)[0].mask for mask in (True, False)
    )
    assert list(map(bool, masked)) == [False, False, True, True, False, False, True]
    assert list(map(bool, bare)) == [False, False, True, True, True, True, True]

    learner = ScoringLearner()
    update_policy, _ = _updater(learner, config, tmp_path)
    update_policy(1.0, [trajectory], np.array([[1.0]]), 0.0, 0)
    (batch,) = learner.batches
    row, offset, n = batch.places[0]
    columns = {k: v.reshape(-1, v.shape[-1])[row] for k, v in batch.columns.items()}
    old, sampler = columns["old_logprobs"], columns["sampler_logprobs"]
    for place in (4, 5):  # inserted tokens take the learner's log-prob for the sampler's
        assert sampler[offset + place - 1] == old[offset + place - 1] != 0
    assert sampler[offset + 5] == -0.5 != old[offset + 5]
