"""The scripted agent's habits, its provenance, and the simulator's pairs."""

from random import Random

import pytest

from zerosearch_jax.data.made_up import make_up_entities
from zerosearch_jax.data.phrasing import mentions, padded
from zerosearch_jax.data.transcripts import Habits, ScriptedAgent, simulator_pairs
from zerosearch_jax.data.world import corpus, load_entities, write_questions
from zerosearch_jax.search.bm25 import BM25Engine
from zerosearch_jax.text.actions import final_answer, parse_action
from zerosearch_jax.text.prompts import (
    INVALID_ACTION,
    NO_RESULTS,
    cut_documents,
    information_block,
)

TRAIN = [entity for entity in load_entities() if entity.split == "train"][:80]
ENGINE = BM25Engine(corpus(TRAIN), 3)
QUESTIONS = write_questions(TRAIN, "train", 0)[:60]
NOTHING = information_block(NO_RESULTS)
TWO_HOPS = [question for question in QUESTIONS if len(question.hops) == 2][:25]


def transcripts(questions=QUESTIONS, seed=0, **habits):
    agent = ScriptedAgent(TRAIN, ENGINE, Habits(**habits), topk=3)
    rng = Random(seed)
    return [(question, agent.transcript(question, rng)) for question in questions]


def own(segments):
    return [segment.text for segment in segments if segment.by_policy]


def test_turns_are_the_agents_and_observations_are_not():
    habits = dict(guess=0.1, vague=0.3, astray=0.2, stop_early=0.2, misread=0.2, malformed=0.3)
    for _, segments in transcripts(**habits):
        assert segments[0].by_policy and segments[-1].by_policy
        for turn, observation in zip(segments[::2], segments[1::2], strict=False):
            assert turn.by_policy and not observation.by_policy
            action = parse_action(turn.text)
            if action.kind == "search":
                assert observation.text.startswith(("\n\n<information>Doc 1: ", NOTHING))
                assert observation.text.endswith("</information>\n\n")
            else:
                assert action.kind == "invalid" and observation.text == INVALID_ACTION
        assert len(segments) % 2
        assert parse_action(segments[-1].text).kind == "answer"
        assert all(text.startswith("<think> ") for text in own(segments))


def test_a_good_agent_finds_the_answer_when_the_documents_hold_it():
    right, found = [], []
    for question, segments in transcripts():
        read = " ".join(segment.text for segment in segments if not segment.by_policy)
        hold = all(mentions(read, hop.answer) for hop in question.hops)
        found.append(hold)
        right.append(final_answer(own(segments)) in question.golden_answers)
        assert right[-1] or not hold
    assert sum(found) / len(found) > 0.6


def test_a_two_hop_question_is_asked_in_order():
    for question, segments in transcripts(TWO_HOPS):
        queries = [parse_action(text).content for text in own(segments)[:-1]]
        assert queries[0] == question.hops[0].query
        assert set(queries) <= {hop.query for hop in question.hops}


@pytest.mark.parametrize(
    ("habits", "turns"), [({"guess": 1.0}, {1}), ({"stop_early": 1.0, "retry": 0.0}, {2})]
)
def test_the_habit_decides_how_many_turns_there_are(habits, turns):
    assert {len(own(segments)) for _, segments in transcripts(TWO_HOPS, **habits)} == turns


def test_a_guess_is_a_value_of_the_right_kind():
    values = {}
    for entity in TRAIN:
        for attribute, value in entity.facts.items():
            values.setdefault((entity.kind, attribute), set()).add(value)
    kinds = {entity.id: entity.kind for entity in TRAIN}
    for question, segments in transcripts(guess=1.0):
        hop = question.hops[-1]
        assert final_answer(own(segments)) in values[kinds[hop.entity_id], hop.attribute]


def test_bad_habits():
    for _, segments in transcripts(malformed=1.0):
        assert parse_action(segments[0].text).kind == "invalid"
        assert segments[1].text == INVALID_ACTION
    for question, segments in transcripts(vague=1.0):
        assert parse_action(own(segments)[0]).content == question.hops[0].subject
    for question, segments in transcripts(TWO_HOPS, stop_early=1.0):
        if "I did not find it" not in segments[-1].text:
            assert final_answer(own(segments)) == question.hops[0].answer
    right = [final_answer(own(s)) in q.golden_answers for q, s in transcripts(misread=1.0)]
    assert not any(right)


def test_a_transcript_is_its_seeds_alone():
    habits = dict(vague=0.4, astray=0.3)
    assert transcripts(seed=1, **habits) == transcripts(seed=1, **habits)
    assert transcripts(seed=1, **habits) != transcripts(seed=2, **habits)


def useful_pairs(questions, entities, engine, topk):
    """(question, query, documents) of the useful pairs, the documents one by one."""
    for question in questions:
        for prompt, text in simulator_pairs([question], entities, engine, topk, Random(0)):
            query, end, _ = prompt.rpartition("\nQuery: ")[2].partition("\nUseful Output:")
            if end:
                yield question, query, cut_documents(text, topk)


def test_noisy_documents_hold_no_answer_and_useful_ones_mostly_do():
    pairs = simulator_pairs(QUESTIONS, TRAIN, ENGINE, 3, Random(0))
    noisy = [pair for pair in pairs if pair[0].endswith("Noisy Output:")]
    useful = [pair for pair in pairs if pair[0].endswith("Useful Output:")]
    assert len(noisy) + len(useful) == len(pairs)
    assert 0.5 < len(noisy) / len(useful) < 2
    answers = {question.question: question.golden_answers[0] for question in QUESTIONS}

    def holds(prompt, documents):
        (asked,) = [question for question in answers if f'question: "{question}"' in prompt]
        assert f"whose answer is {answers[asked]}." in prompt
        assert len(cut_documents(documents, 5)) == 3
        return mentions(documents, answers[asked])

    assert not any(holds(*pair) for pair in noisy)
    assert sum(holds(*pair) for pair in useful) / len(useful) > 0.4


def test_useful_documents_of_a_good_query_give_the_fact_first_and_early():
    topk, moved = 2, 0
    passages = {passage.text: passage for passage in corpus(TRAIN)}
    for question, query, documents in useful_pairs(QUESTIONS, TRAIN, ENGINE, topk):
        hops = [hop for hop in question.hops if hop.query == query]
        if not hops:
            continue
        attribute = hops[0].attribute.removesuffix("^-1")

        def states(passage, hop=hops[0], attribute=attribute):
            return passage.entity_id == hop.entity_id and attribute in passage.attributes

        best = ENGINE.ranked(query, 3 * topk)
        stating = [states(passages[document]) for document in documents]
        assert sum(stating) == min(topk, sum(states(passage) for passage in best))
        assert stating == sorted(stating, reverse=True)
        places = [padded(d).index(padded(hops[0].answer)) for d in documents[: sum(stating)]]
        assert places == sorted(places)
        others = [passage.text for passage in best if not states(passage)]
        assert documents[sum(stating) :] == others[: topk - sum(stating)]
        moved += documents != [passage.text for passage in best[:topk]]
    assert moved > 10


def test_useful_documents_of_a_poor_query_are_the_engines():
    poor = 0
    for question, query, documents in useful_pairs(QUESTIONS, TRAIN, ENGINE, 3):
        if query not in [hop.query for hop in question.hops]:
            assert documents == [passage.text for passage in ENGINE.ranked(query, 3)]
            poor += 1
    assert poor > 40


def test_pairs_over_a_made_up_world_hold_the_answer_that_the_prompt_gives():
    entities = make_up_entities(TRAIN, 40, 7)
    engine = BM25Engine(corpus(entities), 2)
    questions = write_questions(entities, "train", 0)[:80]
    held = [
        mentions(" ".join(documents), question.golden_answers[0])
        for question, query, documents in useful_pairs(questions, entities, engine, 2)
        if query == question.hops[-1].query
    ]
    assert len(held) > 70
    assert sum(held) / len(held) > 0.95
