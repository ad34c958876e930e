"""Tests of the evaluate job end to end on a tiny model, and of its error messages."""

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from zerosearch_jax import config_flags, main
from zerosearch_jax.data.qa import QARow
from zerosearch_jax.errors import UserError
from zerosearch_jax.evaluation.intervals import bootstrap_interval, wilson_interval
from zerosearch_jax.jobs import evaluate
from zerosearch_jax.rollout.trajectory import Episode, Trajectory, Turn
from zerosearch_jax.search.engine import SearchRequest, SearchResult
from zerosearch_jax.text.actions import parse_action
from zerosearch_jax.training.job_configs import EvaluateConfig

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
    case = [row[key] for key in ("model", "method", "engine", "set", "limit")]
    assert case == [str(markov_model), "search", "bm25", str(questions), 6]
    # The Markov policy greedily answers "Chad", which is right for half of the questions.
    assert row["em"] == row["f1"] == 0.5
    assert row["em_interval"] == pytest.approx(wilson_interval(3, 6))
    assert row["f1_interval"] == list(bootstrap_interval([1.0, 0.0] * 3))
    assert (row["questions"], row["searches_per_episode"]) == (6, 0)
    printed = capsys.readouterr().out
    score = r"0\.500 +\[0\.\d{3}, \d\.\d{3}\]"
    table = rf"search  bm25  {questions} +{score} +{score} +0\.00 +6\n"
    assert re.search(table, printed)
    assert re.search(table, (tmp_path / "evaluation.txt").read_text())


ALL = "--config.methods=('direct','cot','rag','search','search_o1')"
CASES = [
    ("direct", "none"),
    ("cot", "none"),
    ("rag", "bm25"),
    ("search", "bm25"),
    ("search_o1", "bm25"),
]


def test_an_interrupted_evaluation_resumes_with_the_missing_rows(
    markov_model, questions, tmp_path, monkeypatch, capsys
):
    command = _command(markov_model, questions, tmp_path, "--config.data.limit=6", ALL)
    path = tmp_path / "evaluation.json"
    run_method, methods_run = evaluate.run_method, []

    def interrupted(method, *arguments, **options):
        methods_run.append(method)
        if len(methods_run) == 3:
            raise KeyboardInterrupt
        return run_method(method, *arguments, **options)

    monkeypatch.setattr(evaluate, "run_method", interrupted)
    assert main.cli(command) == 130
    first_rows = json.loads(path.read_text())
    assert [(row["method"], row["engine"]) for row in first_rows] == CASES[:2]

    assert main.cli(command) == 0  # resumes with the third case
    assert methods_run == ["direct", "cot", "rag", "rag", "search", "search_o1"]
    rows = json.loads(path.read_text())
    assert rows[:2] == first_rows
    assert [(row["method"], row["engine"]) for row in rows] == CASES
    assert [row["searches_per_episode"] for row in rows] == [0, 0, 1, 0, 0]
    assert all((row["em"], row["questions"]) == (0.5, 6) for row in rows)
    table = capsys.readouterr().out
    assert [tuple(line.split()[:2]) for line in table.splitlines() if str(questions) in line] == (
        CASES
    )

    def fail(*_, **__):
        raise AssertionError("a finished case ran again")

    monkeypatch.setattr(evaluate, "run_method", fail)
    monkeypatch.setattr(evaluate.factory, "load_model", fail)
    assert main.cli(command) == 0
    assert json.loads(path.read_text()) == rows
    # A different engine under the same name is a different case.
    with pytest.raises(AssertionError, match="ran again"):
        main.cli([*command, "--config.engines.bm25.topk=1"])


def _cases(config) -> list[dict]:
    sets = {name: [QARow("1", "Who?", ("Ada",), name)] for name in config.data.sets}
    config = config_flags.typed(EvaluateConfig, config)
    return evaluate.eval_cases(config, evaluate.selection(config), sets)


def test_settings_that_change_results_identify_an_eval_case():
    config = config_flags.load("configs/eval.py:simulated")
    config.methods = ("direct", "search")
    cases = _cases(config)
    assert [(c["method"], c["engine"], c["set"]) for c in cases] == [
        (method, engine, f"world/{split}")
        for method, engine in (("direct", "none"), ("search", "bm25"), ("search", "simulated"))
        for split in ("test", "compositions", "validation")
    ]
    assert cases == json.loads(json.dumps(cases))
    config.limits.max_turns = 2
    assert not any(case in cases for case in _cases(config))


@dataclass(frozen=True)
class Job:
    """A small evaluate job whose episodes are given, and the files that it reads."""

    config: ConfigDict
    workdir: Path
    model: Path
    questions: Path
    corpus: Path
    failing: set[str]  # engines whose searches fail

    def run(self) -> list[str]:
        """Runs the job; returns the engines whose cases ran."""
        ran = []

        def evaluate_cases(config, cases, question_sets):
            for case in cases:
                ran.append(case["engine"])
                yield case, [_answered(row, case["engine"] in self.failing)
                             for row in question_sets[case["set"]]]  # fmt: skip

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(evaluate, "evaluate_cases", evaluate_cases)
            try:
                evaluate.run(self.config, str(self.workdir))
            except UserError as error:
                ran.append(str(error))
        return ran

    def rows(self) -> list[dict]:
        return json.loads((self.workdir / "evaluation.json").read_text())


def _answered(row: QARow, failed: bool) -> Trajectory:
    trajectory = Trajectory(Episode(0, row.question, row.golden_answers), finish="answer")
    text = f"<answer>{row.golden_answers[0]}</answer>"
    trajectory.turns.append(Turn(text, parse_action(text)))
    request = SearchRequest(0, 0, "q", row.question, row.golden_answers)
    failure = "POST /retrieve: HTTP 404" if failed else ""
    trajectory.searches.append((request, SearchResult(request.key, (), failure)))
    return trajectory


@pytest.fixture
def job(tmp_path, markov_model, questions) -> Job:
    config = config_flags.load("configs/eval.py:retriever")
    paths = [tmp_path / name for name in ("model", "questions.jsonl", "passages.jsonl")]
    shutil.copytree(markov_model, paths[0])
    shutil.copy(questions, paths[1])
    paths[2].write_text('{"id": "1", "contents": "Chad\\nChad lies in Africa."}\n')
    engines = dict(bm25=dict(engine="bm25", topk=1, corpus=str(paths[2])))
    engines["other"] = config.engines.retriever.to_dict() | dict(engine="bm25")
    config.unlock()
    config.engines = engines
    config.policy.model, config.data.sets = str(paths[0]), (str(paths[1]),)
    return Job(config, tmp_path / "run", *paths, failing=set())


def _append(path: Path, text: str) -> None:
    path.write_text(path.read_text() + text)


def _retrain(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


CHANGES = {
    "nothing": (lambda job: None, []),
    "weights": (lambda job: _retrain(job.model / "model.safetensors"), ["bm25", "other"]),
    "tokenizer": (lambda job: _append(job.model / "tokenizer.json", " "), ["bm25", "other"]),
    "questions": (
        lambda job: job.questions.write_text(job.questions.read_text().replace("Peru", "Mali")),
        ["bm25", "other"],
    ),
    "passages": (lambda job: _append(job.corpus, "\n"), ["bm25"]),
    "limits": (lambda job: job.config.limits.update(max_turns=2), ["bm25", "other"]),
    "retries": (lambda job: job.config.engines.other.remote.update(attempts=9), []),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_row_is_evaluated_again_exactly_if_an_input_has_changed(job, name, capsys):
    assert job.run() == ["bm25", "other"]
    before = job.rows()
    change, engines = CHANGES[name]
    change(job)
    capsys.readouterr()
    assert job.run() == engines
    assert job.run() == []
    assert capsys.readouterr().out.count("runs again, because") == len(engines)
    # Stale rows are removed; rows of other settings are kept.
    assert len(job.rows()) == (4 if name == "limits" else 2)
    assert (before == job.rows()) is not bool(engines)


def test_failed_searches_are_no_result_and_run_again(job, capsys):
    job.failing.add("other")
    *ran, error = job.run()
    assert ran == ["bm25", "other"] and "1 of 2 rows have no result" in error
    printed = capsys.readouterr().out
    assert "12 of 12 searches failed" in printed and "HTTP 404" in printed
    assert "config.engines.other" in printed
    assert [row["engine"] for row in job.rows()] == ["bm25"]
    assert not (job.workdir / "evaluation.txt").exists()
    job.failing.add("bm25")
    _append(job.corpus, "\n")
    assert job.run()[:2] == ["bm25", "other"]
    assert job.rows() == []  # the stale row is gone, too
    job.failing.clear()
    assert job.run() == ["bm25", "other"]
    assert (job.workdir / "evaluation.txt").exists()
    job.config.max_failed_searches = 1.0  # accepts an engine that always fails
    job.failing.add("bm25")
    job.config.limits.max_turns = 2
    assert job.run() == ["bm25", "other"]


def test_a_dead_server_is_refused_before_the_model_is_loaded(job):
    job.config.engines.other.update(engine="retriever")
    job.config.engines.other.remote.update(url="http://127.0.0.1:9")
    (error,) = job.run()
    assert "config.engines.other" in error and "http://127.0.0.1:9" in error
    assert not job.workdir.exists()


@pytest.mark.parametrize(
    ("section", "url", "refusal"),
    [
        ("engines.retriever.remote", "http://h:1/retrieve/", ""),
        ("engines.simulated.simulator", "http://h:1/v1", ""),
        ("engines.simulated.simulator", "http://h:1/v1/chat/completions", ""),
        ("engines.simulated.simulator", "http://h:1/base", ""),
        ("engines.simulated.simulator", "h:1", "url=h:1.*http://"),
        ("engines.retriever.remote", "http://a:b@h:1", "url: the address has a user"),
    ],
)
def test_an_address_may_have_the_clients_path_but_no_password(section, url, refusal):
    config = config_flags.load(f"configs/eval.py:{section.split('.')[1]}")
    part = config
    for name in section.split("."):
        part = part[name]
    part.url = url
    if not refusal:
        config_flags.typed(EvaluateConfig, config)
        return
    with pytest.raises(UserError, match=refusal):
        config_flags.typed(EvaluateConfig, config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(methods=("search", "ragg")), r"methods\[1\]='ragg' must be one of direct, cot"),
        (dict(methods=()), "must not be empty"),
        (dict(data=dict(sets=())), "must not be empty"),
    ],
)
def test_an_unknown_method_or_empty_selection_is_refused(change, message, tmp_path):
    config = config_flags.load("configs/eval.py")
    config.update(change)
    with pytest.raises(UserError, match=message):
        evaluate.run(config, str(tmp_path))


def test_bad_question_sets_and_old_files_are_refused(tmp_path, questions):
    with pytest.raises(UserError, match="'world' is not a question set"):
        evaluate.load_set("world", None)
    with pytest.raises(UserError, match="moon: not a data source"):
        evaluate.load_set("moon/test", None)
    assert len(evaluate.load_set(str(questions), 5)) == 5
    old = tmp_path / "evaluation.json"
    old.write_text('{"world/test": {}}')
    with pytest.raises(UserError, match="evaluation.json: expected a list.*delete it"):
        evaluate.read_rows(old)


def _refusal(capsys, *arguments: str) -> str:
    """Runs a command that must fail; returns its one-line error."""
    assert main.cli(["main", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


def test_a_misspelt_key_gets_a_suggestion(capsys):
    error = _refusal(capsys, "--config=configs/grpo.py", "--config.rl.lernrate=1")
    assert "--config.rl.lernrate" in error
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
        *(["--config.data.source=world"] if "qwen" in config else []),  # its own file is absent
    )
    assert f"{model} holds no config.json" in error


def test_an_empty_data_file_is_named(markov_model, tmp_path, capsys):
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    error = _refusal(capsys, *_command(markov_model, empty, tmp_path)[1:])
    assert f"{empty}: the file has no rows" in error


def test_a_truncated_world_file_is_named(markov_model, questions, tmp_path, capsys, monkeypatch):
    from zerosearch_jax.data.embedded import world

    half = tmp_path / "facts.jsonl"
    data = world.FACTS_PATH.read_bytes()
    half.write_bytes(data[: len(data) // 2])
    monkeypatch.setattr(world.load_entities, "__defaults__", (half,))
    error = _refusal(capsys, *_command(markov_model, questions, tmp_path)[1:])
    assert str(half) in error


def test_indexing_the_world_logs_nothing(caplog):
    from zerosearch_jax.search.bm25 import BM25Engine
    from zerosearch_jax.search.engine import Passage

    BM25Engine([Passage("p", "e", "t", "a capital", ())])
    assert caplog.records == []
