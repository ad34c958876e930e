"""Rollouts against the loop that peers use, and with one feature after the other switched off.

*Lockstep* is that loop: every turn prefills every context anew, also those of finished episodes;
every turn waits for its slowest row and for all documents; finished rows ride along. Models,
questions and random draws are the same, so every variant plays the same episodes and only the
time differs.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from random import Random

import jax
from ml_collections import ConfigDict

from zerosearch_jax.benchmarks.rows import Row
from zerosearch_jax.data.embedded.world import corpus, load_entities
from zerosearch_jax.data.qa import QARow, load_qa
from zerosearch_jax.errors import UserError
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


@dataclass(frozen=True)
class Features:
    """What the rollout engine does and the lockstep loop does not."""

    keep_cache: bool = True  # a turn prefills only what was inserted
    share_prompts: bool = True  # a group's members share one prompt prefill
    refill: bool = True  # a free slot takes the next episode at once
    return_early: bool = True  # who has stopped does not wait for the slowest row
    compact: bool = True  # few running rows are computed as few rows
    overlap: bool = (
        True  # the policy decodes while an engine elsewhere works, where the mix has one
    )


LOCKSTEP = Features(**dict.fromkeys(Features.__annotations__, False))


class PeerGenerator(Generator):
    """A generator that can leave out sharing prompts and keeping the cache."""

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
        # Finished rows of the batch are fed again with the others.
        ride_along = self.features == LOCKSTEP
        self._fill([s for s in self.contexts if ride_along or s in slots])

    def decode_chunk(self, *, key, sampling, min_finished_fraction=0.25):
        options = dict(key=key, sampling=sampling)
        stopped = super().decode_chunk(**options, min_finished_fraction=min_finished_fraction)
        while self._decoding and not self.features.return_early:
            stopped |= super().decode_chunk(**options, min_finished_fraction=1.0)
        for slot, generation in stopped.items():
            self.contexts[slot] += generation.tokens
        return stopped

    def forget(self) -> None:
        """Leaves nothing of an earlier run that could be shared or fed again."""
        self._prompts.clear()
        self.contexts.clear()
        self.prefilled_tokens = self.decoded_tokens = 0

    def _fill(self, slots: Sequence[int]) -> None:
        rows = [self.contexts[slot] for slot in slots]
        if self.features.share_prompts:
            return super().start(slots, rows)
        self._length[list(slots)] = 0
        self._append(slots, [row[:-1] for row in rows])
        self._pending[list(slots)] = [row[-1] for row in rows]


class Waves(Rollouts):
    """Rollouts whose slots take new episodes only when all have ended."""

    def run(self, episodes: Sequence[Episode], key: jax.Array) -> list[Trajectory]:
        played = []
        for start in range(0, len(episodes), self.generator.slots):
            played += super().run(episodes[start : start + self.generator.slots], key)
        return played


class WaveTexts(TextGenerator):
    """A text generator whose slots take new prompts only when all have finished."""

    def __call__(self, prompts: Sequence[str], keys: Sequence[tuple[int, int]]) -> list[str]:
        texts = []
        for start in range(0, len(prompts), self.generator.slots):
            stop = start + self.generator.slots
            texts += super().__call__(prompts[start:stop], keys[start:stop])
        return texts


class LongDocuments:
    """Real passages, as many as make an observation of the wanted length, keyed by the request."""

    name = "long documents"

    def __init__(self, words: tuple[int, int]):
        self.words = words
        self.passages = [passage.text for passage in corpus(load_entities())]

    def search(self, requests: Sequence[SearchRequest]) -> list[SearchResult]:
        """Between `words` words of passages for each request."""
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
    """An engine that answers a batch when the slowest of its requests, drawn by its key, has come.

    Args:
      seconds: the least and the most that a request takes.
    """

    def __init__(self, engine: SearchEngine, seconds: tuple[float, float]):
        self.name = f"slow {engine.name}"
        self._engine = engine
        self._seconds = seconds

    def search(self, requests: Sequence[SearchRequest]) -> list[SearchResult]:
        """The engine's results, late."""
        results = self._engine.search(requests)
        time.sleep(max(Random(repr(r.key)).uniform(*self._seconds) for r in requests))
        return results


@dataclass(frozen=True)
class Mix:
    """Episodes to play, and what with.

    Attributes:
      concurrent: batches of searches under way while the policy decodes; 0: the engine needs the
        policy's device.
    """

    episodes: list[Episode]
    limits: Limits
    max_tokens: int
    engine: Callable[[Features], SearchEngine]
    concurrent: int = 0


def embedded_mix(config: ConfigDict) -> Mix:
    """The embedded example: world questions, the tiny simulator."""
    limits = Limits(**config.limits)

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


def long_mix(config: ConfigDict) -> Mix:
    """Long contexts: prompts and observations lengthened with passages of the world."""
    long = config.long
    rng = Random(0)
    passages = [passage.text for passage in corpus(load_entities())]
    rows = []
    for row in load_qa("world", "train", long.questions):
        words = " ".join(rng.sample(passages, 8)).split()[: rng.randint(*long.prompt_words)]
        rows.append(replace(row, question=f"{' '.join(words)} {row.question}"))
    return Mix(episodes_of(rows, config), Limits(**long.limits), long.max_tokens,
               lambda features: LongDocuments(tuple(long.document_words)))  # fmt: skip


def service_mix(config: ConfigDict) -> Mix:
    """The embedded example's questions; the searches go to a service that takes its time."""
    service = config.service
    engine = SlowService(BM25Engine(corpus(load_entities()), topk=2), tuple(service.seconds))
    return Mix(episodes_of(load_qa("world", "train", config.questions), config),
               Limits(**config.limits), config.policy.max_tokens, lambda features: engine,
               service.concurrent)  # fmt: skip


def episodes_of(rows: Sequence[QARow], config: ConfigDict) -> list[Episode]:
    """Groups of episodes, as the rl job makes them."""
    size = config.group_size
    return [
        Episode(i * size + member, row.question, row.golden_answers)
        for i, row in enumerate(rows)
        for member in range(size)
    ]


def generator_of(config: ConfigDict, max_tokens: int, features: Features, stops: tuple[str, ...]):
    """A generator with the features' batch: all rows at once where slots are not refilled."""
    mesh = make_mesh()
    model = factory.load_model(config.model, mesh, "float32")
    sizes = replace(model.config, max_positions=max(max_tokens, model.config.max_positions))
    generator = PeerGenerator(
        sizes,
        stop_table=factory.stop_table(model, stops),
        end_ids=[model.tokenizer.eos_token_id],
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


def run(config: ConfigDict) -> list[Row]:
    """Each mix and variant that the config names: ours against it, in turns."""
    for key, known in (("mixes", MIXES), ("variants", VARIANTS)):
        for name in config[key]:
            if name not in known:
                raise UserError(f"config.{key} names {name!r}; choose of {', '.join(known)}")
    rows = []
    for name in config.mixes:
        mix = MIXES[name](config)
        ours = Player(mix, config, Features())
        others = {
            label: Player(mix, config, VARIANTS[label])
            for label in config.variants
            if mix.concurrent or label != "without overlap"
        }
        for _ in range(config.repeats):  # in turns, so that a slow minute strikes all alike
            for label, player in {"ours": ours, **others}.items():
                player.play()
                print(f"{name}, {label}: {player.rates[-1]:.2f} episodes/s", flush=True)
        print(f"{name}, ours: {ours.tokens}")
        for label, player in others.items():
            print(f"{name}, {label}: {player.tokens}")
            rows.append(Row(f"rollout {name} / {label}", ours.rates, player.rates, "episodes/s"))
    return rows


class Player:
    """One variant: its programs compiled, its runs timed."""

    def __init__(self, mix: Mix, config: ConfigDict, features: Features):
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
        self.rates: list[float] = []  # episodes per second
        self.rollouts.run(mix.episodes[: 2 * config.group_size], jax.random.key(1))

    def play(self) -> None:
        """Plays all episodes once."""
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
