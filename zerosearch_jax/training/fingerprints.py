"""SHA-256 fingerprints of a job's inputs: models, questions, and files that engines read.

A cached result is valid only for the fingerprints it was made with, because a path says nothing
about the content. A fingerprint reads every byte: 1.4 GB/s on one core, 11 s for a 7B model in
bfloat16. Servers and the package's own code have no fingerprint.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from zerosearch_jax.data.qa import QARow
from zerosearch_jax.errors import UserError
from zerosearch_jax.files import check_shape
from zerosearch_jax.models.config import read_config
from zerosearch_jax.training.config import RLConfig
from zerosearch_jax.training.sections import SearchConfig
from zerosearch_jax.training.workdir import RESTORE

# Weights, config, tokenizer and chat template of a Hugging Face directory.
_MODEL_SUFFIXES = (".safetensors", ".json", ".jinja", ".txt", ".model")


def model_sha256(directory: str | Path) -> str:
    """Returns the fingerprint of a model directory: names and contents of its files, in hex.

    Raises:
      UserError: the directory has no config.json or no .safetensors file.
    """
    read_config(directory)
    files = sorted(
        path
        for path in Path(directory).iterdir()
        if path.suffix in _MODEL_SUFFIXES and path.is_file()
    )
    if not any(path.suffix == ".safetensors" for path in files):
        raise UserError(
            f"{directory} holds no .safetensors file, so its weights cannot be identified; give a "
            "complete model directory"
        )
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.name}\0{_file_sha256(path)}\0".encode())
    return digest.hexdigest()


def rows_sha256(rows: Sequence[QARow]) -> str:
    """Returns the fingerprint of questions: their ids, texts and gold answers, in order."""
    content = [(row.id, row.question, row.golden_answers) for row in rows]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def engine_sha256(search: SearchConfig) -> str:
    """Returns the fingerprint of the model or file that an engine reads, or "" if it reads none.

    Data that the package makes ("world", "synthetic:COUNT:SEED") and servers have none.
    """
    if search.engine == "simulated" and not search.simulator.url:
        return model_sha256(search.simulator.model)
    sources = {"bm25": search.corpus, "noisy_bm25": search.corpus}
    if search.web is not None:
        sources["recorded_web"] = search.web.recording
    path = Path(sources.get(search.engine) or "")
    return _file_sha256(path) if path.is_file() else ""


def check_base(
    workdir: str | Path, before: Mapping[str, Any] | None, config: RLConfig, sha256: str
) -> None:
    """Refuses to continue or export a run with another base model or another scale of adapters.

    Checkpoints of both have the same shapes, so they would be restored silently.

    Args:
      before: content of the workdir's config.json; None if there is none.
      sha256: fingerprint of `config.policy.model`.

    Raises:
      UserError: the workdir has checkpoints that were trained from another model, or with another
        `lora.alpha`.
    """
    if before is None or not any((Path(workdir) / "checkpoints").glob("[0-9]*")):
        return
    shape = {
        "contents": {"policy.model": str},
        "policy": {"model": str},
        "lora": {"alpha": float},
    }
    check_shape(before, shape, Path(workdir) / "config.json", RESTORE)
    if before["contents"]["policy.model"] != sha256:
        raise UserError(
            f"{workdir} was trained from config.policy.model={before['policy']['model']} with "
            f"other weights or files than {config.policy.model} holds now; use another --workdir, "
            "or give the model that the run began with"
        )
    alpha = before["lora"]["alpha"]
    if config.lora.rank and alpha != config.lora.alpha:
        raise UserError(
            f"{workdir} was trained with config.lora.alpha={alpha}, which is now "
            f"{config.lora.alpha}; set it back, or use another --workdir"
        )


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
