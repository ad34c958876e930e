"""End-of-text ids and generation defaults of a Hugging Face model directory.

Three files can name the ids that end a text: `generation_config.json`, `config.json` and the
tokenizer's. Instruct models often have several, and a single file may lack some. `transformers`
stops at the first file's ids, or at the second's if there is no first. Servers also stop at the
tokenizer's. Here every id of the three counts.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zerosearch_jax.errors import UserError, shown
from zerosearch_jax.files import read_json, write_json
from zerosearch_jax.models.config import ModelConfig, to_hf

GENERATION_CONFIG = "generation_config.json"
SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def read_generation_config(
    directory: str | Path, tokenizer_eos_id: int | None, vocab_size: int
) -> dict[str, Any]:
    """Returns the directory's `generation_config.json`, completed from the other two files.

    `eos_token_id` is the sorted list of all ids that end a text. `bos_token_id` and `pad_token_id`
    come from `config.json` if the file lacks them. All other keys are unchanged.

    Args:
      vocab_size: number of embedding rows.

    Raises:
      UserError: a file is not a JSON object, an id is not an integer, an end-of-text id is outside
        the vocabulary, or no file has one.
    """
    directory = Path(directory)
    settings, config = _read(directory / GENERATION_CONFIG), _read(directory / "config.json")
    # Keys with an underscore record how `transformers` made the file.
    settings = {key: value for key, value in settings.items() if not key.startswith("_")}
    for key in ("bos_token_id", "pad_token_id"):
        if settings.get(key) is None and config.get(key) is not None:
            settings[key] = config[key]
        if type(settings.get(key)) not in (int, type(None)):
            raise UserError(
                f"{directory}: {key} is {shown(settings[key])}, not a token id; fix it in "
                f"{GENERATION_CONFIG} or config.json"
            )
    end_ids = set()
    for file, value in (
        (GENERATION_CONFIG, settings.get("eos_token_id")),
        ("config.json", config.get("eos_token_id")),
        ("tokenizer_config.json", tokenizer_eos_id),
    ):
        for token_id in value if isinstance(value, list) else [] if value is None else [value]:
            if type(token_id) is not int or not 0 <= token_id < vocab_size:
                raise UserError(
                    f"{directory / file}: the end-of-text id {shown(token_id)} is not one of the "
                    f"model's {vocab_size} token ids; fix eos_token_id"
                )
            end_ids.add(token_id)
    if not end_ids:
        raise UserError(
            f"{directory} names no end-of-text token; set eos_token_id in {GENERATION_CONFIG} or "
            "eos_token in tokenizer_config.json"
        )
    return settings | {"eos_token_id": sorted(end_ids)}


def write_configs(
    directory: Path, config: ModelConfig, dtype: str, generation: Mapping[str, Any]
) -> None:
    """Writes `generation_config.json` and then `config.json`, which name the same special ids.

    Args:
      generation: as from `read_generation_config`; may be empty.
    """
    # Without these keys transformers would use Llama's old ids 1 and 2.
    generation = {"bos_token_id": None, "eos_token_id": None, **generation}
    if isinstance(end_ids := generation["eos_token_id"], list) and len(end_ids) == 1:
        generation["eos_token_id"] = end_ids[0]
    write_json(directory / GENERATION_CONFIG, generation, indent=2)
    ids = {key: generation[key] for key in SPECIAL_IDS if key in generation}
    write_json(directory / "config.json", to_hf(config) | {"dtype": dtype} | ids, indent=2)


def _read(path: Path) -> dict[str, Any]:
    """Returns the JSON object in a file; {} without the file."""
    return read_json(path, dict, "fetch the model again") if os.path.lexists(path) else {}
