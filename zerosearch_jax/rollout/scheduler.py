"""The multi-turn scheduler: think, search, read, answer, for many episodes at once.

Every episode owns a slot of the policy's generator. A slot whose episode has ended takes the next
one at once; a slot that waits for documents is parked while the others go on; only what was
inserted is prefilled behind its cache. It decides nothing about rewards or learning.
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
from zerosearch_jax.search.engine import SearchEngine, SearchRequest, SearchResult
from zerosearch_jax.text import prompts
from zerosearch_jax.text.actions import parse_action
from zerosearch_jax.text.tokenizer import decode, encode, encode_prompt

STOP_STRINGS = ("</search>", "</answer>")
OPENINGS = ("", "answer", "search")


@dataclass(frozen=True)
class Limits:
    """How long an episode may become.

    Attributes:
      max_turns: searches (and invalid turns) before the last turn. 0: one turn, in which the
        policy answers or has not answered.
      response_tokens: sampled in one turn.
      observation_tokens: inserted after one search, tags included.
    """

    max_turns: int
    response_tokens: int
    observation_tokens: int


class SchedulerState:
    """Who sits where and waits for what; keys are slots of the generator.

    Attributes:
      queued: episodes without a slot yet, a queue for each replica of the generator: a group
        stays on one replica, where its members share their prompt.
      seated: running episodes; `sampling` those that decode; `asking` their requests not yet
        sent; `flying` batches that the engine works on; `observations` tokens to insert.
    """

    def __init__(self, generator: Generator, episodes: Sequence[Episode]):
        self.trajectories = [Trajectory(episode) for episode in episodes]
        self.seated: dict[int, Trajectory] = {}
        self.sampling: set[int] = set()
        self.asking: dict[int, SearchRequest] = {}
        self.flying: dict[Future, dict[int, SearchRequest]] = {}
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
        return any(self._queues)

    def seat_next(self) -> dict[int, Trajectory]:
        """Seats queued episodes in the free slots; returns the new ones."""
        new = {}
        for queue, free in zip(self._queues, self._free, strict=True):
            # A free slot that holds the next group's prompt already is taken first.
            while queue and free:
                question = queue[0].episode.question
                holding = [slot for slot in free if self._last_question.get(slot) == question]
                slot = holding[0] if holding else free[0]
                free.remove(slot)
                self._last_question[slot] = question
                new[slot] = queue.popleft()
        self.seated |= new
        return new

    def leave(self, slot: int, finish: str) -> None:
        """Ends a slot's episode and frees the slot."""
        self.seated.pop(slot).finish = finish
        self._free[self._replica_of(slot)].append(slot)


class Rollouts:
    """Plays episodes with one policy generator and one engine.

    Args:
      engine: None where nobody searches: `limits.max_turns` is 0 and the policy opens.
      noisy: `(episode number, turn) -> bool`, the curriculum's draw.
      stop_on_failure: a failed search ends the run with an error; otherwise the episode gets a
        "search failed" observation.
      opening: what is inserted between the prompt and the one turn that `limits.max_turns`, 0,
        then leaves to the policy. "answer": the opening of the answer; what follows is the
        answer. "search": a search for the question itself and its documents. "": nothing.
      concurrent_searches: batches of searches that may be under way while the policy decodes, for
        an engine that works elsewhere (over the network, on its own devices). What is batched
        with what then depends on the clock, and so do the last bits of the figures. 0: the
        engine and the policy take turns, always in the same way.
      searching: entered while nothing but the engine is waited for (to time it).
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
            raise ValueError(f"opening={opening!r} leaves one turn: max_turns must be 0")
        if engine is None and (limits.max_turns or opening == "search"):
            raise ValueError("episodes that may search need an engine")
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

    def run(self, episodes: Sequence[Episode], key: jax.Array) -> list[Trajectory]:
        """Plays all episodes, as many at once as the generator has slots.

        Args:
          episodes: members of a group next to each other, so that they share their prefill.
          key: a typed PRNG key; episode n samples from `key` folded with n, so what it does
            depends on neither its neighbours nor its place in the batch.

        Returns:
          A trajectory for each episode, in order.
        """
        table = SchedulerState(self.generator, episodes)
        with ThreadPoolExecutor(max(1, self.concurrent_searches)) as pool:
            while table.queued or table.seated:
                self._seat(table)
                for slot, generation in self._advance(table, key).items():
                    self._take_turn(table, slot, generation)
                self._search(table, pool)
                self._observe(table)
        return table.trajectories

    def _advance(self, table: "SchedulerState", key: jax.Array) -> dict[int, Generation]:
        if self.concurrent_searches:  # what has landed is looked at after each burst
            return self.generator.decode_chunk(key=key, sampling=self.sampling)
        # With nobody to seat, coming back early would only make batches smaller.
        share = MIN_FINISHED_FRACTION if table.queued else 1.0
        return self.generator.decode_until(key=key, sampling=self.sampling, share=share)

    def _seat(self, table: "SchedulerState") -> None:
        """Gives free slots to the next episodes."""
        new = table.seat_next()
        if not new:
            return
        for trajectory in new.values():
            trajectory.append_inserted(self._prompt(trajectory))
        self.generator.start(list(new), [t.tokens for t in new.values()])
        if self.opening == "search":
            for slot, trajectory in new.items():
                question = trajectory.episode.question
                table.asking[slot] = self._request(trajectory, turn=0, query=question)
        else:
            self._begin(table, list(new))

    def _begin(self, table: "SchedulerState", slots: list[int]) -> None:
        table.sampling |= set(slots)
        self.generator.start_decoding(
            slots,
            streams=[(table.seated[slot].episode.number, 0) for slot in slots],
            max_new_tokens=self.limits.response_tokens,
        )

    def _prompt(self, trajectory: Trajectory) -> list[int]:
        question = trajectory.episode.question
        prompt = encode_prompt(self.tokenizer, prompts.policy_prompt(question))
        if self.opening == "answer":
            trajectory.answer_prefix = "answer"
            return prompt + encode(self.tokenizer, prompts.FORCED_ANSWER)
        if self.opening == "search":
            return prompt + encode(self.tokenizer, prompts.forced_search(question))
        return prompt

    def _take_turn(self, table: "SchedulerState", slot: int, generation: Generation) -> None:
        """Records what a slot sampled; the episode ends, searches, or is told it is invalid."""
        table.sampling.discard(slot)
        trajectory = table.seated[slot]
        trajectory.append_sampled(generation.tokens, generation.logprobs)
        text = decode(self.tokenizer, generation.tokens)
        action = parse_action(text, trajectory.answer_prefix)
        trajectory.turns.append(Turn(text, action))
        if action.kind == "answer":
            table.leave(slot, "answer")
        elif len(trajectory.turns) > self.limits.max_turns:
            table.leave(slot, "turns")
        elif action.kind == "search":
            turn = len(trajectory.turns) - 1
            table.asking[slot] = self._request(trajectory, turn, action.content)
        else:
            table.observations[slot] = self._invalid

    def _search(self, table: "SchedulerState", pool: ThreadPoolExecutor) -> None:
        """Sends requests to the engine, as one batch, and takes in what it has answered.

        With `concurrent_searches` a batch is sent as soon as a thread is free, and waited for
        only when no slot samples. Without, the engine is asked once half of the seated episodes
        wait for it or none samples: it may share the device, and likes large batches.
        """
        waiting = table.asking
        if not self.concurrent_searches:
            if waiting and (not table.sampling or 2 * len(waiting) >= len(table.seated)):
                table.asking = {}
                self._take_results(table, waiting, self._ask(list(waiting.values())))
            return
        if waiting and len(table.flying) < self.concurrent_searches:
            table.asking = {}
            table.flying[pool.submit(self._ask, list(waiting.values()))] = waiting
        if table.flying:
            idle = not table.sampling and not table.observations
            with self.searching() if idle else nullcontext():
                landed, _ = wait(table.flying, None if idle else 0, FIRST_COMPLETED)
            for future in landed:
                self._take_results(table, table.flying.pop(future), future.result())

    def _take_results(
        self,
        table: "SchedulerState",
        asked: dict[int, SearchRequest],
        results: dict[tuple[int, int], SearchResult],
    ) -> None:
        for slot, request in asked.items():
            result = results[request.key]
            table.seated[slot].searches.append((request, result))
            table.observations[slot] = self._documents(result)

    def _observe(self, table: "SchedulerState") -> None:
        """Inserts what the episodes are told, and lets them sample on."""
        told, table.observations = table.observations, {}
        for slot, tokens in list(told.items()):
            # The observation and at least one token after it must fit.
            if self.generator.free_tokens(slot) <= len(tokens):
                table.leave(slot, "length")
                del told[slot]
            else:
                table.seated[slot].append_inserted(tokens)
        if told:
            self.generator.extend(list(told), list(told.values()))
            self._begin(table, list(told))

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

    def _ask(self, requests: list[SearchRequest]) -> dict[tuple[int, int], SearchResult]:
        """The engine's results by key; refuses a wrong set of them."""
        with nullcontext() if self.concurrent_searches else self.searching():
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
                f"observation_tokens={self.limits.observation_tokens} has no room "
                f"for the information tags ({len(opening) + len(closing)} tokens); raise it"
            )
        return opening + encode(self.tokenizer, text)[:room] + closing
