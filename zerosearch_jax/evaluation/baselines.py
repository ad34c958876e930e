"""Inference baselines: five procedures in which a model answers questions with one prompt.

Every method starts with the policy's user turn and differs only in the steps after it. A tiny
policy that knows one format and an instruct model that knows none are thus measured alike. The
published baselines of these names use different prompts, so their scores differ from ours by more
than the model.

| method      | steps after the prompt                                                            |
|-------------|-----------------------------------------------------------------------------------|
| `direct`    | the opening of the answer is inserted: the model answers without thinking         |
| `cot`       | one turn: the model may think and must answer; a search ends it without an answer |
| `rag`       | a search for the question and its documents are inserted, then one turn as above  |
| `search`    | the model searches as often as the limits allow, then answers; for a model not    |
|             | trained to search, this is the baseline that papers call RA-Agent                 |
| `search_o1` | as `search`, but the model refines the documents before it reads them             |
|             | (arXiv 2501.05366), see `search.refine`                                           |
"""

from collections.abc import Sequence
from dataclasses import replace

import jax

from zerosearch_jax.data.qa import QARow
from zerosearch_jax.errors import UserError
from zerosearch_jax.generate.generator import Generator
from zerosearch_jax.generate.sampling import GREEDY, Sampling
from zerosearch_jax.generate.texts import TextGenerator
from zerosearch_jax.parallel.processes import gather, part
from zerosearch_jax.rollout.scheduler import Limits, Rollouts
from zerosearch_jax.rollout.trajectory import Episode, Trajectory
from zerosearch_jax.search.engine import SearchEngine
from zerosearch_jax.search.refine import Refiner, RefiningEngine
from zerosearch_jax.training import factory
from zerosearch_jax.training.job_configs import METHODS
from zerosearch_jax.training.sections import GeneratorConfig

_OPENINGS = {"direct": "answer", "cot": "", "rag": "search"}  # methods with one turn


def run_method(
    method: str,
    generator: Generator,
    engine: SearchEngine | None,
    tokenizer,
    rows: Sequence[QARow],
    *,
    limits: Limits,
    sampling: Sampling = GREEDY,
    key: jax.Array | None = None,
    refiner: Refiner | None = None,
) -> list[Trajectory]:
    """Runs one episode per row; returns them in order, numbered by row.

    With several processes, each runs its part of the rows and all get every episode.

    Args:
      method: one of `METHODS`.
      engine: may be None for the methods in `WITHOUT_ENGINE` and if `limits.max_turns` is 0.
      limits: only "search" and "search_o1" use its `max_turns`.
      key: a typed PRNG key for sampling; `jax.random.key(0)` if None. Greedy episodes ignore it.
      refiner: the model that refines documents for "search_o1", see `make_refiner`.

    Raises:
      UserError: unknown method.
      ValueError: the method needs an engine or, for "search_o1", `refiner`.
    """
    if method not in METHODS:
        raise UserError(f"method is {method!r}; choose one of {', '.join(METHODS)}")
    if method == "search_o1":
        if engine is None or refiner is None:
            raise ValueError("search_o1 needs both: an engine, and a refiner of its documents")
        engine = RefiningEngine(engine, refiner)
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


def make_refiner(
    model: factory.Model, config: GeneratorConfig, mesh: jax.sharding.Mesh, *, max_new_tokens: int
) -> TextGenerator:
    """Builds the greedy generator with which "search_o1" refines documents.

    It holds a second copy of the weights and a second cache, because the policy's generator is
    full of waiting episodes. Documents that do not fit a slot with their request and
    `max_new_tokens` are cut.
    """
    return TextGenerator(
        factory.make_generator(model, config, mesh, stop_strings=()),
        model.tokenizer,
        sampling=GREEDY,
        max_new_tokens=max_new_tokens,
        key=jax.random.key(0),
    )
