"""Rollout speed against a lockstep loop, and with single features switched off.

Peers use the lockstep loop. Every turn prefills every context again, finished episodes included.
Every turn waits for its slowest row and for all documents. Finished rows stay in the batch. All
variants use the same models, questions and random draws, so they sample the same episodes and
differ only in time.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from random import Random

import jax

from zerosearch_jax.benchmarks.config import RolloutBenchConfig, RolloutGeneratorConfig
from zerosearch_jax.benchmarks.rows import Row
from zerosearch_jax.data.embedded.world import corpus, load_entities
from zerosearch_jax.data.qa import QARow, load_qa
from zerosearch_jax.generate.generator import Generator
from zerosearch_jax.generate.sampling import Sampling
from zerosearch_jax.generate.texts import TextGenerator
from zerosearch_jax.parallel.mesh import make_mesh
from zerosearch_jax.rollout.scheduler import STOP_STRINGS, Limits, Rollouts
from zerosearch_jax.rollout.trajectory import Episode, Trajectory
from zerosearch_jax.search.bm25 import BM25Engine
from zerosearch_jax.search.engine import SearchEngine, SearchRequest, SearchResult
from zerosearch_jax.search.simulated import SimulatedEngine
from zerosearch_jax.training import factory
from zerosearch_jax.training.step_rollouts import limits_of


@dataclass(frozen=True)
class Features:
    """Features of the rollout engine that the lockstep loop lacks.

    Attributes:
      keep_cache: a turn prefills only the inserted tokens.
      share_prompts: the members of a group share one prompt prefill.
      refill: a free slot takes the next episode at once.
      return_early: finished rows do not wait for the slowest row.
      compact: a few running rows are computed as a small batch.
      overlap: the policy decodes while a remote engine works, in mixes that have one.
    """

    keep_cache: bool = True
    share_prompts: bool = True
    refill: bool = True
    return_early: bool = True
    compact: bool = True
    overlap: bool = True


LOCKSTEP = Features(**dict.fromkeys(Features.__annotations__, False))


class PeerGenerator(Generator):
    """A generator whose `features` may switch off the cache, shared prompts and early returns."""

    features = Features()

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.contexts: dict[int, list[int]] = {}

    def start(self, slots, prompts):
        self.contexts |= {s: list(p) for s, p in zip(slots, prompts, strict=True)}
        self._fill(slots)

    def extend(self, slots, tokens):
        if self.features.keep_cache:
            return super().extend(slots, tokens)
        for slot, new in zip(slots, tokens, strict=True):
            self.contexts[slot] += new
        # In lockstep, finished rows of the batch are prefilled again with the others.
        all_rows = self.features == LOCKSTEP
        self._fill([s for s in self.contexts if all_rows or s in slots])

    def decode_chunk(self, *, key, sampling, min_finished_fraction=0.25):
        options = dict(key=key, sampling=sampling)
        stopped = super().decode_chunk(**options, min_finished_fraction=min_finished_fraction)
        while self._decoding and not self.features.return_early:
            stopped |= super().decode_chunk(**options, min_finished_fraction=1.0)
        for slot, generation in stopped.items():
            self.contexts[slot] += generation.tokens
        return stopped

    def forget(self) -> None:
        """Drops all state of an earlier run and resets the token counts."""
        self._prompts.clear()
        self.contexts.clear()
        self.prefilled_tokens = self.decoded_tokens = 0

    def _fill(self, slots: Sequence[int]) -> None:
        rows = [self.contexts[slot] for slot in slots]
        if self.features.share_prompts:
            return super().start(slots, rows)
        self._length[list(slots)] = 0
        self._append({slot: self.contexts[slot][:-1] for slot in slots})
        self._pending[list(slots)] = [row[-1] for row in rows]


class Waves(Rollouts):
    """Rollouts whose slots take new episodes only when all episodes have ended."""

    def run(self, episodes: Sequence[Episode], key: jax.Array) -> list[Trajectory]:
        trajectories = []
        for start in range(0, len(episodes), self.generator.slots):
            trajectories += super().run(episodes[start : start + self.generator.slots], key)
        return trajectories


class WaveTexts(TextGenerator):
    """Text generator whose slots take new prompts only when all texts have ended."""

    def __call__(self, prompts: Sequence[str], keys: Sequence[tuple[int, int]]) -> list[str]:
        texts = []
        for start in range(0, len(prompts), self.generator.slots):
            stop = start + self.generator.slots
            texts += super().__call__(prompts[start:stop], keys[start:stop])
        return texts


class LongDocuments:
    """Engine that answers with enough real passages for an observation of a given length.

    Args:
      words: least and most words of a result; the request's key decides.
    """

    name = "long documents"

    def __init__(self, words: tuple[int, int]):
        self.words = words
        self.passages = [passage.text for passage in corpus(load_entities())]

    def search(self, requests: Sequence[SearchRequest]) -> list[SearchResult]:
        """Returns passages for each request; the last passage may exceed the drawn length."""
        results = []
        for request in requests:
            rng = Random(repr(request.key))
            wanted = rng.randint(*self.words)
            documents: list[str] = []
            while sum(len(d.split()) for d in documents) < wanted:
                documents.append(rng.choice(self.passages))
            results.append(SearchResult(request.key, tuple(documents)))
        return results


class SlowService:
    """Engine that delays each batch by the latency of its slowest request.

    Args:
      seconds: least and most latency of a request; the request's key decides.
    """

    def __init__(self, engine: SearchEngine, seconds: tuple[float, float]):
        self.name = f"slow {engine.name}"
        self._engine = engine
        self._seconds = seconds

    def search(self, requests: Sequence[SearchRequest]) -> list[SearchResult]:
        """Returns the wrapped engine's results after the delay."""
        results = self._engine.search(requests)
        time.sleep(max(Random(repr(r.key)).uniform(*self._seconds) for r in requests))
        return results


@dataclass(frozen=True)
class Mix:
    """A workload: episodes, their limits and their search engine.

    Attributes:
      max_tokens: tokens of a slot.
      engine: makes the engine of a variant.
      concurrent: search batches in flight while the policy decodes; 0 if the engine shares the
        policy's device.
    """

    episodes: list[Episode]
    limits: Limits
    max_tokens: int
    engine: Callable[[Features], SearchEngine]
    concurrent: int = 0


def embedded_mix(config: RolloutBenchConfig) -> Mix:
    """The embedded example: questions on the embedded world and the tiny simulator."""
    limits = limits_of(config.limits)

    def engine(features: Features) -> SearchEngine:
        simulator = config.simulator
        generator, model = generator_of(simulator, simulator.max_tokens, features, ("Doc 3",))
        sampling = Sampling(simulator.temperature)
        generator.warm_up([sampling])
        texts = (TextGenerator if features.refill else WaveTexts)(
            generator,
            model.tokenizer,
            sampling=sampling,
            max_new_tokens=simulator.max_new_tokens,
            key=jax.random.key(1),
        )
        return SimulatedEngine(texts, form="finetuned", topk=2)

    return Mix(episodes_of(load_qa("world", "train", config.questions), config), limits,
               config.policy.max_tokens, engine)  # fmt: skip


def long_mix(config: RolloutBenchConfig) -> Mix:
    """Long contexts: passages of the embedded world lengthen prompts and observations."""
    long = config.long
    rng = Random(0)
    passages = [passage.text for passage in corpus(load_entities())]
    rows = []
    for row in load_qa("world", "train", long.questions):
        words = " ".join(rng.sample(passages, 8)).split()[: rng.randint(*long.prompt_words)]
        rows.append(replace(row, question=f"{' '.join(words)} {row.question}"))
    return Mix(episodes_of(rows, config), limits_of(long.limits), long.max_tokens,
               lambda features: LongDocuments(tuple(long.document_words)))  # fmt: skip


def service_mix(config: RolloutBenchConfig) -> Mix:
    """The embedded example's questions, with searches answered by a slow service."""
    service = config.service
    engine = SlowService(BM25Engine(corpus(load_entities()), topk=2), tuple(service.seconds))
    return Mix(episodes_of(load_qa("world", "train", config.questions), config),
               limits_of(config.limits), config.policy.max_tokens, lambda features: engine,
               service.concurrent)  # fmt: skip


def episodes_of(rows: Sequence[QARow], config: RolloutBenchConfig) -> list[Episode]:
    """Returns groups of `config.group_size` episodes, numbered as in the rl job."""
    size = config.group_size
    return [
        Episode(i * size + member, row.question, row.golden_answers)
        for i, row in enumerate(rows)
        for member in range(size)
    ]


def generator_of(
    config: RolloutGeneratorConfig, max_tokens: int, features: Features, stops: tuple[str, ...]
):
    """Returns a generator with `features`, and its model.

    The lockstep loop has `config.lockstep_slots` slots, all other variants `config.slots`.
    """
    mesh = make_mesh()
    model = factory.load_model(config.model, mesh, "float32")
    sizes = replace(model.config, max_positions=max(max_tokens, model.config.max_positions))
    generator = PeerGenerator(
        sizes,
        stop_table=factory.stop_table(model, stops),
        end_ids=model.end_ids,
        slots=config.lockstep_slots if features == LOCKSTEP else config.slots,
        max_tokens=max_tokens,
        mesh=mesh,
        prefill_rows=config.prefill_rows,
        prefill_buckets=tuple(config.prefill_buckets),
        decode_rows=tuple(config.decode_rows) if features.compact else (),
        chunk_tokens=config.chunk_tokens,
        window_tokens=config.window_tokens,
    )
    generator.features = features
    generator.load(model.params)
    return generator, model


VARIANTS = {"lockstep": LOCKSTEP} | {
    f"without {name}": replace(Features(), **{name: False}) for name in Features.__annotations__
}
MIXES = {"embedded": embedded_mix, "long": long_mix, "service": service_mix}


def run(config: RolloutBenchConfig) -> list[Row]:
    """Compares our rollouts with each variant of `config.variants` on each of `config.mixes`."""
    rows = []
    for name in config.mixes:
        mix = MIXES[name](config)
        ours = TimedRollouts(mix, config, Features())
        others = {
            label: TimedRollouts(mix, config, VARIANTS[label])
            for label in config.variants
            if mix.concurrent or label != "without overlap"
        }
        for _ in range(config.repeats):  # Variants alternate, so that a slow minute hits all.
            for label, variant in {"ours": ours, **others}.items():
                variant.measure()
                print(f"{name}, {label}: {variant.rates[-1]:.2f} episodes/s", flush=True)
        print(f"{name}, ours: {ours.tokens}")
        for label, variant in others.items():
            print(f"{name}, {label}: {variant.tokens}")
            rows.append(Row(f"rollout {name} / {label}", ours.rates, variant.rates, "episodes/s"))
    return rows


class TimedRollouts:
    """Compiled rollouts of one variant, with the rate of each run.

    Attributes:
      rates: episodes per second of each run.
      tokens: counts of episodes, searches and tokens of the last run, for printing.
    """

    def __init__(self, mix: Mix, config: RolloutBenchConfig, features: Features):
        self.mix = mix
        self.generator, model = generator_of(config.policy, mix.max_tokens, features, STOP_STRINGS)
        self.sampling = Sampling(1.0)
        self.generator.warm_up([self.sampling])
        self.rollouts = (Rollouts if features.refill else Waves)(
            self.generator,
            mix.engine(features),
            model.tokenizer,
            limits=mix.limits,
            sampling=self.sampling,
            concurrent_searches=mix.concurrent if features.overlap else 0,
        )
        self.rates: list[float] = []
        self.rollouts.run(mix.episodes[: 2 * config.group_size], jax.random.key(1))

    def measure(self) -> None:
        """Runs all episodes once and records the rate."""
        self.generator.forget()
        began = time.monotonic()
        trajectories = self.rollouts.run(self.mix.episodes, jax.random.key(0))
        self.rates.append(len(trajectories) / (time.monotonic() - began))
        searches = sum(len(t.searches) for t in trajectories)
        self.tokens = (
            f"{len(trajectories)} episodes, {searches} searches; policy: "
            f"{self.generator.prefilled_tokens} tokens prefilled, "
            f"{self.generator.decoded_tokens} decoded"
        )
