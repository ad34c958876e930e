"""The interface of all search engines: requests, results and passages.

A request carries its episode, and a result carries the key of its request.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from zerosearch_jax.telemetry.metrics import FAILURE_METRICS

FAILURE_KINDS = tuple(name.removeprefix("failed_searches/") for name in FAILURE_METRICS)
"""Kinds of failed searches, which the metrics `failed_searches/KIND` define and count."""
_SURROGATE = re.compile("[\ud800-\udfff]")


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
      documents: documents, best first; empty if nothing was found or the search failed. Lone
        surrogates, which neither UTF-8 nor a tokenizer can encode, become U+FFFD.
      failure: reason of a search that failed after its retries, or "" for a successful one. It
        becomes text of the episode, so it contains no address, key or text of a reply.
      failure_kind: one of `FAILURE_KINDS`, "other" if the engine gives none of them; "" for a
        successful search.
      address: scheme, host, port and path that a failed search asked; "" if it asked no server.
    """

    key: tuple[int, int]
    documents: tuple[str, ...]
    failure: str = ""
    failure_kind: str = ""
    address: str = ""

    def __post_init__(self):
        documents = tuple(_SURROGATE.sub("\ufffd", document) for document in self.documents)
        object.__setattr__(self, "documents", documents)
        if self.failure and self.failure_kind not in FAILURE_KINDS:
            object.__setattr__(self, "failure_kind", "other")

    @property
    def too_long(self) -> bool:
        """Whether the search failed because its text was too long for the engine.

        Such a failure never ends a run, because the policy wrote the query.
        """
        return self.failure_kind == "too_long"


class SearchEngine(Protocol):
    """Search engine that answers a batch of requests."""

    name: str

    def search(self, requests: Sequence[SearchRequest]) -> list[SearchResult]:
        """Returns exactly one result per request, in any order."""
        ...


def failure_counts(results: Iterable[SearchResult]) -> dict[str, int]:
    """Returns the number of failed searches by kind, in the order of `FAILURE_KINDS`.

    Kinds without a failure are absent.
    """
    counts = Counter(result.failure_kind for result in results if result.failure)
    return {kind: counts[kind] for kind in FAILURE_KINDS if counts[kind]}


def describe_failures(results: Sequence[SearchResult]) -> str:
    """Describes failed searches in one line: the commonest reason, the kinds and the addresses.

    For example "POST: Timeout; timeout 3, http_5xx 1; asked http://10.0.0.1:8000/retrieve".
    """
    failed = [result for result in results if result.failure]
    ((reason, _),) = Counter(result.failure for result in failed).most_common(1)
    kinds = ", ".join(f"{kind} {count}" for kind, count in failure_counts(failed).items())
    addresses = sorted({result.address for result in failed if result.address})
    asked = f"; asked {' and '.join(addresses)}" if addresses else ""
    return f"{reason}; {kinds}{asked}"
