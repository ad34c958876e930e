"""The interface of all search engines: requests, results and passages.

A request carries its episode, and a result carries the key of its request.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Passage:
    """Text of about 30 words on one entity; `attributes` names the facts in it."""

    id: str
    entity_id: str
    title: str
    text: str
    attributes: tuple[str, ...]


@dataclass(frozen=True)
class SearchRequest:
    """One search of one episode.

    It carries everything an engine may need, so that a query can never be paired with another
    row's question (in the released code it can).

    Attributes:
      episode: number of the episode, unique within a run.
      turn: number of the episode's turn, from 0; (episode, turn) identifies the request.
      query: the policy's text between the search tags, stripped.
      question: the episode's question, for simulated engines and refinement.
      golden_answers: gold answers of the question, for simulated engines and to keep answers out
        of noisy documents. A real engine reads neither them nor the question.
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
        """The pair (episode, turn), which identifies the request."""
        return (self.episode, self.turn)


@dataclass(frozen=True)
class SearchResult:
    """The answer to one request.

    Attributes:
      key: the request's `(episode, turn)`.
      documents: documents, best first; empty if nothing was found or the search failed.
      failure: reason of a search that failed after its retries, or "" for a successful one.
      too_long: whether the search failed because its text was too long for the engine. Such a
        failure never ends a run, because the policy wrote the query.
    """

    key: tuple[int, int]
    documents: tuple[str, ...]
    failure: str = ""
    too_long: bool = False


class SearchEngine(Protocol):
    """Search engine that answers a batch of requests."""

    name: str

    def search(self, requests: Sequence[SearchRequest]) -> list[SearchResult]:
        """Returns exactly one result per request, in any order."""
        ...
