"""Checks that the models, files, keys and servers that a config names exist.

The module imports neither jax nor transformers, so `main` refuses a run within seconds.
"""

import os
from pathlib import Path

from zerosearch_jax.data.embedded import world
from zerosearch_jax.data.embedded.synthetic import PREFIX, synthetic_numbers
from zerosearch_jax.data.qa import SUFFIXES
from zerosearch_jax.errors import UserError
from zerosearch_jax.models.config import from_hf, read_config
from zerosearch_jax.search import web
from zerosearch_jax.search.http_client import JsonClient
from zerosearch_jax.search.server import authorization
from zerosearch_jax.training import validate
from zerosearch_jax.training.config import RLConfig
from zerosearch_jax.training.job_configs import (
    WITHOUT_ENGINE,
    CollectConfig,
    EvaluateConfig,
    LabelingConfig,
    SFTConfig,
    SimulatorReportConfig,
    is_path,
)
from zerosearch_jax.training.sections import GeneratorConfig, SearchConfig

PROBE_SECS = 3.0
"""Longest wait for the reply of a server that a config names."""


def check_job(config: object) -> None:
    """Checks the rules and the inputs of a job's config, and prints a warning per useless setting.

    Every job calls it first, before it creates, loads or compiles anything.

    Raises:
      UserError: the config breaks a rule, or an input is missing.
    """
    validate.check(config)
    check_inputs(config)
    for warning in validate.warnings(config):
        print(f"warning: {warning}", flush=True)


def check_inputs(config: object) -> None:
    """Raises UserError for the first model, file, key or server of a job's config that is missing.

    The contents of files are checked where they are loaded.
    """
    if isinstance(config, RLConfig):
        _check_rl(config)
    elif isinstance(config, SFTConfig):
        _check_sft(config)
    elif isinstance(config, CollectConfig):
        check_model("policy.model", config.policy.model, config.policy.generator)
        check_questions("data.source", config.data.source, "data.split", config.data.split)
        check_search("search", config.search)
        _check_labeling(config.labeling)
    elif isinstance(config, EvaluateConfig):
        _check_evaluate(config)
    elif isinstance(config, SimulatorReportConfig):
        check_file("pairs", config.pairs)
        check_model("reader.model", config.reader.model, config.reader.generator)
        for name, search in config.simulators.items():
            check_search(f"simulators.{name}", search)


def _check_rl(config: RLConfig) -> None:
    data, simulator = config.data, config.search.simulator
    check_model("policy.model", config.policy.model, config.policy.generator)
    check_questions("data.source", data.source, "data.train_split", data.train_split)
    for key in ("eval_split", "test_split"):
        check_questions("data.eval_source", data.eval_source, f"data.{key}", getattr(data, key))
    if config.rollout.max_turns:
        check_search("search", config.search)
        check_search("eval.search", config.eval.search)
        if config.search.engine == "simulated" and simulator.gate.report:
            check_file("search.simulator.gate.report", simulator.gate.report)


def _check_sft(config: SFTConfig) -> None:
    data = config.data
    if config.init:
        check_model("init", config.init)
    else:
        try:
            from_hf(config.model | {"vocab_size": config.vocab_size})
        except UserError as error:
            raise UserError(f"config.model: {error}") from error
    if is_path(data.examples):
        check_file("data.examples", data.examples)
    elif data.examples == "answers":
        check_questions("data.source", data.source, "data.split", data.split)
    if data.validation:
        check_file("data.validation", data.validation)


def _check_evaluate(config: EvaluateConfig) -> None:
    check_model("policy.model", config.policy.model, config.policy.generator)
    for name in config.data.sets:
        if Path(name).suffix:
            check_file("data.sets", name)
        else:
            source, _, split = name.rpartition("/")
            check_questions("data.sets", source, "data.sets", split)
    if set(config.methods) - set(WITHOUT_ENGINE):
        for name, search in config.engines.items():
            check_search(f"engines.{name}", search)


def _check_labeling(config: LabelingConfig) -> None:
    if config.kind == "server":
        check_key("labeling.server.key_variable", config.server.key_variable)
        check_server("labeling.url", config.url)
    elif config.kind != "none":
        check_model("labeling.model", config.model, config.generator)


def check_search(key: str, search: SearchConfig) -> None:
    """Checks the corpus, recording, API key, server or model that a search engine needs.

    Args:
      key: the key of the section.

    Raises:
      UserError: something is missing, or the server does not answer.
    """
    if search.engine in ("bm25", "noisy_bm25"):
        if search.corpus.startswith(PREFIX):
            check_synthetic(f"{key}.corpus", search.corpus)
        elif search.corpus != "world":
            check_file(f"{key}.corpus", search.corpus)
    elif search.engine == "recorded_web":
        if search.web.recording != "world":
            check_file(f"{key}.web.recording", search.web.recording)
    elif search.engine == "web":
        provider = search.web.provider
        check_key(f"{key}.web.provider={provider}", web.KEY_VARIABLES[provider])
        check_server(f"{key}.web.provider={search.web.provider}", web.SERVERS[search.web.provider])
    elif search.engine == "retriever":
        check_key(f"{key}.remote.key_variable", search.remote.key_variable)
        check_server(f"{key}.remote.url", search.remote.url)
    elif search.engine == "simulated":
        simulator = search.simulator
        if simulator.url:
            check_key(f"{key}.remote.key_variable", search.remote.key_variable)
            check_server(f"{key}.simulator.url", simulator.url)
        else:
            check_model(f"{key}.simulator.model", simulator.model, simulator.generator)


def check_model(key: str, directory: str, generator: GeneratorConfig | None = None) -> None:
    """Checks a model directory by its config.json and the names of its other files.

    Raises:
      UserError: a file is missing, the architecture is not supported, or `generator.max_tokens` is
        beyond the model's positions.
    """
    try:
        model = read_config(directory)
    except UserError as error:
        raise UserError(f"config.{key}: {error}") from error
    for files, what in (("*.safetensors", "weights"), ("*token*", "tokenizer")):
        if not any(Path(directory).glob(files)):
            raise UserError(
                f"config.{key}={directory} holds no {what} ({files}); fetch the model again"
            )
    if generator and generator.max_tokens > model.max_positions:
        raise UserError(
            f"config.{key}={directory} has {model.max_positions} positions, but its generator has "
            f"max_tokens={generator.max_tokens}; lower max_tokens"
        )


def check_questions(source_key: str, source: str, split_key: str, split: str) -> None:
    """Checks that a source of questions exists and that a source with splits has the split.

    Raises:
      UserError: the source or the split does not exist.
    """
    if source == "world":
        if split not in world.SPLITS:
            raise UserError(
                f"config.{split_key}: {source} has no split {split!r}; choose one of "
                f"{', '.join(world.SPLITS)}"
            )
    elif source.startswith(PREFIX):
        check_synthetic(source_key, source)
        if split != "train":
            raise UserError(
                f"config.{split_key}: {source} has no split {split!r}; use split 'train'"
            )
    elif Path(source).suffix not in SUFFIXES:
        raise UserError(
            f"config.{source_key}={source} is not a source of questions; use world, "
            f"{PREFIX}COUNT:SEED or a file that ends in {', '.join(SUFFIXES)}"
        )
    else:
        check_file(source_key, source)


def check_synthetic(key: str, name: str) -> None:
    """Raises UserError if `name` does not have the form "synthetic:COUNT:SEED"."""
    try:
        synthetic_numbers(name)
    except UserError as error:
        raise UserError(f"config.{key}: {error}") from error


def check_file(key: str, path: str) -> None:
    """Raises UserError if `path` is not a file that this process may read."""
    if not os.path.isfile(path):  # `Path.is_file` raises for a name that is too long
        raise UserError(f"config.{key}={path}: no such file; fix the path")
    if not os.access(path, os.R_OK):
        raise UserError(f"config.{key}={path}: not readable; change the file's permissions")


def check_key(key: str, variable: str) -> None:
    """Raises UserError if the environment variable `variable`, unless "", has no valid API key."""
    try:
        authorization(variable)
    except UserError as error:
        raise UserError(f"config.{key}: {error}") from error


def check_server(key: str, url: str) -> None:
    """Sends one request to a server and waits at most `PROBE_SECS` seconds for any reply.

    Raises:
      UserError: the address is invalid, or the server does not reply.
    """
    client = JsonClient(url, timeout_secs=PROBE_SECS, attempts=1, backoff_secs=0)
    trouble = client.no_reply()
    client.close()
    if trouble:
        raise UserError(
            f"config.{key}: the server {url} does not answer ({trouble}); start it or fix the "
            "address"
        )
