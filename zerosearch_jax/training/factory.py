"""Builds what jobs share from their configs: models, generators, search engines, optimizer."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from zerosearch_jax.data.embedded.recorded_web import world_recording
from zerosearch_jax.data.passages import load_passages
from zerosearch_jax.errors import UserError
from zerosearch_jax.generate.generator import Generator
from zerosearch_jax.generate.sampling import Sampling
from zerosearch_jax.generate.stops import build_stop_table
from zerosearch_jax.generate.texts import TextGenerator
from zerosearch_jax.models.config import ModelConfig, read_config
from zerosearch_jax.models.lora import LoRA
from zerosearch_jax.models.weights import load_params
from zerosearch_jax.parallel.device_clock import DeviceClock
from zerosearch_jax.parallel.mesh import local_meshes, make_mesh
from zerosearch_jax.rl.learner import Learner, OptimizerSpec
from zerosearch_jax.rl.optimizer import adamw, warmup_cosine
from zerosearch_jax.search.bm25 import BM25Engine
from zerosearch_jax.search.chat import ChatClient
from zerosearch_jax.search.engine import SearchEngine
from zerosearch_jax.search.noisy import NoisyEngine
from zerosearch_jax.search.http_client import JsonClient
from zerosearch_jax.search.retriever import RetrieverEngine
from zerosearch_jax.search.simulated import SimulatedEngine
from zerosearch_jax.search.web import SERVERS, RecordedWeb, WebEngine, load_recording
from zerosearch_jax.text.tokenizer import load_tokenizer, token_bytes

# Engine → the keys that its section of a config has to have, beside `engine` and `topk`.
ENGINES = {
    "bm25": ("corpus",),
    "noisy_bm25": ("corpus", "noise"),
    "simulated": ("simulator", "remote"),
    "retriever": ("remote",),
    "web": ("web", "remote"),
    "recorded_web": ("web",),
}
WEB_KEYS = {"serper": "SERPER_API_KEY", "serpapi": "SERPAPI_API_KEY"}  # environment variables
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclass(frozen=True)
class Model:
    """A model read from a Hugging Face directory: sizes, float32 parameters, tokenizer."""

    config: ModelConfig
    params: nnx.State
    tokenizer: object


def load_model(directory: str, mesh: jax.sharding.Mesh, dtype: str) -> Model:
    """Reads a model directory onto a mesh."""
    config = read_config(directory)
    params = load_params(directory, config, mesh, dtype=dtype_of(dtype))
    return Model(config, params, load_tokenizer(directory))


def dtype_of(name: str):
    """The dtype of a config's name for it."""
    if name not in DTYPES:
        raise UserError(f"dtype {name!r} is not supported; choose one of {', '.join(DTYPES)}")
    return DTYPES[name]


def make_generator(
    model: Model,
    config: ConfigDict,
    mesh: jax.sharding.Mesh,
    stop_strings: tuple[str, ...],
    clock: DeviceClock | None = None,
) -> Generator:
    """A generator of `model` with `config`'s slots and buckets, its parameters loaded."""
    generator = Generator(
        model.config,
        stop_table=stop_table(model, stop_strings),
        end_ids=[model.tokenizer.eos_token_id],
        slots=config.slots,
        max_tokens=config.max_tokens,
        mesh=mesh,
        prefill_rows=config.prefill_rows,
        prefill_buckets=tuple(config.prefill_buckets),
        decode_rows=tuple(config.decode_rows),
        chunk_tokens=config.chunk_tokens,
        window_tokens=config.window_tokens,
        dtype=dtype_of(config.dtype),
        int8_weights=config.int8_weights,
        clock=clock,
    )
    generator.load(model.params)
    return generator


def stop_table(model: Model, stop_strings: tuple[str, ...]) -> np.ndarray:
    """The stop automaton over the model's vocabulary, `[A, V]`."""
    vocabulary = token_bytes(model.tokenizer)
    vocabulary += [b""] * (model.config.vocab_size - len(vocabulary))
    return build_stop_table(vocabulary, stop_strings)


def make_engine(
    config: ConfigDict, seed: int, mesh_config: ConfigDict, clock: DeviceClock | None = None
) -> SearchEngine:
    """The engine that `config.engine` names.

    "bm25" over the passages of `config.corpus`; "noisy_bm25", which answers the share
    `config.noise` of the searches badly; "simulated", by a model here or, with
    `config.simulator.url`, by a server; "retriever", a server of documents; "web", a search
    service, and "recorded_web", what such a service once answered.

    Raises:
      UserError: unknown engine, a section of the config that lacks what the engine needs, or a
        web service without its key in the environment.
    """
    if config.engine not in ENGINES:
        raise UserError(f"engine is {config.engine!r}; choose one of {', '.join(ENGINES)}")
    lacking = [key for key in ENGINES[config.engine] if key not in config]
    if lacking:
        known = [name for name, keys in ENGINES.items() if all(key in config for key in keys)]
        raise UserError(
            f"engine={config.engine} needs {' and '.join(lacking)} beside it, which this section "
            f"of the config file lacks; add it there or choose one of {', '.join(known)}"
        )
    if config.engine == "bm25":
        return BM25Engine(load_passages(config.corpus), topk=config.topk)
    if config.engine == "simulated":
        texts = make_texts(config, seed, mesh_config, clock)
        return SimulatedEngine(texts, form=config.simulator.form, topk=config.topk)
    if config.engine == "noisy_bm25":
        engine = BM25Engine(load_passages(config.corpus), topk=config.topk)
        return NoisyEngine(engine, config.noise, seed)
    if config.engine == "retriever":
        return RetrieverEngine(
            json_client(config.remote, config.remote.url),
            topk=config.topk,
            dialect=config.remote.dialect,
            workers=config.remote.workers,
        )
    if config.engine == "recorded_web":
        return RecordedWeb(
            recording(config.web.recording),
            topk=config.topk,
            blocked_domains=tuple(config.web.blocked_domains),
        )
    return web_engine(config)


def web_engine(config: ConfigDict) -> WebEngine:
    """A search service; its key stands in the environment, never in a config or a log."""
    provider = config.web.provider
    if provider not in SERVERS:
        raise UserError(f"web.provider is {provider!r}; choose {' or '.join(SERVERS)}")
    key = os.environ.get(WEB_KEYS[provider])
    if not key:
        raise UserError(f"web.provider={provider} needs {WEB_KEYS[provider]} in the environment")
    return WebEngine(
        json_client(config.remote, SERVERS[provider]),
        provider=provider,
        api_key=key,
        topk=config.topk,
        blocked_domains=tuple(config.web.blocked_domains),
        workers=config.remote.workers,
    )


def recording(source: str) -> list[dict]:
    """A recording's responses: a .jsonl file, or "world": pages made of the embedded world."""
    if source == "world":
        return world_recording(load_passages("world"), 0)
    return load_recording(source)


def json_client(
    remote: ConfigDict, url: str, headers: Mapping[str, str] | None = None
) -> JsonClient:
    """A client of the server at `url` that waits and tries again as `remote` says."""
    return JsonClient(
        url,
        timeout_secs=remote.timeout_secs,
        attempts=remote.attempts,
        backoff_secs=remote.backoff_secs,
        headers=headers,
    )


def make_texts(
    config: ConfigDict, seed: int, mesh_config: ConfigDict, clock: DeviceClock | None
) -> TextGenerator | ChatClient:
    """What writes the simulated engine's texts: a generator here, or a client of a server."""
    simulator = config.simulator
    if simulator.url:
        return ChatClient(
            json_client(config.remote, simulator.url),
            model=simulator.model,
            temperature=simulator.temperature,
            top_p=simulator.top_p,
            max_tokens=simulator.max_new_tokens,
            workers=config.remote.workers,
            seed=seed,
        )
    _, mesh = local_meshes(make_mesh(**mesh_config), simulator.devices, simulator.tensor)
    model = load_model(simulator.model, mesh, simulator.generator.dtype)
    sampling = Sampling(simulator.temperature, simulator.top_k, simulator.top_p)
    # The text is cut before a document too many, so generation stops where that would begin.
    stops = (f"Doc {config.topk + 1}",)
    generator = make_generator(model, simulator.generator, mesh, stops, clock)
    generator.warm_up([sampling])
    return TextGenerator(
        generator,
        model.tokenizer,
        sampling=sampling,
        max_new_tokens=simulator.max_new_tokens,
        key=jax.random.fold_in(jax.random.key(seed), 1),
    )


def make_learner(
    model_config: ModelConfig,
    mesh: jax.sharding.Mesh,
    optimizer: ConfigDict,
    learner: ConfigDict,
    *,
    critic: ConfigDict | None = None,
    lora: ConfigDict | None = None,
    updates_per_step: int = 1,
) -> Learner:
    """AdamW with warm-up behind a learner; adapters when `lora.rank` is above 0.

    Args:
      optimizer: AdamW's settings; a critic has them, too, but for its own rate and warm-up.
      updates_per_step: of a training step, which the schedules' lengths are given in.
    """
    trained = {"policy": optimizer_spec(optimizer, updates_per_step)}
    if critic is not None:
        changed = ConfigDict(optimizer)
        changed.update(learning_rate=critic.learning_rate, warmup_steps=critic.warmup_steps)
        trained["critic"] = optimizer_spec(changed, updates_per_step)
    adapters = None
    if lora is not None and lora.rank:
        adapters = LoRA(rank=lora.rank, alpha=lora.alpha, targets=tuple(lora.targets))
    return Learner(
        model_config,
        mesh=mesh,
        **trained,
        critic_trunk=critic.trunk if critic is not None else "own",
        lora=adapters,
        compute_dtype=dtype_of(learner.compute_dtype),
        remat=learner.remat,
        logprob_chunk=learner.logprob_chunk,
    )


def optimizer_spec(config: ConfigDict, updates_per_step: int) -> OptimizerSpec:
    """AdamW and its schedule from an optimizer's settings."""
    schedule = warmup_cosine(
        config.learning_rate,
        warmup_steps=config.warmup_steps * updates_per_step,
        total_steps=config.schedule_steps * updates_per_step,
        final_fraction=config.final_fraction,
    )
    optimizer = adamw(
        schedule,
        beta1=config.beta1,
        beta2=config.beta2,
        weight_decay=config.weight_decay,
        clip_norm=config.clip_norm,
        moment_dtype=dtype_of(config.moment_dtype),
    )
    return OptimizerSpec(optimizer, schedule)
