"""Questions that are too long for a slot are found before anything is compiled."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zerosearch_jax.data.qa import QARow
from zerosearch_jax.errors import UserError
from zerosearch_jax.rollout.scheduler import Limits
from zerosearch_jax.text import prompts
from zerosearch_jax.text.tokenizer import encode, encode_prompt, load_tokenizer
from zerosearch_jax.training.job_configs import RefineConfig
from zerosearch_jax.training.prompt_limits import PromptLimit, fitting, prompt_limits


@pytest.fixture(autouse=True)
def _only_tokenizers(monkeypatch):
    """The directory of the tiny tokenizer holds no model."""

    def read(directory):
        return SimpleNamespace(tokenizer=load_tokenizer(directory))

    monkeypatch.setattr("zerosearch_jax.training.prompt_limits.read_model_files", read)


def row(question: str, number: int = 0, answer: str = "Chad") -> QARow:
    return QARow(f"q{number}", question, (answer,), "nq", f"data/nq.jsonl: row {number}")


def policy(tokenizer, max_tokens: int) -> SimpleNamespace:
    return SimpleNamespace(
        model=tokenizer.name_or_path, generator=SimpleNamespace(max_tokens=max_tokens)
    )


def simulated(tokenizer, max_tokens: int, url: str = "") -> SimpleNamespace:
    simulator = SimpleNamespace(
        model=tokenizer.name_or_path,
        url=url,
        form="finetuned",
        max_new_tokens=8,
        generator=SimpleNamespace(max_tokens=max_tokens),
    )
    return SimpleNamespace(engine="simulated", topk=2, simulator=simulator)


def policy_tokens(tokenizer, question: str) -> int:
    return len(encode_prompt(tokenizer, prompts.policy_prompt(question)))


LIMITS = Limits(max_turns=2, response_tokens=40, observation_tokens=48)
ROWS = [row("Which?", 1), row("word " * 600, 2), row("Who?", 3)]


def test_the_refiner_needs_room_for_its_prompt_and_text(tiny_tokenizer):
    refine = RefineConfig(max_new_tokens=300)
    text = prompts.refine_prompt("Which?", "Which?", "")
    needed = len(encode_prompt(tiny_tokenizer, text, system="")) + 300
    fits = prompt_limits(policy(tiny_tokenizer, needed), LIMITS, refine=refine)
    assert fitting(ROWS[:1], fits, "error") == ROWS[:1]
    small = prompt_limits(policy(tiny_tokenizer, needed - 1), LIMITS, refine=refine)
    with pytest.raises(UserError, match="refiner's prompt .*refine.max_new_tokens=300"):
        fitting(ROWS[:1], small, "error")


def test_a_prompt_may_fill_the_slot_up_to_the_response(tiny_tokenizer):
    needed = policy_tokens(tiny_tokenizer, "Which?") + 40
    fits = prompt_limits(policy(tiny_tokenizer, needed), LIMITS)
    assert fitting(ROWS[:1], fits, "error") == ROWS[:1]
    with pytest.raises(UserError, match=f"row 1: .* has {needed - 40} .* at most {needed - 41} "):
        fitting(ROWS[:1], prompt_limits(policy(tiny_tokenizer, needed - 1), LIMITS), "error")


def test_a_long_question_is_refused_with_its_row_or_dropped_and_counted(tiny_tokenizer, capsys):
    limits = prompt_limits(policy(tiny_tokenizer, 700), LIMITS)
    tokens = policy_tokens(tiny_tokenizer, ROWS[1].question)
    with pytest.raises(
        UserError, match=rf"nq\.jsonl: row 2: .*{tokens} tokens.*660.*overlong=drop"
    ):
        fitting(ROWS, limits, "error")
    assert fitting(ROWS, limits, "drop") == [ROWS[0], ROWS[2]]
    assert "1 of 3 questions" in capsys.readouterr().out
    with pytest.raises(UserError, match="none is left"):
        fitting(ROWS[1:2], limits, "drop")


def test_the_simulator_has_its_own_limit_unless_it_runs_on_a_server(tiny_tokenizer):
    long_answer = row("Which?", 4, answer="word " * 300)
    room = policy(tiny_tokenizer, 5000)
    for search, refused in [
        (simulated(tiny_tokenizer, 300), True),
        (simulated(tiny_tokenizer, 5000), False),
        (simulated(tiny_tokenizer, 300, url="http://127.0.0.1:1"), False),
        (SimpleNamespace(engine="bm25", topk=2, simulator=None), False),
    ]:
        limits = prompt_limits(room, LIMITS, [search])
        if refused:
            with pytest.raises(UserError, match="row 4: the simulator's prompt .*max_new_tokens=8"):
                fitting([long_answer], limits, "error")
        else:
            assert fitting([long_answer], limits, "error") == [long_answer]


def test_observations_need_room_between_their_tags(tiny_tokenizer):
    tags = len(encode(tiny_tokenizer, prompts.information_block("")))
    least = Limits(max_turns=2, response_tokens=40, observation_tokens=tags + 1)
    assert prompt_limits(policy(tiny_tokenizer, 999), least)
    with pytest.raises(UserError, match=f"observation_tokens={tags} .* {tags} tokens"):
        prompt_limits(policy(tiny_tokenizer, 999), replace(least, observation_tokens=tags))


@pytest.mark.parametrize(
    ("methods", "opening"),
    [
        (("search", "cot"), ""),
        (("search", "direct"), prompts.FORCED_ANSWER),
        (("direct", "rag"), prompts.forced_search("Which?")),
    ],
)
def test_the_text_with_which_a_method_opens_counts(tiny_tokenizer, methods, opening):
    (limit,) = prompt_limits(policy(tiny_tokenizer, 999), LIMITS, (), methods)
    counted = policy_tokens(tiny_tokenizer, "Which?") + len(encode(tiny_tokenizer, opening))
    assert limit.tokens(ROWS[0]) == counted


@settings(deadline=None, max_examples=60)
@given(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=80)
    | st.text("a <>/|'\n", max_size=80),
    st.integers(-8, 120),
)
def test_a_row_that_is_not_tokenised_would_fit(tiny_tokenizer, question, room):
    """The shortcuts never differ from counting the tokens of the whole prompt."""

    def tokens(row: QARow) -> int:
        question, answer = row.question, row.golden_answers[0]
        text = prompts.simulator_prompt(question, answer, question, True, "prompted", 2)
        return len(encode_prompt(tiny_tokenizer, text, system=""))

    template = tokens(QARow("", "", ("",), ""))
    limit = PromptLimit("prompt", tiny_tokenizer, tokens, template + room, "slot")
    assert (limit.excess(row(question), template) == "") == (tokens(row(question)) <= limit.most)
