"""A non-finite loss changes no parameter, its batch is saved, and too many end the run."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from zerosearch_jax import config_flags
from zerosearch_jax.checkpoints import Checkpoints
from zerosearch_jax.data.embedded.scripted_agent import Segment
from zerosearch_jax.data.packing import TokenSequence, pack
from zerosearch_jax.errors import UserError
from zerosearch_jax.jobs import rl, sft
from zerosearch_jax.training import policy_update, step_rollouts
from zerosearch_jax.training.episode_metrics import reward_of
from zerosearch_jax.training.nonfinite import NonFiniteCounter
from zerosearch_jax.training.policy_update import sequences_of

pytestmark = pytest.mark.usefixtures("compiled_once")
ROOT = Path(__file__).parents[2]
NAN = float("nan")
EPISODES = 8  # of a step of `rl_config`


@pytest.fixture
def saved(monkeypatch):
    """Records the checkpoints of the jobs: step → state on the host and metadata."""
    steps = {}

    class RecordingCheckpoints(Checkpoints):
        def save(self, step, state, metadata, score=None):
            # The next update donates the arrays, so copy them.
            steps[step] = jax.tree.map(lambda x: np.array(x, copy=True), state), dict(metadata)
            super().save(step, state, metadata, score)

    for job in (rl, sft):
        monkeypatch.setattr(job, "Checkpoints", RecordingCheckpoints)
    return steps


def _rows(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def _same(one, other) -> bool:
    """Returns whether two states are equal bit for bit."""
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(a.tobytes() == b.tobytes() for a, b in pairs)


def _batch(tokens=(5, 6, 7)):
    n = len(tokens)
    sequence = TokenSequence(tokens, [0] + [1] * (n - 1), {"advantages": [NAN] * n})
    return pack([sequence], row_tokens=8, rows=1, microbatches=1)


def test_skipped_updates_are_counted_and_their_batches_saved(tmp_path, capsys):
    nonfinite = NonFiniteCounter(tmp_path, limit=2)
    nonfinite.record(0, 0, False, _batch())
    assert nonfinite.in_a_row == 0 and not (tmp_path / "skipped_batches").exists()
    nonfinite.record(4, 1, True, _batch())
    assert nonfinite.in_a_row == 1 and not nonfinite.limit_reached
    path = tmp_path / "skipped_batches" / "step000005_update2.npz"
    assert "step 5: loss or gradient is not finite" in capsys.readouterr().out
    with np.load(path) as kept:
        arrays = _batch().arrays()
        assert set(kept.files) == arrays.keys()
        for name, array in arrays.items():
            np.testing.assert_array_equal(kept[name], array)
            assert kept[name].dtype == array.dtype
    nonfinite.record(5, 0, False, _batch())
    assert nonfinite.in_a_row == 0
    nonfinite.record(6, 0, True, _batch())
    nonfinite.record(6, 1, True, _batch())
    assert nonfinite.limit_reached
    with pytest.raises(UserError, match="2 updates in a row .* checkpoint of step 7 "):
        nonfinite.raise_error(6)


def test_the_count_continues_after_a_resume_but_not_after_the_limit(tmp_path):
    resumed = NonFiniteCounter(tmp_path, limit=3, in_a_row=2)
    assert not resumed.limit_reached
    resumed.record(9, 0, True, _batch())
    assert resumed.limit_reached
    stopped = NonFiniteCounter(tmp_path, limit=3, in_a_row=resumed.in_a_row)
    assert not stopped.limit_reached and stopped.in_a_row == 0
    with pytest.raises(UserError, match="nonfinite_limit is 0"):
        NonFiniteCounter(tmp_path, limit=0)


def test_an_rl_run_survives_single_faults(rl_config, tmp_path, saved, monkeypatch):
    """A NaN reward in step 2, a NaN log-prob in step 4; two in a row would end the run."""
    config = config_flags.load(str(rl_config))
    config.update(dict(rl=dict(steps=5), watch=dict(nonfinite_limit=2), eval=dict(every=5)))

    def faulty_reward(trajectory, *arguments):
        faulty = trajectory.episode.number == EPISODES + 1
        return NAN if faulty else reward_of(trajectory, *arguments)

    def faulty_sequences(trajectories, *arguments, **options):
        sequences = sequences_of(trajectories, *arguments, **options)
        if trajectories[0].episode.number == 3 * EPISODES:
            logprobs = np.array(sequences[2].columns["old_logprobs"])
            logprobs[np.flatnonzero(sequences[2].mask)[-1]] = NAN
            columns = {**sequences[2].columns, "old_logprobs": logprobs}
            sequences[2] = replace(sequences[2], columns=columns)
        return sequences

    monkeypatch.setattr(step_rollouts, "reward_of", faulty_reward)
    monkeypatch.setattr(policy_update, "sequences_of", faulty_sequences)
    rl.run(config, str(tmp_path))

    rows = _rows(tmp_path)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert [row["skipped_updates"] for row in rows] == [0, 1, 0, 1, 0]
    assert np.isnan(rows[1]["reward"])  # metrics show the fault
    for row in rows:
        assert ("grad_norm" in row) == ("loss/total" in row) == (row["skipped_updates"] == 0)
        assert np.isfinite(row["learning_rate"]) and np.isfinite(row["entropy"])

    states = {step: state for step, (state, _) in saved.items()}
    assert _same(states[2], states[1]) and _same(states[4], states[3])
    assert not _same(states[3], states[2]) and not _same(states[5], states[4])
    assert [int(states[step].step) for step in range(1, 6)] == [1, 1, 2, 2, 3]
    assert [kept["skipped_in_a_row"] for _, kept in saved.values()] == [0, 1, 0, 1, 0]

    paths = sorted((tmp_path / "skipped_batches").iterdir())
    assert [path.name for path in paths] == ["step000002_update1.npz", "step000004_update1.npz"]
    with np.load(paths[0]) as batch:
        of_group = np.isnan(batch["advantages"])  # four of the eight episodes
        assert 0 < (of_group & (batch["mask"] > 0)).sum() < (batch["mask"] > 0).sum()
        assert all(np.isfinite(batch[name]).all() for name in batch.files if name != "advantages")
    with np.load(paths[1]) as batch:
        assert np.isnan(batch["old_logprobs"]).sum() == 1
        assert batch["mask"][np.isnan(batch["old_logprobs"])] == 1
        shape = (EPISODES // config.learner.rows, config.learner.rows, config.learner.row_tokens)
        assert batch["tokens"].shape == batch["ref_logprobs"].shape == shape
    assert (tmp_path / "summary.json").exists()


def test_an_rl_run_with_too_many_faults_stops_and_resumes(
    rl_config, tmp_path, saved, monkeypatch, capsys
):
    config = config_flags.load(str(rl_config))
    config.update(dict(rl=dict(steps=5), watch=dict(nonfinite_limit=3), eval=dict(every=5)))
    config.checkpoint_every = 5

    def faulty_reward(trajectory, *arguments):
        faulty = trajectory.episode.number >= EPISODES
        return NAN if faulty else reward_of(trajectory, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(step_rollouts, "reward_of", faulty_reward)
        with pytest.raises(UserError, match="3 updates in a row .* in step 4; .*skipped_batches"):
            rl.run(config, str(tmp_path))
    assert [row["skipped_updates"] for row in _rows(tmp_path)] == [0, 1, 1, 1]
    assert len(list((tmp_path / "skipped_batches").iterdir())) == 3
    assert not (tmp_path / "summary.json").exists()
    assert list(saved) == [4] and int(saved[4][0].step) == 1  # saved before the stop

    capsys.readouterr()
    rl.run(config, str(tmp_path))
    assert "resuming after step 4" in capsys.readouterr().out
    rows = _rows(tmp_path)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert rows[4]["skipped_updates"] == 0 and np.isfinite(rows[4]["loss/total"])
    assert int(saved[5][0].step) == 2
    assert (tmp_path / "summary.json").exists()


def test_a_fine_tuning_run_with_too_many_faults_stops_and_resumes(
    markov_model, tmp_path, saved, monkeypatch
):
    examples = [[Segment("Query:", False), Segment(f" Doc 1: {i}.", True)] for i in range(20)]
    monkeypatch.setattr(sft, "load_examples", lambda _: examples)
    pairs = tmp_path / "pairs.jsonl"
    pairs.touch()
    config = config_flags.load(str(ROOT / "configs" / "sft_simulator.py"))
    config.update(
        dict(
            init=str(markov_model),
            data=dict(examples=str(pairs), validation="", validation_examples=4),
            optimizer=dict(warmup_steps=0),
            learner=dict(row_tokens=64, rows=2),
            sft=dict(
                steps=4, examples_per_step=4, eval_every=4, checkpoint_every=1, nonfinite_limit=2
            ),
        )
    )
    made = []

    def faulty_batch(sequences, config, microbatches):
        batch = batch_of(sequences, config, microbatches)
        if microbatches is None:  # held-out examples
            return batch
        made.append(batch)
        return batch if len(made) == 1 else replace(batch, mask=batch.mask * np.float32(NAN))

    batch_of = sft.batch_of
    with monkeypatch.context() as patch:
        patch.setattr(sft, "batch_of", faulty_batch)
        with pytest.raises(UserError, match="2 updates in a row .* in step 3"):
            sft.run(config, str(tmp_path))
    assert _same(saved[3][0], saved[1][0])
    sft.run(config, str(tmp_path))
    assert not _same(saved[4][0], saved[3][0])
    assert [row["skipped_updates"] for row in _rows(tmp_path)] == [0, 1, 1, 0]
    assert (tmp_path / "model" / "model.safetensors").exists()
