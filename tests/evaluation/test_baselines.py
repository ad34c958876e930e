"""The methods side by side, with the hand-written policy of `conftest.CHAIN`."""

import jax
import pytest

from zerosearch_jax import config_flags
from zerosearch_jax.data.qa import QARow
from zerosearch_jax.errors import UserError
from zerosearch_jax.evaluation.baselines import METHODS, play, refiner
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
def player(model, settings, compiled_once):
    generator = factory.make_generator(model, settings, make_mesh(), STOP_STRINGS)

    def run(method, engine=None, **options):
        return play(method, generator, engine, model.tokenizer, ROWS, limits=LIMITS, **options)

    return run


def test_every_method_puts_the_same_user_turn_first_and_inserts_its_own(player, model):
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
        trajectories = player(method, engine)
        asked = [[(row.question, row.question) for row in ROWS]] if method == "rag" else []
        assert engine.batches == asked  # one call, for all questions
        for row, trajectory in zip(ROWS, trajectories, strict=True):
            written = [ours for ours in trajectory.by_policy]
            first = written.index(True)
            before = decode(model.tokenizer, trajectory.tokens[:first])
            assert before == prompts.policy_prompt(row.question) + opening(row.question)
            assert all(written[first:]) and len(trajectory.turns) == 1
            assert trajectory.episode.question == row.question
            assert trajectory.answer == "Chad"  # what the policy writes greedily
            assert len(trajectory.searches) == (method == "rag")


def test_a_policy_that_searches_is_cut_off_by_cot_and_answered_by_search(player):
    options = dict(sampling=Sampling(1.0), key=jax.random.key(3))
    engine = Library()
    searching = player("search", engine, **options)
    once = player("cot", **options)  # the same draws up to the first turn's end
    assert [t.turns[0] for t in searching] == [t.turns[0] for t in once]
    kinds = {t.turns[0].action.kind for t in once}
    assert "search" in kinds and "answer" in kinds
    for cut, whole in zip(once, searching, strict=True):
        if cut.turns[0].action.kind == "search":
            assert (cut.finish, cut.answer, cut.searches) == ("turns", None, [])
            assert whole.searches and len(whole.turns) > 1
    assert sum(map(len, engine.batches)) == sum(len(t.searches) for t in searching)


def test_search_o1_shows_the_policy_what_the_model_made_of_the_documents(player, model):
    def read(requests, keys):
        assert all("lies far away.\nDoc 2: x" in request for request in requests)
        return [f"read for {episode} in turn {turn}" for episode, turn in keys]

    options = dict(sampling=Sampling(1.0), key=jax.random.key(3))
    trajectories = player("search_o1", Library(), generate=read, **options)
    plain = player("search", Library(), **options)
    assert [t.turns[0] for t in trajectories] == [t.turns[0] for t in plain]
    shown = 0
    for trajectory in trajectories:
        text = decode(model.tokenizer, trajectory.tokens)
        for request, result in trajectory.searches:
            told = f"read for {request.episode} in turn {request.turn}"
            assert result.documents == (told,)
            if request.turn < len(trajectory.turns) - 1:
                shown += 1
                assert prompts.information_block(f"Doc 1: {told}") in text
        assert "lies far away" not in text
    assert shown


def test_the_refiner_is_the_model_with_no_tag_to_stop_at(model, settings):
    config = settings.copy_and_resolve_references()
    with config.unlocked():
        config.prefill_buckets = (64,)
    read = refiner(model, config, make_mesh(), max_new_tokens=9)
    texts = read(["<answer", "<answer"], [(0, 0), (1, 0)])
    assert texts == ["> Chad </answer> Chad </answer> Chad"[: len(texts[0])]] * 2
    assert "</answer>" in texts[0]


def test_what_cannot_be_played_is_refused(player):
    with pytest.raises(UserError, match="'rga'; choose one of direct, cot, rag, search, search_o1"):
        player("rga", Library())
    assert METHODS == ("direct", "cot", "rag", "search", "search_o1")
    for method in ("rag", "search", "search_o1"):
        with pytest.raises(ValueError, match="engine"):
            player(method)
    with pytest.raises(ValueError, match="it needs both"):
        player("search_o1", Library())
