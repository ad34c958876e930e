"""The scripted agent: its behaviours, and which segments the policy learns."""

from random import Random

import pytest

from zerosearch_jax.data.embedded.scripted_agent import Behaviours, ScriptedAgent
from zerosearch_jax.data.embedded.world import corpus, load_entities, write_questions
from zerosearch_jax.search.bm25 import BM25Engine
from zerosearch_jax.text.actions import final_answer, parse_action
from zerosearch_jax.text.matching import mentions
from zerosearch_jax.text.prompts import INVALID_ACTION, NO_RESULTS, information_block

TRAIN = [entity for entity in load_entities() if entity.split == "train"][:80]
ENGINE = BM25Engine(corpus(TRAIN), 3)
QUESTIONS = write_questions(TRAIN, "train", 0)[:60]
NOTHING = information_block(NO_RESULTS)
TWO_HOPS = [question for question in QUESTIONS if len(question.hops) == 2][:25]


def transcripts(questions=QUESTIONS, seed=0, **behaviours):
    agent = ScriptedAgent(TRAIN, ENGINE, Behaviours(**behaviours), topk=3)
    rng = Random(seed)
    return [(question, agent.transcript(question, rng)) for question in questions]


def own(segments):
    return [segment.text for segment in segments if segment.by_policy]


def test_turns_are_by_policy_and_observations_are_not():
    behaviours = dict(
        guess=0.1, vague=0.3, wrong_attribute=0.2, stop_early=0.2, misread=0.2, malformed=0.3
    )
    for _, segments in transcripts(**behaviours):
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


def test_the_default_agent_answers_correctly_if_the_documents_contain_the_answer():
    right, found = [], []
    for question, segments in transcripts():
        read = " ".join(segment.text for segment in segments if not segment.by_policy)
        hold = all(mentions(read, hop.answer) for hop in question.hops)
        found.append(hold)
        right.append(final_answer(own(segments)) in question.golden_answers)
        assert right[-1] or not hold
    assert sum(found) / len(found) > 0.6


def test_two_hop_queries_are_in_order():
    for question, segments in transcripts(TWO_HOPS):
        queries = [parse_action(text).content for text in own(segments)[:-1]]
        assert queries[0] == question.hops[0].query
        assert set(queries) <= {hop.query for hop in question.hops}


@pytest.mark.parametrize(
    ("behaviours", "turns"), [({"guess": 1.0}, {1}), ({"stop_early": 1.0, "retry": 0.0}, {2})]
)
def test_guess_and_stop_early_decide_the_number_of_turns(behaviours, turns):
    assert {len(own(segments)) for _, segments in transcripts(TWO_HOPS, **behaviours)} == turns


def test_a_guess_has_the_right_kind():
    values = {}
    for entity in TRAIN:
        for attribute, value in entity.facts.items():
            values.setdefault((entity.kind, attribute), set()).add(value)
    kinds = {entity.id: entity.kind for entity in TRAIN}
    for question, segments in transcripts(guess=1.0):
        hop = question.hops[-1]
        assert final_answer(own(segments)) in values[kinds[hop.entity_id], hop.attribute]


def test_poor_behaviours():
    for _, segments in transcripts(malformed=1.0):
        assert parse_action(segments[0].text).kind == "invalid"
        assert segments[1].text == INVALID_ACTION
    for question, segments in transcripts(vague=1.0):
        assert parse_action(own(segments)[0]).content == question.hops[0].subject
    for question, segments in transcripts(TWO_HOPS, stop_early=1.0):
        if "I did not find it" not in segments[-1].text:
            assert final_answer(own(segments)) == question.hops[0].answer
    for question, segments in transcripts(misread=1.0):
        wrong = final_answer(own(segments))
        assert wrong not in question.golden_answers
        if "I did not find it" not in segments[-1].text:  # the thought states the wrong value
            assert f" is {wrong}. </think>" in segments[-1].text


def test_transcripts_are_deterministic_in_the_seed():
    behaviours = dict(vague=0.4, wrong_attribute=0.3)
    assert transcripts(seed=1, **behaviours) == transcripts(seed=1, **behaviours)
    assert transcripts(seed=1, **behaviours) != transcripts(seed=2, **behaviours)
