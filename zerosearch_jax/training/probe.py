"""Sends one search to an engine on a server, before a job compiles anything."""

from dataclasses import replace

from zerosearch_jax.errors import UserError
from zerosearch_jax.search.engine import SearchRequest, describe_failures
from zerosearch_jax.training import factory
from zerosearch_jax.training.sections import MeshConfig, SearchConfig

_REQUEST = SearchRequest(
    episode=0,
    turn=0,
    query="capital of France",
    question="What is the capital of France?",
    golden_answers=("Paris",),
)


def probe(search: SearchConfig, key: str, seed: int, mesh: MeshConfig) -> None:
    """Searches once, in one attempt, if the engine is on a server; other engines are not built.

    Args:
      key: config key of the section, for the error.

    Raises:
      UserError: the search failed.
    """
    simulator_server = search.engine == "simulated" and search.simulator.url
    if not simulator_server and search.engine not in ("retriever", "web"):
        return
    once = replace(search, remote=replace(search.remote, attempts=1))
    (result,) = factory.make_engine(once, seed, mesh).search([_REQUEST])
    if result.failure:
        raise UserError(
            f"config.{key}: the engine {search.engine} failed a first search "
            f"({describe_failures([result])}); start the server, or fix its address, the API key "
            "or the network"
        )
