"""The multi-turn scheduler: think, search, read, answer, for many episodes at once.

The policy decodes all running episodes to their next stop, the engine answers their searches in
one batch, and only what was inserted is prefilled behind each slot's cache. It decides nothing
about rewards or learning.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import jax

from zerosearch_jax.errors import UserError
from zerosearch_jax.generate.generator import Generator
from zerosearch_jax.generate.sampling import Sampling
from zerosearch_jax.rollout.trajectory import Episode, Trajectory, Turn
from zerosearch_jax.search.engine import SearchEngine, SearchRequest, SearchResult
from zerosearch_jax.text import prompts
from zerosearch_jax.text.actions import parse_action
from zerosearch_jax.text.tokenizer import decode, encode, encode_prompt

STOP_STRINGS = ("</search>", "</answer>")


@dataclass(frozen=True)
class Limits:
    """How long an episode may become.

    Attributes:
      max_turns: searches (and invalid turns) before the last turn.
      response_tokens: sampled in one turn.
      observation_tokens: inserted after one search, tags included.
    """

    max_turns: int
    response_tokens: int
    observation_tokens: int


class Rollouts:
    """Plays episodes with one policy generator and one engine.

    Args:
      noisy: `(episode number, turn) -> bool`, the curriculum's draw.
      stop_on_failure: a failed search ends the run with an error; otherwise the episode gets a
        "search failed" observation.
      forbid_search: each episode is one turn that has to answer: the opening of the answer is
        inserted after the prompt.
      searching: entered while the engine is waited for (to time it).
    """

    def __init__(
        self,
        generator: Generator,
        engine: SearchEngine,
        tokenizer,
        *,
        limits: Limits,
        sampling: Sampling,
        noisy: Callable[[int, int], bool] = lambda episode, turn: False,
        stop_on_failure: bool = False,
        forbid_search: bool = False,
        searching: Callable[[], AbstractContextManager] = nullcontext,
    ):
        self.generator = generator
        self.engine = engine
        self.tokenizer = tokenizer
        self.limits = limits
        self.sampling = sampling
        self.noisy = noisy
        self.stop_on_failure = stop_on_failure
        self.forbid_search = forbid_search
        self.searching = searching
        self._invalid = encode(tokenizer, prompts.INVALID_ACTION)

    def play(self, episodes: Sequence[Episode], key: jax.Array) -> list[Trajectory]:
        """Plays all episodes, as many at once as the generator has slots.

        Args:
          key: a typed PRNG key; episode n samples from `key` folded with n, so what it does
            depends on neither its neighbours nor its place in the batch.

        Returns:
          A trajectory for each episode, in order.
        """
        size = self.generator.slots
        waves = [episodes[i : i + size] for i in range(0, len(episodes), size)]
        return [trajectory for wave in waves for trajectory in self._play_wave(wave, key)]

    def _play_wave(self, episodes: Sequence[Episode], key: jax.Array) -> list[Trajectory]:
        trajectories = [Trajectory(episode) for episode in episodes]
        for trajectory in trajectories:
            trajectory.append_inserted(self._prompt(trajectory))
        self.generator.start(range(len(trajectories)), [t.tokens for t in trajectories])
        running = list(range(len(trajectories)))
        for turn in range(1 if self.forbid_search else self.limits.max_turns + 1):
            if not running:
                break
            generations = self.generator.decode(
                running,
                key=key,
                streams=[(episodes[slot].number, 0) for slot in running],
                max_new_tokens=self.limits.response_tokens,
                sampling=self.sampling,
            )
            for slot, generation in zip(running, generations, strict=True):
                self._take_turn(trajectories[slot], generation)
            last = self.forbid_search or turn == self.limits.max_turns
            running = self._observe(trajectories, running, turn, last)
        return trajectories

    def _prompt(self, trajectory: Trajectory) -> list[int]:
        prompt = encode_prompt(self.tokenizer, prompts.policy_prompt(trajectory.episode.question))
        if self.forbid_search:
            trajectory.answer_prefix = "answer"
            prompt = prompt + encode(self.tokenizer, prompts.FORCED_ANSWER)
        return prompt

    def _take_turn(self, trajectory: Trajectory, generation) -> None:
        trajectory.append_sampled(generation.tokens, generation.logprobs)
        text = decode(self.tokenizer, generation.tokens)
        action = parse_action(text, trajectory.answer_prefix)
        trajectory.turns.append(Turn(text, action))
        if action.kind == "answer":
            trajectory.finish = "answer"

    def _observe(
        self, trajectories: list[Trajectory], running: list[int], turn: int, last: bool
    ) -> list[int]:
        """Inserts what each running episode is told after its turn; returns who goes on."""
        going = [slot for slot in running if not trajectories[slot].finish]
        if last:
            for slot in going:
                trajectories[slot].finish = "turns"
            return []
        requests = {
            slot: self._request(trajectories[slot], turn)
            for slot in going
            if trajectories[slot].turns[-1].action.kind == "search"
        }
        results = self._search(list(requests.values()))
        observations = {}
        for slot in going:
            if slot in requests:
                result = results[requests[slot].key]
                trajectories[slot].searches.append((requests[slot], result))
                observations[slot] = self._documents(result)
            else:
                observations[slot] = self._invalid
        for slot in going:
            # The observation and at least one token after it must fit.
            if self.generator.room(slot) <= len(observations[slot]):
                trajectories[slot].finish = "length"
            else:
                trajectories[slot].append_inserted(observations[slot])
        going = [slot for slot in going if not trajectories[slot].finish]
        if going:
            self.generator.extend(going, [observations[slot] for slot in going])
        return going

    def _request(self, trajectory: Trajectory, turn: int) -> SearchRequest:
        episode = trajectory.episode
        return SearchRequest(
            episode=episode.number,
            turn=turn,
            query=trajectory.turns[-1].action.content,
            question=episode.question,
            golden_answers=episode.golden_answers,
            noisy=self.noisy(episode.number, turn),
        )

    def _search(self, requests: list[SearchRequest]) -> dict[tuple[int, int], SearchResult]:
        if not requests:
            return {}
        with self.searching():
            answered = self.engine.search(requests)
        results = {result.key: result for result in answered}
        keys = {request.key for request in requests}
        if results.keys() != keys or len(answered) != len(requests):
            raise ValueError(f"engine {self.engine.name} must answer each request exactly once")
        failed = [result for result in results.values() if result.failure]
        if failed and self.stop_on_failure:
            raise UserError(
                f"{len(failed)} of {len(requests)} searches failed ({failed[0].failure}); mend the "
                "engine, or set config.rollout.stop_on_failure=False to go on without documents"
            )
        return results

    def _documents(self, result: SearchResult) -> list[int]:
        """The information block's tokens; too long a text loses its end, never its closing tag."""
        if result.failure:
            text = prompts.search_failed(result.failure)
        else:
            text = prompts.format_documents(result.documents)
        block = encode(self.tokenizer, prompts.information_block(text))
        if len(block) <= self.limits.observation_tokens:
            return block
        opening, closing = prompts.information_block("\0").split("\0")
        opening, closing = encode(self.tokenizer, opening), encode(self.tokenizer, closing)
        room = self.limits.observation_tokens - len(opening) - len(closing)
        if room < 0:
            raise UserError(
                f"config.rollout.observation_tokens={self.limits.observation_tokens} has no room "
                f"for the information tags ({len(opening) + len(closing)} tokens); raise it"
            )
        return opening + encode(self.tokenizer, text)[:room] + closing
