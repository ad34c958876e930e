"""Multi-turn scheduler: runs many think-search-read-answer episodes at once.

Each running episode owns a slot of the policy's generator. When an episode ends, its slot takes the
next queued episode before decoding goes on. A slot that waits for documents is parked while other
slots decode. When the documents arrive, only they are prefilled, after the slot's cached tokens.
The scheduler computes no rewards and knows nothing about learning.
"""

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import groupby

import jax

from zerosearch_jax.errors import UserError
from zerosearch_jax.generate.generator import (
    MIN_FINISHED_FRACTION,
    Generation,
    Generator,
    slots_by_replica,
)
from zerosearch_jax.generate.sampling import Sampling
from zerosearch_jax.rollout.trajectory import Episode, Trajectory, Turn
from zerosearch_jax.search.engine import (
    SearchEngine,
    SearchRequest,
    SearchResult,
    describe_failures,
)
from zerosearch_jax.search.http_client import closed_on_interrupt
from zerosearch_jax.text import prompts, thoughts
from zerosearch_jax.text.actions import parse_action
from zerosearch_jax.text.tokenizer import decode, encode, encode_prompt, opens_thought

STOP_STRINGS = ("</search>", "</answer>")
OPENINGS = ("", "answer", "search")


@dataclass(frozen=True)
class Limits:
    """Bounds on the length of an episode.

    Attributes:
      max_turns: maximum number of turns that search or are invalid. One final turn may follow them,
        so an episode has at most `max_turns + 1` turns. A search in the final turn is not run.
      response_tokens: maximum number of tokens sampled in one turn. A turn that is cut there has
        no valid action. It ends the episode if it is the last (`Trajectory.finish` "length").
      observation_tokens: maximum number of tokens inserted after one search, tags included.
    """

    max_turns: int
    response_tokens: int
    observation_tokens: int


class SchedulerState:
    """Mutable state of one `Rollouts.run`: trajectories, and the slots they occupy.

    Queued episodes wait in one queue per replica of the generator. A group stays on one replica,
    where its members share the prefill of their prompt.

    Attributes:
      trajectories: one per episode, in order.
      active: slot -> trajectory of each running episode.
      decoding: active slots that are sampling.
      pending: slot -> search request that is not sent yet.
      in_flight: future of each batch sent to the engine -> requests of that batch by slot.
      observations: slot -> tokens to insert before the slot decodes again.
    """

    def __init__(self, generator: Generator, episodes: Sequence[Episode]):
        self.trajectories = [Trajectory(episode) for episode in episodes]
        self.active: dict[int, Trajectory] = {}
        self.decoding: set[int] = set()
        self.pending: dict[int, SearchRequest] = {}
        self.in_flight: dict[Future, dict[int, SearchRequest]] = {}
        self.observations: dict[int, list[int]] = {}
        self._queues = [deque() for _ in range(generator.replicas)]
        groups = groupby(self.trajectories, key=lambda t: t.episode.question)
        for i, (_, group) in enumerate(groups):
            self._queues[i % len(self._queues)].extend(group)
        self._free = slots_by_replica(generator)
        self._replica_of = generator.replica_of
        self._last_question: dict[int, str] = {}

    @property
    def queued(self) -> bool:
        """Whether any episode has no slot yet."""
        return any(self._queues)

    def fill_free_slots(self) -> dict[int, Trajectory]:
        """Moves queued episodes into free slots; returns the newly active ones by slot."""
        new = {}
        for queue, free in zip(self._queues, self._free, strict=True):
            while queue and free:
                # Prefer a slot whose cache holds this prompt: it needs no prefill.
                question = queue[0].episode.question
                holding = (slot for slot in free if self._last_question.get(slot) == question)
                slot = next(holding, free[0])
                free.remove(slot)
                self._last_question[slot] = question
                new[slot] = queue.popleft()
        self.active |= new
        return new

    def end_episode(self, slot: int, finish: str) -> None:
        """Records why the slot's episode ended and frees the slot."""
        self.active.pop(slot).finish = finish
        self._free[self._replica_of(slot)].append(slot)


class Rollouts:
    """Runs episodes with one policy generator and one search engine.

    Args:
      engine: may be None if no search is run: `limits.max_turns` is 0 and `opening` is not
        "search".
      noisy: `(episode number, turn) -> bool`, the curriculum's draw.
      stop_on_failure: whether a failed search stops the run with an error. Otherwise, and always
        if the query was too long for the engine, the episode gets a "search failed" observation.
      opening: text inserted after the prompt, before the policy's only turn (requires
        `max_turns=0`). "answer": the opening of the answer, which the policy completes. "search":
        a search with the question as query, and the documents found. "": nothing.
      concurrent_searches: maximum number of search batches in flight while the policy decodes. Use
        it for engines that run elsewhere (over the network, on their own devices). Batch
        composition then depends on timing, so metrics are reproducible only up to rounding. With 0,
        engine and policy alternate in a fixed order, and results are deterministic.
      searching: returns a context manager that times the periods in which only the engine works.

    Raises:
      ValueError: `opening` is unknown or contradicts `limits`, or an engine is required.
    """

    def __init__(
        self,
        generator: Generator,
        engine: SearchEngine | None,
        tokenizer,
        *,
        limits: Limits,
        sampling: Sampling,
        noisy: Callable[[int, int], bool] = lambda episode, turn: False,
        stop_on_failure: bool = False,
        opening: str = "",
        concurrent_searches: int = 0,
        searching: Callable[[], AbstractContextManager] = nullcontext,
    ):
        if opening not in OPENINGS:
            raise ValueError(f"opening is {opening!r}: use one of {OPENINGS}")
        if opening and limits.max_turns:
            raise ValueError(f"opening={opening!r} allows only one turn: max_turns must be 0")
        if engine is None and (limits.max_turns or opening == "search"):
            raise ValueError("engine is None, but episodes may search: pass an engine")
        self.generator = generator
        self.engine = engine
        self.tokenizer = tokenizer
        self.limits = limits
        self.sampling = sampling
        self.noisy = noisy
        self.stop_on_failure = stop_on_failure
        self.opening = opening
        self.concurrent_searches = concurrent_searches
        self.searching = searching
        self._invalid = encode(tokenizer, prompts.INVALID_ACTION)
        self._opens_thought = opens_thought(tokenizer)

    def run(self, episodes: Sequence[Episode], key: jax.Array) -> list[Trajectory]:
        """Runs all episodes, as many at once as the generator has slots.

        Args:
          episodes: members of a group next to each other, so that they share their prefill.
          key: a typed PRNG key. Episode n samples from `key` folded with n, so its samples depend
            neither on its neighbours nor on its place in the batch.

        Returns:
          One trajectory per episode, in order.
        """
        state = SchedulerState(self.generator, episodes)
        with ThreadPoolExecutor(max(1, self.concurrent_searches)) as pool, closed_on_interrupt():
            while state.queued or state.active:
                self._start_episodes(state)
                for slot, generation in self._decode(state, key).items():
                    self._finish_turn(state, slot, generation)
                self._search(state, pool)
                self._insert_observations(state)
        return state.trajectories

    def _start_episodes(self, state: SchedulerState) -> None:
        """Starts queued episodes in the free slots."""
        new = state.fill_free_slots()
        if not new:
            return
        for trajectory in new.values():
            trajectory.append_inserted(self._prompt(trajectory))
        self.generator.start(list(new), [t.tokens for t in new.values()])
        if self.opening == "search":
            for slot, trajectory in new.items():
                question = trajectory.episode.question
                state.pending[slot] = self._request(trajectory, turn=0, query=question)
        else:
            self._start_decoding(state, list(new))

    def _start_decoding(self, state: SchedulerState, slots: list[int]) -> None:
        state.decoding |= set(slots)
        self.generator.start_decoding(
            slots,
            streams=[(state.active[slot].episode.number, 0) for slot in slots],
            max_new_tokens=self.limits.response_tokens,
        )

    def _decode(self, state: SchedulerState, key: jax.Array) -> dict[int, Generation]:
        """Decodes a chunk, or until enough slots stop; returns the finished turns by slot."""
        if self.concurrent_searches:  # Search results are polled after each chunk.
            return self.generator.decode_chunk(key=key, sampling=self.sampling)
        # With no queued episodes, returning early would only make search batches smaller.
        fraction = MIN_FINISHED_FRACTION if state.queued else 1.0
        return self.generator.decode_until(
            key=key, sampling=self.sampling, min_finished_fraction=fraction
        )

    def _prompt(self, trajectory: Trajectory) -> list[int]:
        """Tokens inserted before the first turn: the prompt and the opening."""
        question = trajectory.episode.question
        prompt = encode_prompt(self.tokenizer, prompts.policy_prompt(question))
        if not self.opening:
            return prompt
        if self.opening == "answer":
            trajectory.answer_prefix = "answer"
            text = prompts.FORCED_ANSWER
        else:
            text = prompts.forced_search(question)
        if self._opens_thought:
            text = thoughts.continue_thought(text)
        return prompt + encode(self.tokenizer, text)

    def _finish_turn(self, state: SchedulerState, slot: int, generation: Generation) -> None:
        """Records a sampled turn and acts on it: ends the episode, or queues its next step."""
        state.decoding.discard(slot)
        trajectory = state.active[slot]
        trajectory.append_sampled(generation.tokens, generation.logprobs)
        text = decode(self.tokenizer, generation.tokens)
        if self._opens_thought and not trajectory.turns and not self.opening:
            text = thoughts.OPEN + text
        action = parse_action(text, trajectory.answer_prefix)
        trajectory.turns.append(Turn(text, action))
        if action.kind == "answer":
            state.end_episode(slot, "answer")
        elif len(trajectory.turns) > self.limits.max_turns:
            state.end_episode(slot, "length" if generation.finish == "length" else "turns")
        elif action.kind == "search":
            turn = len(trajectory.turns) - 1
            state.pending[slot] = self._request(trajectory, turn, action.content)
        else:
            state.observations[slot] = self._invalid

    def _search(self, state: SchedulerState, pool: ThreadPoolExecutor) -> None:
        """Sends the pending requests to the engine as one batch and records finished results.

        With `concurrent_searches`, a batch is sent as soon as a thread is free and is waited for
        only when no slot can decode. Without it, the engine is called when at least half of
        the active episodes wait for it, or when none decodes. Engine and policy may share
        the device, so a few large batches are faster than many small ones.
        """
        requests = state.pending
        if not self.concurrent_searches:
            if requests and (not state.decoding or 2 * len(requests) >= len(state.active)):
                state.pending = {}
                results = self._query_engine(list(requests.values()))
                self._record_results(state, requests, results)
            return
        if requests and len(state.in_flight) < self.concurrent_searches:
            state.pending = {}
            future = pool.submit(self._query_engine, list(requests.values()))
            state.in_flight[future] = requests
        if state.in_flight:
            idle = not state.decoding and not state.observations
            with self.searching() if idle else nullcontext():
                done, _ = wait(state.in_flight, None if idle else 0, FIRST_COMPLETED)
            for future in done:
                self._record_results(state, state.in_flight.pop(future), future.result())

    def _record_results(
        self,
        state: SchedulerState,
        requests: dict[int, SearchRequest],
        results: dict[tuple[int, int], SearchResult],
    ) -> None:
        """Adds each result to its trajectory and to the observations to insert."""
        for slot, request in requests.items():
            result = results[request.key]
            state.active[slot].searches.append((request, result))
            state.observations[slot] = self._observation(result)

    def _insert_observations(self, state: SchedulerState) -> None:
        """Inserts the observations, then lets their episodes decode the next turn."""
        observations, state.observations = state.observations, {}
        for slot, tokens in list(observations.items()):
            # The observation and at least one token after it must fit.
            if self.generator.free_tokens(slot) <= len(tokens):
                state.end_episode(slot, "length")
                del observations[slot]
            else:
                state.active[slot].append_inserted(tokens)
        if observations:
            self.generator.extend(list(observations), list(observations.values()))
            self._start_decoding(state, list(observations))

    def _request(self, trajectory: Trajectory, turn: int, query: str) -> SearchRequest:
        episode = trajectory.episode
        return SearchRequest(
            episode=episode.number,
            turn=turn,
            query=query,
            question=episode.question,
            golden_answers=episode.golden_answers,
            noisy=self.noisy(episode.number, turn),
        )

    def _query_engine(self, requests: list[SearchRequest]) -> dict[tuple[int, int], SearchResult]:
        """Returns the engine's results by request key, exactly one per request."""
        with nullcontext() if self.concurrent_searches else self.searching():
            answered = self.engine.search(requests)
        if sorted(result.key for result in answered) != sorted(r.key for r in requests):
            raise ValueError(f"engine {self.engine.name} must answer each request exactly once")
        # A query that is too long is the policy's failure, from which it can learn.
        failed = [result for result in answered if result.failure and not result.too_long]
        if failed and self.stop_on_failure:
            raise UserError(
                f"{len(failed)} of {len(requests)} searches failed ({describe_failures(failed)}); "
                "fix the engine, or set config.rollout.stop_on_failure=False to continue without "
                "documents"
            )
        return {result.key: result for result in answered}

    def _observation(self, result: SearchResult) -> list[int]:
        """Returns the information block's tokens; a long text is cut before the closing tag."""
        if result.failure:
            text = prompts.search_failed(result.failure)
        else:
            text = prompts.format_documents(result.documents)
        block = encode(self.tokenizer, prompts.information_block(text))
        if len(block) <= self.limits.observation_tokens:
            return block
        tags = prompts.information_block("\0").split("\0")
        opening, closing = (encode(self.tokenizer, tag) for tag in tags)
        text_tokens = self.limits.observation_tokens - len(opening) - len(closing)
        if text_tokens < 0:
            raise UserError(
                f"observation_tokens={self.limits.observation_tokens} is below the "
                f"{len(opening) + len(closing)} tokens of the information tags; raise it"
            )
        return opening + encode(self.tokenizer, text)[:text_tokens] + closing
