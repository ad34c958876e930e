"""Tests of the collect job: its files, resuming after a kill, and its error messages."""

import json
from collections import Counter
from pathlib import Path

import pytest

from zerosearch_jax import config_flags
from zerosearch_jax.data.qa import QARow
from zerosearch_jax.data.records import Records
from zerosearch_jax.errors import UserError
from zerosearch_jax.jobs import collect
from zerosearch_jax.rl.rewards import exact_match, token_f1
from zerosearch_jax.simulator.pairs import load_pairs, stable_hash
from zerosearch_jax.text.actions import final_answer
from zerosearch_jax.training import inputs
from zerosearch_jax.training.job_configs import CollectConfig

ROOT = Path(__file__).parents[2]
FILES = ("episodes.jsonl", "labels.jsonl", "pairs.jsonl", "heldout.jsonl", "summary.json")

pytestmark = pytest.mark.usefixtures("compiled_once")


@pytest.fixture(scope="module")
def config_path(tmp_path_factory, markov_model, questions) -> Path:
    """configs/collect.py for seconds: 12 questions, 4 episodes each, in 3 batches."""
    changes = dict(
        policy=dict(
            model=str(markov_model),
            generator=dict(
                slots=8,
                max_tokens=384,
                prefill_rows=8,
                prefill_buckets=(64, 256),
                decode_rows=(),
                chunk_tokens=8,
                window_tokens=384,
            ),
        ),
        search=dict(engine="bm25", corpus="world"),
        labeling=dict(kind="none"),
        data=dict(source=str(questions)),
        limits=dict(max_turns=2, response_tokens=12, observation_tokens=48),
        collect=dict(samples=4, temperature=1.0, batch_questions=5),
        extract=dict(label_by="rule", heldout_share=0.675),  # The hash holds out Peru, not Chad.
    )
    path = tmp_path_factory.mktemp("config") / "tiny_collect.py"
    path.write_text(
        "from zerosearch_jax import config_flags\n\n\n"
        "def get_config():\n"
        f"    config = config_flags.load({str(ROOT / 'configs' / 'collect.py')!r})\n"
        f"    config.update({changes!r})\n"
        "    return config\n"
    )
    return path


@pytest.fixture
def config(config_path):
    return config_flags.load(str(config_path))


@pytest.fixture(scope="module")
def finished(config_path, tmp_path_factory) -> Path:
    """The workdir of an uninterrupted run."""
    workdir = tmp_path_factory.mktemp("finished")
    collect.run(config_flags.load(str(config_path)), str(workdir))
    return workdir


def _lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_episode_is_a_complete_record(finished, markov_model):
    episodes = _lines(finished / "episodes.jsonl")
    assert [e["id"] for e in episodes] == [f"q{q}#{s}" for q in range(12) for s in range(4)]
    for episode in episodes:
        assert episode["question"].endswith(f" {episode['question_id'][1:]}?")
        texts = [turn["text"] for turn in episode["turns"]]
        assert episode["answer"] == final_answer(texts)
        assert episode["em"] == exact_match(episode["answer"], episode["golden_answers"])
        assert episode["f1"] == token_f1(episode["answer"], episode["golden_answers"])
        queries = [
            (i, turn["content"])
            for i, turn in enumerate(episode["turns"][:2])
            if turn["kind"] == "search"
        ]
        assert queries == [(search["turn"], search["query"]) for search in episode["searches"]]
        assert all(len(s["documents"]) == 2 and s["failure"] == "" for s in episode["searches"])
        assert (episode["engine"], episode["model"]) == ("bm25", str(markov_model))
        assert 0 < episode["policy_tokens"] < episode["tokens"]
    assert {e["finish"] for e in episodes} == {"answer", "turns"}
    assert {e["em"] for e in episodes} == {0.0, 1.0}
    # The samples of a question differ.
    assert any(
        len({e["turns"][0]["text"] for e in episodes[i : i + 4]}) > 1 for i in range(0, 48, 4)
    )


def test_labels_follow_the_rule_and_pairs_follow_the_labels(finished):
    episodes = {e["id"]: e for e in _lines(finished / "episodes.jsonl")}
    labels = {record["id"]: record for record in _lines(finished / "labels.jsonl")}
    searches = {f"{e['id']}/{s['turn']}": (e, s) for e in episodes.values() for s in e["searches"]}
    assert labels.keys() == searches.keys()
    for id_, record in labels.items():
        episode, search = searches[id_]
        assert record["rule"] == ("useful" if episode["em"] else "noisy")
        assert record["labeler"] is None
        assert (record["episode"], record["turn"]) == (episode["id"], search["turn"])
    train = load_pairs(finished / "pairs.jsonl")
    heldout = load_pairs(finished / "heldout.jsonl")
    for pair in (*train, *heldout):
        episode, search = searches[pair.id]
        assert (pair.query, pair.question) == (search["query"], episode["question"])
        assert list(pair.documents) == search["documents"]
        assert list(pair.golden_answers) == episode["golden_answers"]
        assert pair.label == labels[pair.id]["rule"]
        assert pair.last == (search == episode["searches"][-1])
    for part in (train, heldout):
        assert len({(p.question, p.query, p.label) for p in part}) == len(part) > 0
        labels_of_part = Counter(pair.label for pair in part)
        assert labels_of_part["useful"] == labels_of_part["noisy"]
    assert not {p.golden_answers for p in train} & {p.golden_answers for p in heldout}


def test_the_summary_agrees_with_the_files(finished):
    summary = json.loads((finished / "summary.json").read_text())
    episodes = _lines(finished / "episodes.jsonl")
    assert summary["episodes"] == 48
    assert summary["em"] == sum(e["em"] for e in episodes) / 48
    assert summary["finish"] == Counter(e["finish"] for e in episodes)
    stages = summary["stages"]
    assert summary["searches"] == stages["searches"]["all"] == stages["labelled"]["all"]
    assert stages["train"]["all"] == len(_lines(finished / "pairs.jsonl"))
    assert stages["held out"]["all"] == len(_lines(finished / "heldout.jsonl"))
    assert (summary["agreement"], summary["label_by"]) == (None, "rule")


@pytest.mark.parametrize("share", [0.2, 0.73])
def test_resume_after_a_cut_file_is_bit_identical(config, finished, tmp_path, share, capsys):
    whole = (finished / "episodes.jsonl").read_bytes()
    (tmp_path / "episodes.jsonl").write_bytes(whole[: int(share * len(whole))])
    labels = (finished / "labels.jsonl").read_bytes()
    (tmp_path / "labels.jsonl").write_bytes(labels[: int(share * len(labels))])
    collect.run(config, str(tmp_path))
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (finished / name).read_bytes(), name
    printed = capsys.readouterr().out
    assert ("step 1/3" in printed, "step 3/3" in printed) == (share < 1 / 3, True)


def test_more_questions_and_samples_keep_earlier_episodes(config, finished, tmp_path):
    config.data.limit, config.collect.samples = 6, 2
    collect.run(config, str(tmp_path))
    before = _lines(tmp_path / "episodes.jsonl")
    whole = {record["id"]: record for record in _lines(finished / "episodes.jsonl")}
    assert len(before) == 12
    assert [whole[record["id"]] for record in before] == before
    config.data.limit, config.collect.samples = 12, 4
    collect.run(config, str(tmp_path))
    assert _lines(tmp_path / "episodes.jsonl")[:12] == before
    assert {r["id"]: r for r in Records(tmp_path / "episodes.jsonl")} == whole


def test_another_agent_or_labeler_needs_another_workdir(config, finished, tmp_path, monkeypatch):
    monkeypatch.setattr(inputs, "check_server", lambda *_: None)
    for name in ("episodes", "labels"):
        for suffix in (".jsonl", ".settings.json"):
            (tmp_path / f"{name}{suffix}").write_bytes((finished / f"{name}{suffix}").read_bytes())
    config.collect.temperature = 0.5
    with pytest.raises(
        UserError, match=r"episodes\.jsonl was made with config.collect.temperature=1"
    ):
        collect.run(config, str(tmp_path))
    config.collect.temperature = 1.0
    config.labeling.update(kind="server", model="m", url="http://127.0.0.1:1")
    with pytest.raises(UserError, match=r"labels\.jsonl was made with config.labeling.kind='none'"):
        collect.run(config, str(tmp_path))
    (tmp_path / "labels.jsonl").unlink()
    config.labeling.kind = "none"
    collect.run(config, str(tmp_path))  # All episodes exist, so no model is read.
    assert (tmp_path / "pairs.jsonl").read_bytes() == (finished / "pairs.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("name", "before", "after", "message"),
    [
        (
            "episodes.settings.json",
            '(content)": "',
            '(content)": "0',
            r"config.policy.model \(cont",
        ),
        ("episodes.jsonl", "number 1?", "number one?", "question of episode q1#0 has changed"),
        ("episodes.jsonl", '["Chad"]', '["Mali"]', "question of episode q0#0 has changed"),
        (
            "episodes.jsonl",
            None,
            None,
            r"labels\.jsonl labels the searches of episodes that are go",
        ),
    ],
)
def test_records_of_other_content_are_refused(
    config, finished, tmp_path, name, before, after, message
):
    """The paths in the config are those of the finished run; only the content differs."""
    for path in (*finished.glob("episodes.*"), *finished.glob("labels.*")):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    text = (tmp_path / name).read_text()
    assert before is None or before in text
    (tmp_path / name).write_text("" if before is None else text.replace(before, after))
    with pytest.raises(UserError, match=message):
        collect.run(config, str(tmp_path))


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("labels.settings.json", "[1]", "expected an object"),
        ("episodes.settings.json", '{"format": "', "not JSON"),
        ("labels.jsonl", '{"id": "q0#0/0"}\n', "row 1: episode is missing"),
        ("episodes.jsonl", '{"id": "q0#0", "searches": {}}\n', "row 1: question is missing"),
    ],
)
def test_damaged_files_are_refused_before_the_first_episode(
    config, finished, tmp_path, monkeypatch, name, content, part
):
    monkeypatch.setattr(collect, "make_rollouts", lambda *_: pytest.fail("collects episodes"))
    for path in (*finished.glob("episodes.*"), *finished.glob("labels.*")):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    cut = (tmp_path / "episodes.jsonl").read_bytes()[:-9]  # the last episode is missing
    (tmp_path / "episodes.jsonl").write_bytes(cut)
    (tmp_path / name).write_text(content)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(UserError, match=f"{name}.*{part}"):
        collect.run(config, str(tmp_path))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_labels_of_a_workdir_from_another_version_are_refused(config, finished, tmp_path):
    for name in FILES[:2]:
        (tmp_path / name).write_bytes((finished / name).read_bytes())
    (tmp_path / "labels.settings.json").write_text('{"judge.kind": "none"}')
    with pytest.raises(UserError, match="older version.*--workdir"):
        collect.run(config, str(tmp_path))


def test_pairs_can_take_the_labelers_labels(config, finished, tmp_path, monkeypatch, capsys):
    def labeler(searches):
        assert len(searches) <= 7
        # Question 3 is useful, 5 undecided, the others noisy.
        number = [int(question.split("number ")[1].split("?")[0]) for question, *_ in searches]
        return [{3: "useful", 5: None}.get(n, "noisy") for n in number]

    for name in ("episodes.jsonl", "episodes.settings.json"):
        (tmp_path / name).write_bytes((finished / name).read_bytes())
    monkeypatch.setattr(collect, "make_labeler", lambda *_: labeler)
    config.labeling.update(kind="local", model=config.policy.model, batch=7)
    config.extract.update(label_by="labeler", balance=False, heldout_share=0.0)
    collect.run(config, str(tmp_path))
    labels = _lines(tmp_path / "labels.jsonl")
    expected = {"q3": "useful", "q5": None}
    for record in labels:
        assert record["labeler"] == expected.get(record["episode"].split("#")[0], "noisy")
    pairs = load_pairs(tmp_path / "pairs.jsonl")
    assert {p.id.split("#")[0] for p in pairs if p.label == "useful"} == {"q3"}
    assert not [p for p in pairs if p.id.startswith("q5#")]
    agreed = json.loads((tmp_path / "summary.json").read_text())["agreement"]
    assert agreed["unclear"] == sum(r["labeler"] is None for r in labels) > 0
    assert agreed["searches"] + agreed["unclear"] == len(labels)
    assert f"kappa {agreed['kappa']:.3f}" in capsys.readouterr().out


def test_the_summary_counts_failed_searches_by_kind_and_names_their_servers(capsys):
    def episode(*searches):
        return {"em": 1.0, "f1": 1.0, "finish": "answer", "searches": searches}

    url = "http://10.0.0.1/retrieve"
    failed = {"failure": "Timeout", "failure_kind": "timeout", "address": url}
    other = {"failure": "no", "failure_kind": "other", "address": ""}
    totals = collect.episode_totals([episode(failed, {"failure": ""}), episode(failed, other)])
    assert totals["failed_searches"] == {"timeout": 2, "other": 1}
    assert totals["failed_addresses"] == [url] and totals["searches"] == 4
    collect.print_counts(totals, {})
    assert f"2 by timeout, 1 by other (asked {url})" in capsys.readouterr().out


def test_episode_numbers_are_hashes_of_the_id(monkeypatch):
    ids = [f"q{i}#0" for i in range(200)]
    numbers = collect.episode_numbers(ids)
    assert len(set(numbers.values())) == 200 and all(0 <= n < 2**32 for n in numbers.values())
    assert collect.episode_numbers(ids[::-1]) == numbers
    # Pinned, so that old workdirs stay valid: blake2b, 8 bytes, big-endian, of "q0#0".
    assert numbers["q0#0"] == stable_hash("q0#0") % 2**32 == Q0_NUMBER
    monkeypatch.setattr(collect, "stable_hash", lambda key: 2**32 - 1)
    assert collect.episode_numbers("ab") == {"a": 2**32 - 1, "b": 0}


Q0_NUMBER = 50171441


def test_repeated_ids_of_merged_sets_get_their_source():
    rows = [QARow("t0", "a", ("x",), "nq"), QARow("t0", "b", ("x",), "hotpotqa")]
    named = collect.with_unique_ids(rows)
    assert [(row.id, row.question) for row in named] == [("t0", "a"), ("hotpotqa/t0", "b")]
    with pytest.raises(UserError, match="question 3 has the id 't0'"):
        collect.with_unique_ids([*rows, rows[1]])


@pytest.mark.parametrize("preset", ["", ":smollm2-135m-wikipedia"])
def test_presets_pass_the_checks_and_episodes_fit(preset):
    config = config_flags.load(str(ROOT / "configs" / "collect.py") + preset)
    config_flags.typed(CollectConfig, config)
    assert config.is_locked and config.job == "collect"
    turns, limits = config.limits.max_turns, config.limits
    episode = (turns + 1) * limits.response_tokens + turns * limits.observation_tokens
    if preset:  # With a prompt of 192 tokens, no episode is cut by its length.
        assert 192 + episode <= config.policy.generator.max_tokens


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        ("collect", {"samples": 0}, "samples=0"),
        ("collect", {"batch_questions": 0}, "batch_questions=0"),
        ("extract", {"label_by": "vote"}, "label_by='vote' must be one of rule, labeler, both"),
        ("extract", {"label_by": "both"}, "labeling.kind"),
        ("extract", {"heldout_share": 1.0}, "heldout_share=1.0"),
        ("labeling", {"kind": "best"}, "labeling.kind"),
    ],
)
def test_a_bad_config_is_refused_before_any_work(config, tmp_path, section, change, message):
    config[section].update(change)
    with pytest.raises(UserError, match=message):
        collect.run(config, str(tmp_path / "new"))
    assert not (tmp_path / "new").exists()
