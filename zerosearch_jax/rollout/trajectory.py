"""One episode as it happened: an append-only list of token ids with their provenance.

Whoever wrote a token is recorded when the token is appended; the loss mask is that record and is
never worked out from text.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from zerosearch_jax.search.engine import SearchRequest, SearchResult
from zerosearch_jax.text.actions import Action, final_answer
from zerosearch_jax.text.tokenizer import decode


@dataclass(frozen=True)
class Episode:
    """What an episode starts from.

    Attributes:
      number: unique within a run; every random draw of the episode is keyed by it.
      question, golden_answers: of the row it answers.
    """

    number: int
    question: str
    golden_answers: tuple[str, ...]


@dataclass(frozen=True)
class Turn:
    """One turn of the policy: the text it wrote and what that asks for."""

    text: str
    action: Action


@dataclass
class Trajectory:
    """An episode's tokens, turns and searches. Change it only by the `append` methods.

    Attributes:
      tokens, by_policy, logprobs, turn_of: `[n]` each: the ids; whether the policy sampled them;
        their log-prob at sampling (0 for inserted ones); the turn they belong to.
      searches: requests with their results, in order.
      answer_prefix: "answer" when the opening tag of the answer was inserted, else "".
      finish: "answer"; "turns" (none left); "length" (no room left); "" while it runs.
    """

    episode: Episode
    tokens: list[int] = field(default_factory=list)
    by_policy: list[bool] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    turn_of: list[int] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    searches: list[tuple[SearchRequest, SearchResult]] = field(default_factory=list)
    answer_prefix: str = ""
    finish: str = ""

    def append_inserted(self, tokens: Sequence[int]) -> None:
        """Appends tokens that the policy did not write: prompt, documents, observations."""
        self._append(tokens, False, [0.0] * len(tokens))

    def append_sampled(self, tokens: Sequence[int], logprobs: Sequence[float]) -> None:
        """Appends tokens exactly as the policy sampled them."""
        self._append(tokens, True, logprobs)

    def _append(self, tokens: Sequence[int], by_policy: bool, logprobs: Sequence[float]) -> None:
        self.tokens.extend(tokens)
        self.by_policy.extend([by_policy] * len(tokens))
        self.logprobs.extend(logprobs)
        self.turn_of.extend([len(self.turns)] * len(tokens))
        lengths = {len(x) for x in (self.tokens, self.by_policy, self.logprobs, self.turn_of)}
        if len(lengths) != 1:
            raise ValueError(f"a trajectory's lists must stay of one length, not {lengths}")

    @property
    def answer(self) -> str | None:
        """The policy's own last answer, or None."""
        return final_answer([turn.text for turn in self.turns], self.answer_prefix)

    @property
    def policy_tokens(self) -> int:
        """Number of tokens that the policy sampled."""
        return sum(self.by_policy)

    def segments(self, tokenizer) -> list[tuple[str, bool]]:
        """Text for people: maximal runs of one writer, with whether the policy is the writer."""
        runs: list[tuple[list[int], bool]] = []
        for token, ours in zip(self.tokens, self.by_policy, strict=True):
            if not runs or runs[-1][1] != ours:
                runs.append(([], ours))
            runs[-1][0].append(token)
        return [(decode(tokenizer, ids), ours) for ids, ours in runs]
