"""SFT examples: no held-out entities, and the same token ids as in rollouts."""

import jax
import pytest

from zerosearch_jax.data.embedded.scripted_agent import Behaviours, Segment
from zerosearch_jax.data.embedded.world import load_entities
from zerosearch_jax.data.qa import QARow
from zerosearch_jax.data.sft_data import answer_examples, policy_transcripts, tokenise
from zerosearch_jax.generate.generator import Generation
from zerosearch_jax.generate.sampling import Sampling
from zerosearch_jax.rollout.scheduler import Limits, Rollouts
from zerosearch_jax.rollout.trajectory import Episode
from zerosearch_jax.search.engine import SearchResult
from zerosearch_jax.text import prompts
from zerosearch_jax.text.actions import parse_action
from zerosearch_jax.text.matching import padded
from zerosearch_jax.text.tokenizer import decode, encode, encode_prompt

HELD_OUT = [entity for entity in load_entities() if entity.split != "train"]
POOR = Behaviours(
    guess=0.1, vague=0.3, wrong_attribute=0.2, malformed=0.1, misread=0.1, stop_early=0.2
)


@pytest.fixture(scope="module")
def transcripts():
    return policy_transcripts(
        worlds=11,
        entities_per_world=40,
        questions_per_world=40,
        behaviours=POOR,
        topk=3,
        seed=0,
    )


def test_no_segment_mentions_a_held_out_entity(transcripts):
    everything = padded(" | ".join(s.text for segments in transcripts for s in segments))
    assert padded("Which") in everything  # The check below can fail.
    for entity in HELD_OUT:
        for name in (entity.name, *entity.aliases):
            assert padded(name) not in everything, (entity.id, name)


def share_that_name(examples, entities):
    """Share of `examples` that name any of the `entities`."""
    names = [padded(entity.name) for entity in entities]
    texts = [padded(" ".join(segment.text for segment in segments)) for segments in examples]
    return sum(any(name in text for name in names) for text in texts) / len(texts)


def test_transcripts_cover_real_and_synthetic_worlds(transcripts):
    assert len(transcripts) == 11 * 40
    known = [e for e in load_entities() if e.split == "train" and len(e.name) > 4]
    # Worlds 0 and 10 have the real entities.
    assert 2 / 11 * 0.8 <= share_that_name(transcripts, known) < 0.6


def test_transcripts_begin_with_the_prompt_and_are_deterministic(transcripts):
    head = prompts.policy_prompt("\0").split("\0")[0]
    for segments in transcripts:
        assert segments[0].text.startswith(head) and not segments[0].by_policy
        assert segments[1].by_policy
    again = policy_transcripts(
        worlds=1,
        entities_per_world=40,
        questions_per_world=5,
        behaviours=POOR,
        topk=3,
        seed=0,
    )
    assert again == policy_transcripts(
        worlds=1,
        entities_per_world=40,
        questions_per_world=5,
        behaviours=POOR,
        topk=3,
        seed=0,
    )


class Replay:
    """Generator and engine that replay one transcript."""

    slots, replicas, name = 1, 1, "replay"

    def __init__(self, tokenizer, segments):
        self.turns = [encode(tokenizer, s.text) for s in segments if s.by_policy]
        self.documents = [s.text for s in segments[1:] if not s.by_policy]

    def start(self, slots, rows):
        pass

    def extend(self, slots, rows):
        pass

    def free_tokens(self, slot):
        return 10_000

    def replica_of(self, slot):
        return 0

    def start_decoding(self, slots, **_):
        pass

    def decode_until(self, **_):
        tokens = self.turns.pop(0)
        return {0: Generation(tokens, [-1.0] * len(tokens), "stop")}

    def search(self, requests):
        (request,) = requests
        while self.documents[0] == prompts.INVALID_ACTION:
            self.documents.pop(0)
        text = self.documents.pop(0).removeprefix("\n\n<information>")
        text = text.removesuffix("</information>\n\n")
        return [SearchResult(request.key, tuple(prompts.cut_documents(text, 9)))]


def test_tokenise_equals_the_tokens_of_a_rollout(transcripts, tiny_tokenizer):
    kinds = set()
    for segments in transcripts[:25]:
        question = segments[0].text.split("Question: ")[1].strip()
        replay = Replay(tiny_tokenizer, segments)
        rollouts = Rollouts(
            replay, replay, tiny_tokenizer, limits=Limits(9, 500, 5000), sampling=Sampling()
        )
        (trajectory,) = rollouts.run([Episode(0, question, ("x",))], jax.random.key(0))
        sequence = tokenise(
            segments, tiny_tokenizer, system=None, inserted_weight=0.0, end_of_text=False
        )
        assert sequence.tokens == trajectory.tokens
        assert sequence.mask == [float(by_policy) for by_policy in trajectory.by_policy]
        kinds |= {turn.action.kind for turn in trajectory.turns}
    assert kinds == {"search", "answer", "invalid"}


def test_loss_weights_depend_on_the_writer(tiny_tokenizer):
    segments = [Segment("Ask.", False), Segment("own", True), Segment(" doc", False)]
    sequence = tokenise(
        segments, tiny_tokenizer, system=None, inserted_weight=0.25, end_of_text=True
    )
    counts = [len(encode_prompt(tiny_tokenizer, "Ask.")), len(encode(tiny_tokenizer, "own")),
              len(encode(tiny_tokenizer, " doc")), 1]  # fmt: skip
    weights = [0.25, 1.0, 0.25, 1.0]
    assert sequence.mask == [w for w, n in zip(weights, counts, strict=True) for _ in range(n)]
    assert sequence.tokens[-1] == tiny_tokenizer.eos_token_id
    assert decode(tiny_tokenizer, sequence.tokens) == "Ask.own doc"


@pytest.mark.parametrize(
    ("own", "text"),
    [
        ("<think> a </think> b", "Ask.<think>\n a </think> b doc"),
        (" b", "Ask.<think>\n</think> b doc"),
    ],
)
def test_an_example_continues_the_thought_of_the_template(thinking_tokenizer, own, text):
    segments = [Segment("Ask.", False), Segment(own, True), Segment(" doc", False)]
    sequence = tokenise(
        segments, thinking_tokenizer, system="", inserted_weight=0.0, end_of_text=False
    )
    assert decode(thinking_tokenizer, sequence.tokens) == text


def test_the_sft_baseline_answers_with_the_first_golden_answer():
    rows = [QARow("1", "Which river?", ("Chari", "Shari"), "t")]
    ((prompt, answer),) = answer_examples(rows)
    assert not prompt.by_policy and "Which river?" in prompt.text
    assert answer.by_policy and parse_action(answer.text).content == "Chari"
