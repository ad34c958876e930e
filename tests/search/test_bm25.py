"""Tests of the BM25 engine."""

import re
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zerosearch_jax.data.embedded.world import corpus, load_entities, write_questions
from zerosearch_jax.errors import UserError
from zerosearch_jax.search.bm25 import BM25Engine
from zerosearch_jax.search.engine import Passage, SearchRequest
from zerosearch_jax.text import matching
from zerosearch_jax.text.matching import mentions, words


def passage(number: int, text: str) -> Passage:
    return Passage(str(number), "e", "t", text, ())


def request(query: str, episode: int = 0) -> SearchRequest:
    return SearchRequest(episode, 0, query, "question", ("answer",))


@pytest.fixture(scope="module")
def world():
    return load_entities()


@pytest.fixture(scope="module")
def engine(world):
    return BM25Engine(corpus(world))


def test_search_finds_the_capital_of_chad(engine):
    (result,) = engine.search([request("capital of Chad", episode=7)])
    assert result.key == (7, 0) and result.failure == ""
    assert len(result.documents) == 3
    assert "Chad" in result.documents[0] and "N'Djamena" in result.documents[0]


def test_results_are_independent_of_the_batch(engine):
    queries = ["capital of Chad", "", "zzzz qqqq", "of the"]
    alone = [engine.search([request(q, i)])[0] for i, q in enumerate(queries)]
    assert engine.search([request(q, i) for i, q in enumerate(queries)]) == alone
    assert [r.documents for r in alone[1:]] == [(), (), ()]
    assert engine.search([]) == []


def test_good_queries_find_the_answer_of_the_hop(world, engine):
    """Measured: 99.7 % of the hops of the test questions."""
    hops = [hop for q in write_questions(world, "test", 0) for hop in q.hops]
    ranked = [engine.ranked(hop.query, 3) for hop in hops]
    hits = [any(mentions(p.text, hop.answer) for p in found)
            for hop, found in zip(hops, ranked, strict=True)]  # fmt: skip
    assert len(hops) > 1000
    assert sum(hits) / len(hits) >= 0.99


def test_bare_name_is_a_poor_query(world, engine):
    """Measured: 54 %. If it were high, a policy could not learn anything about queries."""
    hops = [q.hops[-1] for q in write_questions(world, "test", 0)]
    ranked = [engine.ranked(hop.subject, 3) for hop in hops]
    hits = [any(mentions(p.text, hop.answer) for p in found)
            for hop, found in zip(hops, ranked, strict=True)]  # fmt: skip
    assert sum(hits) / len(hits) <= 0.65


def test_ties_go_to_the_first_passage_and_zero_scores_are_dropped():
    engine = BM25Engine([passage(i, "red fox" if i % 2 else "blue whale") for i in range(10)])
    assert [p.id for p in engine.ranked("fox", 3)] == ["1", "3", "5"]
    assert [p.id for p in engine.ranked("fox", 99)] == ["1", "3", "5", "7", "9"]


def test_ranking_follows_the_formula():
    """score = idf * tf / (tf + k1 * (1 - b + b * len / avglen)), idf as in Lucene."""
    texts = ["fox fox", "fox bird bird bird", "bird bird"]
    engine = BM25Engine([passage(i, t) for i, t in enumerate(texts)])
    assert [p.id for p in engine.ranked("fox", 3)] == ["0", "1"]  # higher frequency, fewer words
    assert [p.id for p in engine.ranked("bird fox", 3)] == ["1", "0", "2"]


def test_case_accents_and_punctuation_do_not_matter():
    engine = BM25Engine([passage(0, "N'Djamena and Brasilia."), passage(1, "The symbol is K.")])
    for query in ("n’djamena", "BRASÍLIA?"):
        assert [p.id for p in engine.ranked(query, 3)] == ["0"]
    assert [p.id for p in engine.ranked("k", 3)] == ["1"]


def test_chinese_and_japanese_are_found_by_character():
    texts = ["東京は日本の首都である", "大阪は日本の都市", "北京市是中国的首都", "パリ", "バリ島"]
    engine = BM25Engine([passage(i, t) for i, t in enumerate(texts)])
    for query, best in (("日本の首都", "0"), ("中国的首都", "2"), ("バリ", "4"), ("大阪", "1")):
        assert engine.ranked(query, 3)[0].id == best, query


@pytest.mark.parametrize(
    ("text", "name", "found"),
    [
        ("北京市是中国的首都。", "北京", True),
        ("東京は日本の首都である", "日本の首都", True),
        ("京北", "北京", False),
        ("バリ島", "パリ", False),  # the voicing signs are no accents
        ("Hauptstadt: Tokyo東京", "tokyo", True),
        ("party", "art", False),
    ],
)
def test_names_are_found_as_whole_words_or_characters(text, name, found):
    assert mentions(text, name) is found


LATIN = st.characters(max_codepoint=0x052F) | st.sampled_from("’“ẽṥ–ﬁ")


@given(st.text(LATIN))
def test_words_of_latin_greek_and_cyrillic_text_are_those_of_a_plain_regex(text):
    """Character tokens of other scripts must change no published figure."""
    decomposed = unicodedata.normalize("NFKD", text.translate(matching._LETTERS))
    plain = "".join(c for c in decomposed if not unicodedata.combining(c))
    assert words(text) == re.findall(r"\w+(?:['.]\w+)*", plain.lower())


@given(st.text(st.characters(categories=["L", "M", "N", "P", "Cf"]), max_size=12))
def test_folding_by_character_equals_folding_the_text(text):
    decomposed = unicodedata.normalize("NFKD", text.translate(matching._LETTERS))
    voicing = "\u3099\u309a"
    kept = "".join(c for c in decomposed if not unicodedata.combining(c) or c in voicing)
    assert matching.fold(text) == unicodedata.normalize("NFC", kept)


def test_a_corpus_without_words_is_refused():
    with pytest.raises(UserError, match="no passage has a word"):
        BM25Engine([passage(0, "!!!"), passage(1, "the")])


def test_empty_corpus_is_refused():
    with pytest.raises(UserError, match="corpus is empty"):
        BM25Engine([])
