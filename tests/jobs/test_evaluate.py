"""The evaluate job end to end, tiny; its intervals; what it refuses, as a user sees it."""

import json
import re
from pathlib import Path

import pytest

from zerosearch_jax import config_flags, main
from zerosearch_jax.errors import UserError
from zerosearch_jax.jobs import evaluate
from zerosearch_jax.rollout.trajectory import Episode, Trajectory, Turn
from zerosearch_jax.search.engine import SearchRequest, SearchResult
from zerosearch_jax.telemetry.metrics import EPISODE_METRICS
from zerosearch_jax.text.actions import parse_action
from zerosearch_jax.training.episode_metrics import (
    bootstrap_interval,
    episode_metrics,
    wilson_interval,
)

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
        f"--config.data.sets=('{questions}',)",
        "--config.limits.max_turns=1",
        "--config.limits.response_tokens=12",
        f"--workdir={workdir}",
        *(f"--config.policy.generator.{value}" for value in small),
        *more,
    ]


def test_the_table_is_printed_and_written(markov_model, questions, tmp_path, capsys):
    command = _command(markov_model, questions, tmp_path, "--config.data.limit=6")
    assert main.cli(command) == 0
    (row,) = json.loads((tmp_path / "evaluation.json").read_text())
    cell = [row[key] for key in ("model", "method", "engine", "set", "limit")]
    assert cell == [str(markov_model), "search", "bm25", str(questions), 6]
    # Greedily, the hand-written policy answers "Chad" and stops; half of the answers are Chad.
    assert row["em"] == row["f1"] == 0.5
    assert row["em_interval"] == pytest.approx(wilson_interval(3, 6))
    assert row["f1_interval"] == list(bootstrap_interval([1.0, 0.0] * 3))
    assert (row["questions"], row["searches_per_episode"]) == (6, 0)
    printed = capsys.readouterr().out
    em, f1 = r"0\.500  \[0\.188, 0\.812\]", r"0\.500  \[0\.\d{3}, \d\.\d{3}\]"
    assert re.search(rf"search  bm25  {questions}  {em}  {f1} +0\.00 +6\n", printed)


ALL = "--config.methods=('direct','cot','rag','search','search_o1')"
CELLS = [
    ("direct", "none"),
    ("cot", "none"),
    ("rag", "bm25"),
    ("search", "bm25"),
    ("search_o1", "bm25"),
]


def test_every_method_gets_its_row_and_none_is_played_twice(
    markov_model, questions, tmp_path, monkeypatch, capsys
):
    command = _command(markov_model, questions, tmp_path, "--config.data.limit=6", ALL)
    path = tmp_path / "evaluation.json"
    once, played = evaluate.evaluate_policy, []

    def stopping(*arguments, method, **options):
        played.append(method)
        if len(played) == 3:
            raise KeyboardInterrupt
        return once(*arguments, method=method, **options)

    monkeypatch.setattr(evaluate, "evaluate_policy", stopping)
    assert main.cli(command) == 130
    begun = json.loads(path.read_text())
    assert [(row["method"], row["engine"]) for row in begun] == CELLS[:2]

    assert main.cli(command) == 0  # goes on where it was stopped
    assert played == ["direct", "cot", "rag", "rag", "search", "search_o1"]
    rows = json.loads(path.read_text())
    assert rows[:2] == begun
    assert [(row["method"], row["engine"]) for row in rows] == CELLS
    assert [row["searches_per_episode"] for row in rows] == [0, 0, 1, 0, 0]
    assert all((row["em"], row["questions"]) == (0.5, 6) for row in rows)
    table = capsys.readouterr().out
    assert [tuple(line.split()[:2]) for line in table.splitlines() if str(questions) in line] == (
        CELLS
    )

    def fail(*_, **__):
        raise AssertionError("a row was played again")

    monkeypatch.setattr(evaluate, "evaluate_policy", fail)
    monkeypatch.setattr(evaluate.build, "load_model", fail)
    assert main.cli(command) == 0
    assert json.loads(path.read_text()) == rows
    # Another engine under the same name is another cell.
    with pytest.raises(AssertionError, match="played again"):
        main.cli([*command, "--config.engines.bm25.topk=1"])


def test_a_cell_is_told_apart_by_what_changes_its_figures():
    config = config_flags.load("configs/eval.py:simulated")
    config.methods = ("direct", "search")
    wanted = evaluate.cells(config)
    assert [(c["method"], c["engine"], c["set"]) for c in wanted] == [
        (method, engine, f"world/{split}")
        for method, engine in (("direct", "none"), ("search", "bm25"), ("search", "simulated"))
        for split in ("test", "compositions", "validation")
    ]
    assert wanted == json.loads(json.dumps(wanted))
    config.limits.max_turns = 2
    changed = evaluate.cells(config)
    assert not any(cell in wanted for cell in changed)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (dict(methods=("search", "ragg")), "method is 'ragg'; choose one of direct, cot"),
        (dict(methods=()), "nothing to evaluate"),
        (dict(data=dict(sets=())), "nothing to evaluate"),
    ],
)
def test_a_table_that_cannot_be_made_is_refused(change, told, tmp_path):
    config = config_flags.load("configs/eval.py")
    config.update(change)
    with pytest.raises(UserError, match=told):
        evaluate.run(config, str(tmp_path))


def test_odd_sets_and_files_are_refused(tmp_path, questions):
    with pytest.raises(UserError, match="'world' is no set; give SOURCE/SPLIT"):
        evaluate.load_set("world", None)
    with pytest.raises(UserError, match="moon: not a data source"):
        evaluate.load_set("moon/test", None)
    assert len(evaluate.load_set(str(questions), 5)) == 5
    old = tmp_path / "evaluation.json"
    old.write_text('{"world/test": {}}')
    with pytest.raises(UserError, match="holds no list of rows; remove it"):
        evaluate.read_rows(old)


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
    figures = episode_metrics([right, wrong])
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
    assert "did you mean --config.optimizer.learning_rate?" in error


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
    from zerosearch_jax.data.embedded import world

    half = tmp_path / "facts.jsonl"
    data = world.FACTS_PATH.read_bytes()
    half.write_bytes(data[: len(data) // 2])
    monkeypatch.setattr(world.load_entities, "__defaults__", (half,))
    error = _refusal(capsys, *_command(markov_model, questions, tmp_path)[1:])
    assert str(half) in error


def test_indexing_the_world_says_nothing(caplog):
    from zerosearch_jax.data.embedded.world import Passage
    from zerosearch_jax.search.bm25 import BM25Engine

    BM25Engine([Passage("p", "e", "t", "a capital", ())])
    assert caplog.records == []
