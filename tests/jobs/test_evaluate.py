"""The evaluate job end to end, tiny; its intervals; what it refuses, as a user sees it."""

import json
import re
from pathlib import Path

import pytest

from zerosearch_jax import main
from zerosearch_jax.jobs.scores import episode_figures, wilson_interval
from zerosearch_jax.rollout.trajectory import Episode, Trajectory, Turn
from zerosearch_jax.search.engine import SearchRequest, SearchResult
from zerosearch_jax.telemetry.metrics import EPISODE_METRICS
from zerosearch_jax.text.actions import parse_action

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


def _command(model: Path, questions: Path, workdir: Path, *more: str) -> list[str]:
    small = "slots=4", "max_tokens=384", "prefill_buckets=(64,256)", "window_tokens=384"
    return [
        "main",
        "--config=configs/eval.py",
        f"--config.policy.model={model}",
        f"--config.data.source={questions}",
        "--config.data.splits=('dev',)",
        "--config.limits.max_turns=1",
        "--config.limits.response_tokens=12",
        f"--workdir={workdir}",
        *(f"--config.policy.generator.{value}" for value in small),
        *more,
    ]


def test_the_table_is_printed_and_written(markov_model, questions, tmp_path, capsys):
    command = _command(markov_model, questions, tmp_path, "--config.data.limit=6")
    assert main.cli(command) == 0
    ((name, row),) = json.loads((tmp_path / "evaluation.json").read_text()).items()
    assert name == f"{questions}/dev"
    # Greedily, the hand-written policy answers "Chad" and stops; half of the answers are Chad.
    assert row["em"] == row["f1"] == 0.5
    assert row["em_interval"] == pytest.approx(wilson_interval(3, 6))
    assert (row["questions"], row["searches_per_episode"]) == (6, 0)
    printed = capsys.readouterr().out
    assert re.search(rf"{questions}/dev +0\.500 +\[0\.188, 0\.812\] +0\.500 +0\.00 +6\n", printed)


def test_wilsons_interval():
    # Wilson's formula at n = 10, p = 0.5, z = 1.96: (0.5 + 0.19208 ± 0.36459) / 1.38416.
    assert wilson_interval(5, 10) == pytest.approx((0.23659, 0.76341), abs=1e-4)
    # All or nothing: the other end is z² / (n + z²) away.
    assert wilson_interval(0, 10) == pytest.approx((0.0, 0.27753), abs=1e-4)
    assert wilson_interval(10, 10) == pytest.approx((0.72247, 1.0), abs=1e-4)
    assert wilson_interval(0, 0) == (0.0, 1.0)


def test_the_figures_of_episodes_count_what_their_names_say():
    gold = Episode(0, "q", ("N'Djamena",))
    right, wrong = Trajectory(gold), Trajectory(gold)
    right.append_inserted([1, 2])
    for text in ("<search> a </search>", "<answer> n'djamena. </answer>"):
        right.append_sampled([3, 4], [-1.0, -1.0])
        right.turns.append(Turn(text, parse_action(text)))
    request = SearchRequest(0, 0, "a", "q", gold.golden_answers, noisy=False)
    right.searches.append((request, SearchResult(request.key, (), failure="timeout")))
    right.finish = "answer"
    wrong.append_sampled([5], [-1.0])
    wrong.turns.append(Turn("hm", parse_action("hm")))
    wrong.finish = "length"
    figures = episode_figures([right, wrong])
    assert figures.keys() == EPISODE_METRICS.keys()
    assert figures == {
        "em": 0.5,
        "f1": 0.5,
        "cover_em": 0.5,
        "searches_per_episode": 0.5,
        "finish_ratio": 0.5,
        "invalid_ratio": pytest.approx(1 / 3),
        "truncated_ratio": 0.5,
        "failed_search_ratio": 1.0,
        "policy_tokens_per_episode": 2.5,
        "tokens_per_episode": 3.5,
    }


def _refusal(capsys, *arguments: str) -> str:
    """The one line that a command is refused with."""
    assert main.cli(["main", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


def test_a_misspelt_learning_rate_is_answered_with_the_right_key(capsys):
    error = _refusal(capsys, "--config=configs/grpo.py", "--config.rl.lernrate=1")
    assert "--config.rl.lernrate: there is no such key" in error
    assert "did you mean --config.rl.learning_rate?" in error


@pytest.mark.parametrize("config", ["eval.py", "grpo.py", "grpo.py:qwen2.5-3b"])
def test_a_missing_model_directory_is_named(config, tmp_path, capsys):
    model = tmp_path / "no-model"
    error = _refusal(
        capsys,
        f"--config=configs/{config}",
        f"--config.policy.model={model}",
        f"--workdir={tmp_path}",
        *(f"--config.mesh.{axis}=1" for axis in ("data", "fsdp", "tensor")),
    )
    assert f"{model} holds no config.json" in error


def test_an_empty_data_file_is_named(markov_model, tmp_path, capsys):
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    error = _refusal(capsys, *_command(markov_model, empty, tmp_path)[1:])
    assert f"{empty}: the file has no rows" in error


def test_a_world_file_cut_in_half_is_named(markov_model, questions, tmp_path, capsys, monkeypatch):
    from zerosearch_jax.data import world

    half = tmp_path / "facts.jsonl"
    data = world.FACTS_PATH.read_bytes()
    half.write_bytes(data[: len(data) // 2])
    monkeypatch.setattr(world.load_entities, "__defaults__", (half,))
    error = _refusal(capsys, *_command(markov_model, questions, tmp_path)[1:])
    assert str(half) in error


def test_indexing_the_world_says_nothing(caplog):
    from zerosearch_jax.data.world import Passage
    from zerosearch_jax.search.bm25 import BM25Engine

    BM25Engine([Passage("p", "e", "t", "a capital", ())])
    assert caplog.records == []
