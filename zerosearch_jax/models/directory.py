"""A Hugging Face model directory whose files are checked against each other.

Only the small files and the headers of the weights are read, so a directory whose parts do not fit
together is refused in seconds.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zerosearch_jax.errors import UserError
from zerosearch_jax.models.config import ModelConfig, read_config
from zerosearch_jax.models.generation_config import read_generation_config
from zerosearch_jax.models.weights import check_headers
from zerosearch_jax.text.tokenizer import load_tokenizer


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

    Raises:
      UserError: a file is missing or unreadable, or two of them contradict each other: the weights'
        shapes, the tokenizer's ids or the end-of-text ids do not fit `config.json`; or the
        directory holds LoRA adapters.
    """
    if (Path(directory) / "adapter_config.json").is_file():
        raise UserError(
            f"{directory} holds LoRA adapters (adapter_config.json), which would be ignored; give "
            "a directory of merged weights, such as `policy` next to an exported `adapters`"
        )
    config = read_config(directory)
    check_headers(directory, config)
    tokenizer = load_tokenizer(directory)
    check_ids(directory, tokenizer, config.vocab_size)
    generation = read_generation_config(directory, tokenizer.eos_token_id, config.vocab_size)
    return ModelFiles(config, tokenizer, generation)


def check_ids(directory: str | Path, tokenizer, vocab_size: int) -> None:
    """Raises UserError if the tokenizer has an id without an embedding row.

    A tokenizer with fewer ids than rows is normal: many models pad their vocabulary.
    """
    # A post-processor can name ids that the vocabulary lacks.
    largest = max([*tokenizer.get_vocab().values(), *tokenizer("")["input_ids"]])
    if largest >= vocab_size:
        raise UserError(
            f"{directory}: the tokenizer has ids up to {largest} "
            f"({tokenizer.convert_ids_to_tokens(largest)!r}), but the model's embedding has "
            f"{vocab_size} rows; use the model's own tokenizer, or resize the embedding"
        )
