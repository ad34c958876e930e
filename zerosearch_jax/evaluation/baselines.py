"""How a model answers questions: five procedures around one prompt.

Every method puts the same user turn before the model, the policy's; only what happens after it
differs. So a tiny policy that knows one format and an instruct model that knows none are
measured alike. The published baselines of these names use prompts of their own, so their figures
can be told from ours by more than the model.

| method      | what happens after the prompt                                                     |
|-------------|-----------------------------------------------------------------------------------|
| `direct`    | the opening of the answer is inserted: the model answers without a thought        |
| `cot`       | one turn: the model may think and must answer; a search ends it without an answer |
| `rag`       | a search for the question and its documents are inserted, then one turn as above  |
| `search`    | the model searches as often as the limits allow, then answers. For a model that   |
|             | was not trained to, this is the baseline that papers call RA-Agent                |
| `search_o1` | as `search`, but the model first refines what was found (arXiv 2501.05366), see   |
|             | `search.refine`                                                                   |
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import jax
from ml_collections import ConfigDict

from zerosearch_jax.data.qa import QARow
from zerosearch_jax.errors import UserError
from zerosearch_jax.generate.generator import Generator
from zerosearch_jax.generate.sampling import GREEDY, Sampling
from zerosearch_jax.generate.texts import TextGenerator
from zerosearch_jax.parallel.processes import gather, part
from zerosearch_jax.rollout.scheduler import Limits, Rollouts
from zerosearch_jax.rollout.trajectory import Episode, Trajectory
from zerosearch_jax.search.engine import SearchEngine
from zerosearch_jax.search.refine import RefiningEngine
from zerosearch_jax.training import factory

METHODS = ("direct", "cot", "rag", "search", "search_o1")
WITHOUT_ENGINE = ("direct", "cot")

_OPENINGS = {"direct": "answer", "cot": "", "rag": "search"}  # of the methods of one turn


def check_method(method: str) -> None:
    """Raises UserError, which names them, for a method that there is not."""
    if method not in METHODS:
        raise UserError(f"method is {method!r}; choose one of {', '.join(METHODS)}")


def play(
    method: str,
    generator: Generator,
    engine: SearchEngine | None,
    tokenizer,
    rows: Sequence[QARow],
    *,
    limits: Limits,
    sampling: Sampling = GREEDY,
    key: jax.Array | None = None,
    generate: Callable[[list[str], list[tuple[int, int]]], list[str]] | None = None,
) -> list[Trajectory]:
    """One episode a row, in order, each numbered by its row; every process plays its part.

    Args:
      method: one of `METHODS`.
      engine: not read by `WITHOUT_ENGINE`, nor when `limits.max_turns` is 0; may be None then.
      limits: its `max_turns` is read by "search" and "search_o1" alone.
      key: a typed PRNG key of the draws; `jax.random.key(0)` when None. Greedy episodes need none.
      generate: of "search_o1": the model that refines, see `refiner`.

    Raises:
      UserError: unknown method.
      ValueError: no engine or, for "search_o1", no `generate` where one is needed.
    """
    check_method(method)
    if method == "search_o1":
        if engine is None or generate is None:
            raise ValueError("search_o1 refines an engine's documents: it needs both to do so")
        engine = RefiningEngine(engine, generate)
    rollouts = Rollouts(
        generator,
        engine,
        tokenizer,
        limits=replace(limits, max_turns=0) if method in _OPENINGS else limits,
        sampling=sampling,
        opening=_OPENINGS.get(method, ""),
    )
    episodes = [Episode(i, row.question, row.golden_answers) for i, row in enumerate(rows)]
    return gather(rollouts.run(part(episodes), jax.random.key(0) if key is None else key))


def refiner(
    model: factory.Model, config: ConfigDict, mesh: jax.sharding.Mesh, *, max_new_tokens: int
) -> TextGenerator:
    """What "search_o1" refines with: the same model, greedy, in a generator of its own.

    The policy's generator is full of episodes that wait, so this one holds weights and a cache
    once more. Its slots must hold a request with all its documents and `max_new_tokens`.
    """
    return TextGenerator(
        factory.make_generator(model, config, mesh, stop_strings=()),
        model.tokenizer,
        sampling=GREEDY,
        max_new_tokens=max_new_tokens,
        key=jax.random.key(0),
    )
