"""Tests of the inference baselines with the Markov policy of `conftest.CHAIN`."""

import jax
import pytest

from zerosearch_jax import config_flags
from zerosearch_jax.data.qa import QARow
from zerosearch_jax.errors import UserError
from zerosearch_jax.evaluation.baselines import METHODS, make_refiner, run_method
from zerosearch_jax.generate.sampling import Sampling
from zerosearch_jax.parallel.mesh import make_mesh
from zerosearch_jax.rollout.scheduler import STOP_STRINGS, Limits
from zerosearch_jax.search.engine import SearchResult
from zerosearch_jax.text import prompts
from zerosearch_jax.text.tokenizer import decode
from zerosearch_jax.training import factory

pytestmark = pytest.mark.usefixtures("compiled_once")
ROWS = [QARow(f"q{i}", f"Which country is number {i}?", ("Chad",), "test") for i in range(8)]
LIMITS = Limits(max_turns=2, response_tokens=12, observation_tokens=60)


class Library:
    """Engine that writes two documents for every query and records its batches."""

    name = "library"

    def __init__(self):
        self.batches = []

    def search(self, requests):
        self.batches.append([(r.question, r.query) for r in requests])
        return [SearchResult(r.key, (f"{r.query} lies far away.", "x")) for r in requests]


@pytest.fixture(scope="module")
def model(markov_model):
    return factory.load_model(str(markov_model), make_mesh(), "float32")


@pytest.fixture(scope="module")
def settings(rl_config):
    return config_flags.load(str(rl_config)).policy.generator


@pytest.fixture(scope="module")
def run(model, settings, compiled_once):
    """`run_method` on `ROWS` with one generator."""
    generator = factory.make_generator(model, settings, make_mesh(), STOP_STRINGS)

    def run(method, engine=None, **options):
        tokenizer = model.tokenizer
        return run_method(method, generator, engine, tokenizer, ROWS, limits=LIMITS, **options)

    return run


def test_single_turn_methods_insert_their_opening_after_the_same_prompt(run, model):
    inserted = {
        "direct": lambda question: prompts.FORCED_ANSWER,
        "cot": lambda question: "",
        "rag": lambda question: (
            prompts.forced_search(question)
            + prompts.information_block(f"Doc 1: {question} lies far away.\nDoc 2: x")
        ),
    }
    for method, opening in inserted.items():
        engine = Library()
        trajectories = run(method, engine)
        batches = [[(row.question, row.question) for row in ROWS]] if method == "rag" else []
        assert engine.batches == batches  # One batch with all questions.
        for row, trajectory in zip(ROWS, trajectories, strict=True):
            first = trajectory.by_policy.index(True)
            prompt = decode(model.tokenizer, trajectory.tokens[:first])
            assert prompt == prompts.policy_prompt(row.question) + opening(row.question)
            assert all(trajectory.by_policy[first:]) and len(trajectory.turns) == 1
            assert trajectory.episode.question == row.question
            assert trajectory.answer == "Chad"  # The greedy answer of the Markov policy.
            assert len(trajectory.searches) == (method == "rag")


def test_a_search_ends_a_cot_episode_and_continues_a_search_episode(run):
    options = dict(sampling=Sampling(1.0), key=jax.random.key(3))
    engine = Library()
    searching = run("search", engine, **options)
    one_turn = run("cot", **options)  # The first turn has the same draws.
    assert [t.turns[0] for t in searching] == [t.turns[0] for t in one_turn]
    kinds = {t.turns[0].action.kind for t in one_turn}
    assert "search" in kinds and "answer" in kinds
    for short, long in zip(one_turn, searching, strict=True):
        if short.turns[0].action.kind == "search":
            assert (short.finish, short.answer, short.searches) == ("turns", None, [])
            assert long.searches and len(long.turns) > 1
    assert sum(map(len, engine.batches)) == sum(len(t.searches) for t in searching)


def test_search_o1_inserts_the_refined_documents(run, model):
    class Refiner:
        def __call__(self, requests, keys):
            assert all("lies far away.\nDoc 2: x" in request for request in requests)
            return [f"refined for {episode} in turn {turn}" for episode, turn in keys]

        def cut(self, text, prompt):
            return text

    options = dict(sampling=Sampling(1.0), key=jax.random.key(3))
    trajectories = run("search_o1", Library(), refiner=Refiner(), **options)
    plain = run("search", Library(), **options)
    assert [t.turns[0] for t in trajectories] == [t.turns[0] for t in plain]
    shown = 0
    for trajectory in trajectories:
        text = decode(model.tokenizer, trajectory.tokens)
        for request, result in trajectory.searches:
            refined = f"refined for {request.episode} in turn {request.turn}"
            assert result.documents == (refined,)
            if request.turn < len(trajectory.turns) - 1:
                shown += 1
                assert prompts.information_block(f"Doc 1: {refined}") in text
        assert "lies far away" not in text
    assert shown


def test_the_refiner_does_not_stop_at_tags(model, settings):
    config = settings.copy_and_resolve_references()
    with config.unlocked():
        config.prefill_buckets = (64,)
    refine = make_refiner(model, config, make_mesh(), max_new_tokens=9)
    texts = refine(["<answer", "<answer"], [(0, 0), (1, 0)])
    assert texts == ["> Chad </answer> Chad </answer> Chad"[: len(texts[0])]] * 2
    assert "</answer>" in texts[0]


def test_unknown_methods_and_missing_engines_are_refused(run):
    with pytest.raises(UserError, match="'rga'; choose one of direct, cot, rag, search, search_o1"):
        run("rga", Library())
    assert METHODS == ("direct", "cot", "rag", "search", "search_o1")
    for method in ("rag", "search", "search_o1"):
        with pytest.raises(ValueError, match="engine"):
            run(method)
    with pytest.raises(ValueError, match="needs both"):
        run("search_o1", Library())
