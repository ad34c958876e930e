"""Damaged files of a workdir: each reader reads them or refuses them in one line.

The reader and the code that uses its result return, or raise a UserError that names the file and a
fix. A refusal leaves the file as it is.
"""

import copy
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zerosearch_jax.checkpoints import Checkpoints
from zerosearch_jax.data.records import Records
from zerosearch_jax.errors import UserError
from zerosearch_jax.experiments import algorithms, claims, miniature, miniature_report, stages
from zerosearch_jax.files import FORMAT
from zerosearch_jax.jobs import collect, evaluate, rl
from zerosearch_jax.simulator import gate
from zerosearch_jax.simulator.labeling import agreement, chosen_labels
from zerosearch_jax.simulator.pairs import extract_pairs
from zerosearch_jax.telemetry.collapse import CollapseWatch
from zerosearch_jax.telemetry.recorder import earlier_rows
from zerosearch_jax.training.fingerprints import check_base
from zerosearch_jax.training.workdir import check_workdir, keep_config

SUMMARY = {
    **{"em": 0.5, "em_interval": [0.4, 0.6], "f1": 0.5, "f1_interval": [0.4, 0.6]},
    **{"questions": 2, "searches_per_episode": 1.5, "failed_search_ratio": 0.25},
    "failed_searches": {"timeout": 1},
}
CASE = {
    **{"model": "m", "method": "rag", "engine": "bm25", "set": "world/test", "limit": None},
    "settings": {"format": FORMAT, "engine": {"noise": 0.5}},
    "fingerprints": {"model": "a", "questions": "b", "engine": "c"},
}
CONFIG = {
    **{"format": FORMAT, "seed": 0, "policy": {"model": "m"}, "lora": {"rank": 2, "alpha": 32.0}},
    "contents": {"policy.model": "a"},
}
IDENTITY = {"weights": "a", "form": "finetuned"}
ANSWERS = [{"policy": name, "em": 1.0, "f1": 1.0} for name in ("base", "trained")]
METRICS = [
    {"step": step, "seconds/step": 1.0, "em": 0.5, "reward": math.nan, "eval/em": 0.5}
    for step in (1, 2)
]


def _search(turn: int) -> dict:
    return {"turn": turn, "query": f"q{turn}", "documents": ["d"]} | dict.fromkeys(
        ("failure", "failure_kind", "address"), ""
    )


EPISODES = [
    {
        **{"id": f"e{i}", "question": "Who?", "golden_answers": ["Ada"], "answer": None},
        **{"em": 1.0, "f1": 1.0, "finish": "answer", "searches": [_search(0), _search(1)]},
    }
    for i in range(2)
]
LABELS = [
    {"id": f"e{i}/{turn}", "episode": f"e{i}", "turn": turn, "rule": "useful", "labeler": None}
    for i in range(2)
    for turn in range(2)
]


def _metrics(path: Path) -> None:
    rows = earlier_rows(path, math.inf, rl.NEEDED)
    watch = CollapseWatch(window=1)
    for row in rows:
        watch.update(row)
    sum(row["seconds/step"] for row in rows)


def _evaluation(path: Path) -> None:
    rows = evaluate.read_rows(path)
    evaluate.changed(CASE, rows)
    [evaluate._is_stale(row, CASE) for row in rows]
    if evaluate._rows_of(CASE, rows):
        evaluate.table([CASE], rows, "title")


def _episodes(path: Path) -> None:
    episodes = Records(path, collect.EPISODE)
    row = SimpleNamespace(question="Who?", golden_answers=("Ada",))
    collect.check_questions(episodes, {"e1": row})
    labels = {f"{e['id']}/{s['turn']}": "useful" for e in episodes for s in e["searches"]}
    extract_pairs(episodes, labels, topk=1, last_only=True, balance=True, heldout_share=0.5, seed=0)
    if len(episodes):
        collect.episode_totals(episodes)


def _labels(path: Path) -> None:
    labels = Records(path, collect.LABEL)
    for label_by in ("rule", "labeler", "both"):
        chosen_labels(labels, label_by)
    agreement([(record["rule"], record["labeler"]) for record in labels])


def _settings(path: Path) -> None:
    records = Records(path.with_name("episodes.jsonl"))
    collect.check_settings(records, {"format": FORMAT, "seed": 0, "search": {"topk": 3}})


def _config(path: Path) -> None:
    workdir = path.parent
    (workdir / "checkpoints" / "1").mkdir(parents=True, exist_ok=True)
    lora = SimpleNamespace(rank=2, alpha=32.0)
    config = SimpleNamespace(policy=SimpleNamespace(model="m"), lora=lora)
    check_base(workdir, check_workdir(workdir), config, "a")
    keep_config(CONFIG, workdir)


def _gate(path: Path) -> None:
    gate.check(path, IDENTITY, reader_em_useful_min=0.5, reader_em_noisy_max=0.5)


def _stages(path: Path) -> None:
    log = Records(path, stages.RECORD)
    stage = stages.Stage("a", ("--x",), "done")
    stages.check_finished([stage], [], path.parent, log)
    miniature.busy_seconds(log)


def _arm_run(path: Path) -> None:
    run = miniature.arm_run(path.parents[1], "ppo", 1)
    rows = claims.evaluate_claims([run, miniature.base_run(path.parent, "base")])
    config = SimpleNamespace(noise_arms=("ppo",))
    curves = miniature.noise_curves(config, [run])
    assert rows and len(curves) <= 1


def _methods(path: Path) -> None:
    config = SimpleNamespace(start_policies={}, baselines=(), arms=())
    rows = miniature.methods_rows(config, path.parents[1], [])
    [miniature_report._method_cells(row) for row in rows]


def _simulator_rows(path: Path) -> None:
    miniature_report._table(miniature.simulator_rows(path.parents[1]))


def _checkpoint(path: Path) -> None:
    state = {"w": jnp.zeros(4)}
    directory = path.parents[1] if path.parents[1].name == "run" else path.parents[2]
    with Checkpoints(directory, rl.METADATA) as checkpoints:
        restored, kept = checkpoints.restore(None, state)
        assert restored["w"].tolist() == [checkpoints.latest_step()] * 4
        checkpoints.improves(kept["kl_coef"])


Reader = Callable[[Path], None]
READERS: dict[str, tuple[str, object, Reader]] = {
    "metrics": ("metrics.jsonl", METRICS, _metrics),
    "evaluation": ("evaluation.json", [CASE | SUMMARY | {"em_of_each": [1.0, 0.0]}], _evaluation),
    "episodes": ("episodes.jsonl", EPISODES, _episodes),
    "labels": ("labels.jsonl", LABELS, _labels),
    "settings": (
        "episodes.settings.json",
        {"format": FORMAT, "seed": 0, "search": {"topk": 3}},
        _settings,
    ),
    "config": ("config.json", CONFIG, _config),
    "gate report": (
        "report.json",
        {
            "simulators": {"tuned": IDENTITY, "other": {}},
            "rows": [
                {"source": "tuned", "label": label, "queries": "useful", "reader_em": em}
                for label, em in (("useful", 0.9), ("noisy", 0.1))
            ],
        },
        _gate,
    ),
    "stages": (
        "stages.jsonl",
        [{"id": "a@2", "ended": 2.0, "seconds": 1.0, "recipe": ["--x", ""]}],
        _stages,
    ),
    "summary": (
        "summary.json",
        {"base": SUMMARY, "trained": SUMMARY, "split": "test", "engine": "bm25"},
        algorithms.read_summary,
    ),
    "arm's summary": (
        "ppo-1/summary.json",
        {"engine": "bm25", "trained": {"searches_per_episode": 1.5}},
        _arm_run,
    ),
    "arm's metrics": ("ppo-1/metrics.jsonl", METRICS, _arm_run),
    "arm's answers": ("ppo-1/answers.jsonl", ANSWERS, _arm_run),
    "arm's noise": (
        "noise-ppo-1/evaluation.json",
        [{"settings": {"engine": {"noise": 0.5}}, "em_of_each": [0.0, 1.0]}],
        lambda path: _arm_run(path.parents[1] / "ppo-1" / "x"),
    ),
    "methods": ("methods-sft/evaluation.json", [CASE | SUMMARY], _methods),
    "simulator rows": ("simulator_report/report.json", {"rows": [{"a": 1}]}, _simulator_rows),
}
"""Kind: the file below a workdir, its content (a list of rows for JSON lines), its reader."""
CHECKPOINT_FILES = ("metadata/metadata", "checksums.json", "_CHECKPOINT_METADATA")


def _write(path: Path, content: object) -> bytes:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in content))
    else:
        path.write_text(json.dumps(content, indent=1) + "\n")
    return path.read_bytes()


HUGE = "HUGE"
ODD = [None, True, -1, 3, 0.5, math.nan, 10**400, "", "x", "\ud800", "a\nb", HUGE, [], {}, [[]]]
OUTER = (b"[]", b"{}", b"null", b'"x"', b"3", b"", b"\xff\xfe", b"\0" * 64, b"[" * 100_000)


@st.composite
def damaged(draw, content: bytes) -> bytes:
    """Returns a mutation of a JSON or JSON-lines file."""
    kind = draw(st.sampled_from(["bytes", "outer", "key", "value", "value", "value", "nested"]))
    if kind == "bytes":
        start = draw(st.integers(0, len(content)))
        end = min(len(content), start + draw(st.integers(0, 40)))
        new = draw(st.sampled_from([b"", b"\0" * (end - start)]) | st.binary(max_size=12))
        return content[:start] + new + content[draw(st.sampled_from([end, len(content)])) :]
    lines = content.splitlines(keepends=True)
    rows = lines if lines[0].rstrip().endswith((b"}", b"]")) else [content]  # lines, or one text
    number = draw(st.integers(0, len(rows) - 1))
    if kind == "outer":
        new = draw(st.sampled_from(OUTER)) + b"\n"
    else:
        row = copy.deepcopy(json.loads(rows[number]))
        parent, node = None, row
        while isinstance(node, dict | list) and node and (parent is None or draw(st.booleans())):
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            parent, key = node, draw(st.sampled_from(keys))
            node = parent[key]
        if kind == "key":
            del parent[key]
        elif kind == "nested":
            for _ in range(draw(st.sampled_from([1, 90, 300, 900]))):
                parent[key] = [parent[key]]
        else:
            parent[key] = draw(st.sampled_from(ODD))
        new = json.dumps(row).replace(f'"{HUGE}"', "9" * 5000).encode() + b"\n"
    return b"".join([*rows[:number], new, *rows[number + 1 :]])


def _refused_in_one_line(error: UserError, path: Path) -> None:
    message = str(error)
    assert str(path) in message and "\n" not in message and ";" in message, message
    message.encode()  # can be printed


def _fuzz(tries: int, content: bytes, attempt: Callable[[bytes], None]) -> None:
    quiet = settings(settings.get_profile("fuzz"), max_examples=tries)
    quiet(given(damaged(content))(attempt))()


@pytest.mark.parametrize("tries", [12, pytest.param(150, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", READERS)
def test_a_damaged_file_is_read_or_refused_in_one_line(kind, tries, tmp_path, tally):
    others = {name: content for name, content, _ in READERS.values()}
    for name, content in others.items():
        _write(tmp_path / name, content)
    name, content, read = READERS[kind]
    path = tmp_path / name
    valid = _write(path, content)
    read(path)  # the undamaged file is read

    def attempt(damage: bytes) -> None:
        path.write_bytes(damage)
        tally("damaged files of a workdir")
        try:
            read(path)
        except UserError as error:
            _refused_in_one_line(error, tmp_path)
            assert path.read_bytes() == damage  # a refusal changes nothing

    _fuzz(tries, valid, attempt)


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory):
    directory = tmp_path_factory.mktemp("checkpoints") / "run"
    with Checkpoints(directory, rl.METADATA) as checkpoints:
        for step in (1, 2):
            kept = {"kl_coef": float(step), "skipped_in_a_row": 0, "rollbacks": 0}
            checkpoints.save(step, {"w": jnp.full(4, float(step))}, kept, score=0.1 * step)
    return directory


@pytest.mark.parametrize("tries", [4, pytest.param(100, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", CHECKPOINT_FILES)
def test_a_damaged_checkpoint_is_skipped_or_refused_in_one_line(
    name, tries, two_checkpoints, tmp_path, tally
):
    run = tmp_path / "run"

    def attempt(damage: bytes) -> None:
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(two_checkpoints, run)
        if name != "checksums.json":  # a valid checksum would reveal any other damage
            (run / "2" / "checksums.json").unlink()
        (run / "2" / name).write_bytes(damage)
        tally("damaged checkpoints")
        try:
            _checkpoint(run / "2" / "x")
        except UserError as error:  # its "leaves" are of another config
            _refused_in_one_line(error, run)
            assert (run / "2" / name).read_bytes() == damage

    _fuzz(tries, (two_checkpoints / "2" / name).read_bytes(), attempt)
