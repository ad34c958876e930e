"""What a search is: a request that carries its episode, a result that carries its request.

Every engine (simulated, BM25, a server) speaks this and nothing else. No jax here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Passage:
    """About 30 words on one entity; `attributes` are the facts it states."""

    id: str
    entity_id: str
    title: str
    text: str
    attributes: tuple[str, ...]


@dataclass(frozen=True)
class SearchRequest:
    """One search of one episode. It carries everything an engine may need, so that a query
    can never be paired with another row's question (in the released code it can).

    Attributes:
      episode: number of the episode, unique within a run.
      turn: number of the episode's turn, from 0; (episode, turn) identifies the request.
      query: what the policy wrote between the search tags, stripped.
      question: the question the episode answers, for simulated engines and refinement.
      golden_answers: its gold answers, for simulated engines and to keep them out of noise. A
        real engine reads neither.
      noisy: whether the curriculum drew a noisy search, for simulated engines.
    """

    episode: int
    turn: int
    query: str
    question: str
    golden_answers: tuple[str, ...]
    noisy: bool = False

    @property
    def key(self) -> tuple[int, int]:
        return (self.episode, self.turn)


@dataclass(frozen=True)
class SearchResult:
    """The answer to one request.

    Attributes:
      key: the request's `(episode, turn)`.
      documents: best first; empty when nothing was found or the search failed.
      failure: why the search failed after its retries, or "" when it did not.
    """

    key: tuple[int, int]
    documents: tuple[str, ...]
    failure: str = ""


class SearchEngine(Protocol):
    """Anything that answers a batch of requests with exactly one result each, in any order."""

    name: str

    def search(self, requests: Sequence[SearchRequest]) -> list[SearchResult]: ...
