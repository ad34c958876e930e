"""Builds models, generators, search engines and learners from config sections."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from zerosearch_jax.data.embedded.recorded_web import world_recording
from zerosearch_jax.data.passages import load_passages
from zerosearch_jax.data.recordings import load_recording
from zerosearch_jax.errors import UserError
from zerosearch_jax.generate.generator import Generator
from zerosearch_jax.generate.sampling import Sampling
from zerosearch_jax.generate.stops import build_stop_table, check_spellable
from zerosearch_jax.generate.texts import TextGenerator
from zerosearch_jax.models.config import ModelConfig
from zerosearch_jax.models.directory import ModelFiles, read_model_files
from zerosearch_jax.models.lora import LoRA
from zerosearch_jax.models.weights import load_params
from zerosearch_jax.parallel.device_clock import DeviceClock
from zerosearch_jax.parallel.mesh import local_meshes, make_mesh
from zerosearch_jax.rl.config import CriticConfig, OptimizerConfig
from zerosearch_jax.rl.learner import Learner
from zerosearch_jax.rl.optimizer import OptimizerSpec, adamw, warmup_cosine
from zerosearch_jax.search.bm25 import BM25Engine
from zerosearch_jax.search.chat import ChatClient
from zerosearch_jax.search.engine import SearchEngine
from zerosearch_jax.search.http_client import JsonClient
from zerosearch_jax.search.noisy import NoisyEngine
from zerosearch_jax.search.retriever import RetrieverEngine
from zerosearch_jax.search.server import authorization, read_key
from zerosearch_jax.search.simulated import SimulatedEngine
from zerosearch_jax.search.web import KEY_VARIABLES, SERVERS, RecordedWeb, WebEngine
from zerosearch_jax.text.tokenizer import encode_prompt, token_bytes
from zerosearch_jax.training.config import LearnerConfig, LoraConfig
from zerosearch_jax.training.job_configs import LabelingServerConfig
from zerosearch_jax.training.sections import GeneratorConfig, MeshConfig, RemoteConfig, SearchConfig

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclass(frozen=True)
class Model:
    """A model read from a Hugging Face directory.

    Attributes:
      generation: see `models.generation_config`; exports keep it.
    """

    config: ModelConfig
    params: nnx.State
    tokenizer: object
    generation: Mapping[str, Any]

    @property
    def end_ids(self) -> list[int]:
        """All token ids that end a text."""
        return self.generation["eos_token_id"]


def load_model(directory: str, mesh: jax.sharding.Mesh, dtype: str) -> Model:
    """Reads a model directory onto a mesh, with parameters of the dtype named `dtype`."""
    files = read_model_files(directory)
    params = load_params(directory, files.config, mesh, dtype=dtype_of(dtype))
    return Model(files.config, params, files.tokenizer, files.generation)


def check_model(directory: str, stop_strings: tuple[str, ...], system: str | None = None) -> None:
    """Checks that a directory's files fit together, spell the stop strings and render prompts.

    It reads no weights. `training.inputs` has already compared slots and positions.

    Args:
      system: the system turn of the model's prompts, see `encode_prompt`.

    Raises:
      UserError: they do not.
    """
    files = read_model_files(directory)
    stop_table(files, stop_strings)
    encode_prompt(files.tokenizer, "", system)


def check_simulator_model(config: SearchConfig) -> None:
    """Does `check_model` for the model of a search engine that runs one here."""
    simulator = config.simulator
    if config.engine == "simulated" and not simulator.url:
        check_model(simulator.model, simulator_stops(config.topk), system="")


def dtype_of(name: str) -> jax.typing.DTypeLike:
    """Returns the dtype that a config calls `name`. Raises UserError for an unknown name."""
    if name not in DTYPES:
        raise UserError(f"dtype {name!r} is not supported; choose one of {', '.join(DTYPES)}")
    return DTYPES[name]


def make_generator(
    model: Model,
    config: GeneratorConfig,
    mesh: jax.sharding.Mesh,
    stop_strings: tuple[str, ...],
    clock: DeviceClock | None = None,
) -> Generator:
    """Builds a generator with the parameters of `model` loaded."""
    generator = Generator(
        model.config,
        stop_table=stop_table(model, stop_strings),
        end_ids=model.end_ids,
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


def stop_table(model: Model | ModelFiles, stop_strings: tuple[str, ...]) -> np.ndarray:
    """Returns the stop automaton over the model's vocabulary, `[A, V]`.

    Raises:
      UserError: the vocabulary cannot spell one of the stop strings.
    """
    vocabulary = token_bytes(model.tokenizer)
    check_spellable(vocabulary, stop_strings, f"{model.tokenizer.name_or_path}: the tokenizer")
    vocabulary += [b""] * (model.config.vocab_size - len(vocabulary))
    return build_stop_table(vocabulary, stop_strings)


def make_engine(
    config: SearchConfig, seed: int, mesh: MeshConfig, clock: DeviceClock | None = None
) -> SearchEngine:
    """Builds the search engine `config.engine`.

    | engine         | documents                                                                 |
    |----------------|---------------------------------------------------------------------------|
    | `bm25`         | passages of `config.corpus`                                               |
    | `noisy_bm25`   | as `bm25`, with the fraction `config.noise` of the searches answered badly |
    | `simulated`    | written by a model, here or on the server `config.simulator.url`          |
    | `retriever`    | from a retrieval server                                                   |
    | `web`          | from a web search service                                                 |
    | `recorded_web` | from recorded responses of a web search service                           |

    Raises:
      UserError: the corpus or recording cannot be read, or the environment has no API key.
    """
    if config.engine in ("bm25", "noisy_bm25"):
        engine = BM25Engine(load_passages(config.corpus), topk=config.topk)
        return engine if config.engine == "bm25" else NoisyEngine(engine, config.noise, seed)
    if config.engine == "simulated":
        texts = make_texts(config, seed, mesh, clock)
        return SimulatedEngine(texts, form=config.simulator.form, topk=config.topk)
    if config.engine == "retriever":
        return RetrieverEngine(
            json_client(config.remote, config.remote.url, config.remote.key_variable),
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


def web_engine(config: SearchConfig) -> WebEngine:
    """Builds a web search engine."""
    provider = config.web.provider
    return WebEngine(
        json_client(config.remote, SERVERS[provider], ""),
        provider=provider,
        api_key=read_key(KEY_VARIABLES[provider]),
        topk=config.topk,
        blocked_domains=tuple(config.web.blocked_domains),
        workers=config.remote.workers,
    )


def recording(source: str) -> list[dict]:
    """Returns recorded responses: of a .jsonl file, or made from the embedded world ("world")."""
    if source == "world":
        return world_recording(load_passages("world"), 0)
    return load_recording(source)


def json_client(
    remote: RemoteConfig | LabelingServerConfig, url: str, key_variable: str
) -> JsonClient:
    """Builds a client of the server at `url` with the deadlines and retries of `remote`.

    Args:
      key_variable: environment variable with the server's API key; "" for none.
    """
    return JsonClient(
        url,
        timeout_secs=remote.timeout_secs,
        attempts=remote.attempts,
        backoff_secs=remote.backoff_secs,
        headers=authorization(key_variable),
    )


def make_texts(
    config: SearchConfig, seed: int, mesh: MeshConfig, clock: DeviceClock | None
) -> TextGenerator | ChatClient:
    """Builds the simulator: a generator here, or a client of the server `simulator.url`."""
    simulator = config.simulator
    if simulator.url:
        return ChatClient(
            json_client(config.remote, simulator.url, config.remote.key_variable),
            model=simulator.model,
            temperature=simulator.temperature,
            top_p=simulator.top_p,
            max_tokens=simulator.max_new_tokens,
            workers=config.remote.workers,
            seed=seed,
        )
    whole = make_mesh(mesh.data, mesh.fsdp, mesh.tensor)
    _, own = local_meshes(whole, simulator.devices, simulator.tensor)
    model = load_model(simulator.model, own, simulator.generator.dtype)
    sampling = Sampling(simulator.temperature, simulator.top_k, simulator.top_p)
    stops = simulator_stops(config.topk)
    generator = make_generator(model, simulator.generator, own, stops, clock)
    generator.warm_up([sampling])
    return TextGenerator(
        generator,
        model.tokenizer,
        sampling=sampling,
        max_new_tokens=simulator.max_new_tokens,
        key=jax.random.fold_in(jax.random.key(seed), 1),
    )


def simulator_stops(topk: int) -> tuple[str, ...]:
    """Returns the stop strings of a simulator, whose engine keeps the first `topk` documents."""
    return (f"Doc {topk + 1}",)


def make_learner(
    model_config: ModelConfig,
    mesh: jax.sharding.Mesh,
    optimizer: OptimizerConfig,
    learner: LearnerConfig,
    *,
    steps: int,
    critic: CriticConfig | None = None,
    lora: LoraConfig | None = None,
    updates_per_step: int = 1,
    moving_reference: bool = False,
) -> Learner:
    """Builds a learner with AdamW and warm-up, and with adapters if `lora.rank` is above 0.

    Args:
      optimizer: AdamW hyperparameters, shared with the critic except for its learning rate and
        warm-up.
      steps: training steps of the run, the length of a schedule with `schedule_steps` 0.
      updates_per_step: optimizer updates per training step. Schedules are given in training steps.
      moving_reference: keep the reference policy in the training state.
    """
    specs = {"policy": optimizer_spec(optimizer, steps, updates_per_step)}
    if critic is not None:
        own = replace(
            optimizer, learning_rate=critic.learning_rate, warmup_steps=critic.warmup_steps
        )
        specs["critic"] = optimizer_spec(own, steps, updates_per_step)
    adapters = None
    if lora is not None and lora.rank:
        adapters = LoRA(rank=lora.rank, alpha=lora.alpha, targets=tuple(lora.targets))
    return Learner(
        model_config,
        mesh=mesh,
        **specs,
        critic_trunk=critic.trunk if critic is not None else "own",
        lora=adapters,
        moving_reference=moving_reference,
        compute_dtype=dtype_of(learner.compute_dtype),
        remat=learner.remat,
        logprob_chunk=learner.logprob_chunk,
    )


def optimizer_spec(config: OptimizerConfig, steps: int, updates_per_step: int) -> OptimizerSpec:
    """Builds AdamW and its learning-rate schedule, which counts updates.

    Args:
      steps: training steps of the schedule if `config.schedule_steps` is 0.
    """
    schedule = warmup_cosine(
        config.learning_rate,
        warmup_steps=config.warmup_steps * updates_per_step,
        total_steps=(config.schedule_steps or steps) * updates_per_step,
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
