"""Parity of whole episodes with a naive loop that has no cache, slots or batches."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from zerosearch_jax import config_flags
from zerosearch_jax.generate.sampling import Sampling, sample
from zerosearch_jax.models.transformer import abstract_model, param_shardings
from zerosearch_jax.parallel.mesh import make_mesh
from zerosearch_jax.rollout.scheduler import STOP_STRINGS, Limits, Rollouts
from zerosearch_jax.rollout.trajectory import Episode
from zerosearch_jax.search.engine import SearchResult
from zerosearch_jax.text import prompts
from zerosearch_jax.text.actions import parse_action
from zerosearch_jax.text.tokenizer import decode, encode, encode_prompt
from zerosearch_jax.training import factory

KEY, SAMPLING = jax.random.key(5), Sampling(1.0)
LIMITS = Limits(max_turns=3, response_tokens=14, observation_tokens=60)
MAX_TOKENS = 384
EPISODES = [Episode(n, f"Which country is number {n // 4}?", ("Chad",)) for n in range(20)]


class Library:
    """Engine whose documents repeat query and question; later turns get more documents."""

    name = "library"

    def search(self, requests):
        return [
            SearchResult(r.key, tuple(f"{r.query} is {r.question}" for _ in range(1 + r.turn)))
            for r in requests
        ]


@pytest.fixture(scope="module")
def model(markov_model):
    return factory.load_model(str(markov_model), make_mesh(), "float32")


@pytest.fixture(scope="module")
def naive(model):
    """Tokens, log-probs of the sampled tokens, and finish of each episode, from a naive loop."""
    graphdef, _ = abstract_model(model.config)

    @jax.jit
    def draw(tokens, length, key):
        run = nnx.merge(graphdef, model.params)
        hidden = run(tokens, jnp.arange(MAX_TOKENS)[None], jnp.zeros_like(tokens))
        return sample(run.logits(hidden[:, length - 1]), key[None], SAMPLING)

    def rollout(episode):
        tokenizer, fold = model.tokenizer, jax.random.fold_in
        stream = fold(fold(KEY, episode.number), 0)
        tokens = encode_prompt(tokenizer, prompts.policy_prompt(episode.question))
        logprobs = []
        for turn in range(LIMITS.max_turns + 1):
            new, cut = [], True
            while len(new) < LIMITS.response_tokens and len(tokens) < MAX_TOKENS:
                padded = np.zeros((1, MAX_TOKENS), np.int32)
                padded[0, : len(tokens)] = tokens
                token, logprob = draw(padded, len(tokens), fold(stream, len(tokens) - 1))
                new.append(int(token[0]))
                tokens.append(int(token[0]))
                logprobs.append(float(logprob[0]))
                text = decode(tokenizer, new)
                if any(stop in text for stop in STOP_STRINGS) or new[-1] == tokenizer.eos_token_id:
                    cut = False
                    break
            action = parse_action(decode(tokenizer, new), "")
            if action.kind == "answer":
                return tokens, logprobs, "answer"
            if turn == LIMITS.max_turns:
                return tokens, logprobs, "length" if cut else "turns"
            text = prompts.INVALID_ACTION
            if action.kind == "search":
                documents = [f"{action.content} is {episode.question}"] * (1 + turn)
                text = prompts.information_block(prompts.format_documents(documents))
            inserted = encode(tokenizer, text)
            if action.kind == "search" and len(inserted) > LIMITS.observation_tokens:
                opening, closing = (
                    encode(tokenizer, part) for part in prompts.information_block("|").split("|")
                )
                room = LIMITS.observation_tokens - len(opening) - len(closing)
                body = encode(tokenizer, prompts.format_documents(documents))[:room]
                inserted = opening + body + closing
            if MAX_TOKENS - len(tokens) <= len(inserted):
                return tokens, logprobs, "length"
            tokens = tokens + inserted
        raise AssertionError("the last turn ends the episode")

    return [rollout(episode) for episode in EPISODES]


def rollouts(model, rl_config, *, slots, decode_rows, mesh=None, **options):
    config = config_flags.load(str(rl_config)).policy.generator
    config.update(dict(slots=slots, decode_rows=decode_rows, chunk_tokens=5, max_tokens=MAX_TOKENS))
    mesh = mesh or make_mesh()
    params = jax.device_put(model.params, param_shardings(model.params, mesh))
    generator = factory.make_generator(replace(model, params=params), config, mesh, STOP_STRINGS)
    return Rollouts(
        generator, Library(), model.tokenizer, limits=LIMITS, sampling=SAMPLING, **options
    )


@pytest.mark.parametrize(
    ("slots", "decode_rows", "devices", "concurrent"),
    [(6, (2,), 1, 0), (20, (), 1, 0), (3, (1, 2), 1, 2), (8, (2,), 2, 0)],
)
def test_episodes_equal_those_of_a_naive_loop(
    model, rl_config, naive, slots, decode_rows, devices, concurrent
):
    """With refilled slots, shared prompts and concurrent searches, on one device and on two."""
    runner = rollouts(
        model,
        rl_config,
        slots=slots,
        decode_rows=decode_rows,
        mesh=make_mesh(data=devices),
        concurrent_searches=concurrent,
    )
    trajectories = runner.run(EPISODES, KEY)
    finishes = set()
    for trajectory, (tokens, logprobs, finish) in zip(trajectories, naive, strict=True):
        assert trajectory.tokens == tokens
        assert trajectory.finish == finish
        ours = np.asarray(trajectory.logprobs)[np.asarray(trajectory.by_policy)]
        np.testing.assert_allclose(ours, logprobs, atol=1e-4)
        finishes.add(finish)
    assert {"answer", "turns"} <= finishes
    assert max(len(t.searches) for t in trajectories) >= 2

    # Prefill runs once per group for the prompt and once per episode for inserted tokens. The
    # prompt's last token is not prefilled: the first decode step feeds it.
    first = {t.episode.question: t for t in trajectories}.values()
    once = sum(t.by_policy.index(True) - 1 for t in first)
    inserted = sum(len(t.tokens) - t.policy_tokens - t.by_policy.index(True) for t in trajectories)
    assert runner.generator.prefilled_tokens == once + inserted
