"""A Hugging Face model directory whose files are checked against each other.

Only the small files and the headers of the weights are read, so a directory whose parts do not fit
together is refused in seconds.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from zerosearch_jax.errors import UserError
from zerosearch_jax.models.config import ModelConfig, read_config
from zerosearch_jax.models.generation_config import read_generation_config
from zerosearch_jax.models.weights import check_headers
from zerosearch_jax.text.tokenizer import check_template, load_tokenizer


@dataclass(frozen=True)
class ModelFiles:
    """The small files of a model directory.

    Attributes:
      config: the model's sizes.
      generation: from `read_generation_config`.
    """

    config: ModelConfig
    tokenizer: object
    generation: Mapping[str, Any]


def read_model_files(directory: str | Path) -> ModelFiles:
    """Reads a model directory without its weights.

    A directory is read again only if one of its files has changed. Callers share the result, so
    they must not add tokens to the tokenizer.

    Raises:
      UserError: a file is missing or unreadable, or two of them contradict each other: the weights'
        shapes, the tokenizer's ids or the end-of-text ids do not fit `config.json`. Or the
        chat template cannot render a user turn, or the directory holds LoRA adapters.
    """
    if os.path.isfile(Path(directory) / "adapter_config.json"):
        raise UserError(
            f"{directory} holds LoRA adapters (adapter_config.json), which would be ignored; give "
            "a directory of merged weights, such as `policy` next to an exported `adapters`"
        )
    config = read_config(directory)
    files = (path for path in sorted(Path(directory).iterdir()) if os.path.isfile(path))
    stats = ((path.name, path.stat()) for path in files)
    stamp = tuple((name, at.st_ino, at.st_size, at.st_mtime_ns) for name, at in stats)
    return _read_once(str(directory), config, stamp)


@lru_cache(maxsize=4)  # policy, simulators and reader
def _read_once(directory: str, config: ModelConfig, stamp: tuple) -> ModelFiles:
    """Reads each state of a directory only once, because reading takes seconds.

    Args:
      stamp: identifies the state of the directory's files.
    """
    check_headers(directory, config)
    tokenizer = load_tokenizer(directory, config.vocab_size)
    check_template(tokenizer)
    generation = read_generation_config(directory, tokenizer.eos_token_id, config.vocab_size)
    return ModelFiles(config, tokenizer, generation)
