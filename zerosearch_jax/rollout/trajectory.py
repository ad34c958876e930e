"""Trajectory of one episode: an append-only list of token ids with their provenance.

Each token's writer (policy or inserted) is recorded when the token is appended. The loss mask is
made from this record (`training/policy_update.py`) and never from text.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from zerosearch_jax.search.engine import SearchRequest, SearchResult
from zerosearch_jax.text.actions import Action, final_answer
from zerosearch_jax.text.tokenizer import decode


@dataclass(frozen=True)
class Episode:
    """Input of one episode: a question, its gold answers and a number.

    Attributes:
      number: unique within a training run; keys every random draw of the episode.
    """

    number: int
    question: str
    golden_answers: tuple[str, ...]


@dataclass(frozen=True)
class Turn:
    """One turn of the policy: its text and the action parsed from it.

    If the chat template opened a thought, the text of the first turn begins with the template's
    `<think>`.
    """

    text: str
    action: Action


@dataclass
class Trajectory:
    """Tokens, turns and searches of one episode. Add tokens only with the `append` methods.

    Attributes:
      tokens: `[n]` token ids.
      by_policy: `[n]`, whether the policy sampled the token.
      logprobs: `[n]` log-prob at sampling; 0 for inserted tokens.
      turn_of: `[n]` number of the turn that the token belongs to.
      turns: the policy's turns, in order.
      searches: requests with their results, in order.
      answer_prefix: "answer" if the opening tag of the answer was inserted, else "".
      finish: why the episode ended; "" while it runs.
        "answer": the policy answered.
        "turns": the last allowed turn was complete, but without an answer.
        "length": the episode was truncated. Its last allowed turn reached the limit of sampled
        tokens or the end of the slot, or the next observation did not fit the slot. A turn that
        is cut earlier only counts as invalid, because the episode goes on.
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
        """Appends tokens that the policy did not write: the prompt or an observation."""
        self._append(tokens, False, [0.0] * len(tokens))

    def append_sampled(self, tokens: Sequence[int], logprobs: Sequence[float]) -> None:
        """Appends tokens exactly as the policy sampled them."""
        self._append(tokens, True, logprobs)

    def _append(self, tokens: Sequence[int], by_policy: bool, logprobs: Sequence[float]) -> None:
        if len(tokens) != len(logprobs):
            raise ValueError(
                f"got {len(tokens)} tokens but {len(logprobs)} logprobs; give one per token"
            )
        self.tokens.extend(tokens)
        self.by_policy.extend([by_policy] * len(tokens))
        self.logprobs.extend(logprobs)
        self.turn_of.extend([len(self.turns)] * len(tokens))

    @property
    def answer(self) -> str | None:
        """The policy's own last answer; None if it gave none."""
        return final_answer([turn.text for turn in self.turns], self.answer_prefix)

    @property
    def policy_tokens(self) -> int:
        """Number of tokens that the policy sampled."""
        return sum(self.by_policy)

    def segments(self, tokenizer) -> list[tuple[str, bool]]:
        """Returns `(text, by_policy)` for each maximal run of tokens with the same writer."""
        runs: list[tuple[list[int], bool]] = []
        for token, by_policy in zip(self.tokens, self.by_policy, strict=True):
            if not runs or runs[-1][1] != by_policy:
                runs.append(([], by_policy))
            runs[-1][0].append(token)
        return [(decode(tokenizer, ids), by_policy) for ids, by_policy in runs]
