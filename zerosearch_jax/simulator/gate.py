"""Refuses to train against a simulator whose report says that a policy can learn nothing from it.

It reads reports of `jobs/simulator_report.py` and weights, and runs no model.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from ml_collections import ConfigDict

from zerosearch_jax.errors import UserError


def asked_of(search: ConfigDict) -> dict[str, object]:
    """What a report is about: the weights and how they are asked, of a `search` section."""
    simulator = search.simulator
    how = {k: simulator[k] for k in ("form", "temperature", "top_k", "top_p", "max_new_tokens")}
    return {"weights": weights_sha256(simulator.model), "topk": search.topk, **how}


def check(
    report_path: str | Path,
    asked: Mapping[str, object],
    *,
    reader_em_useful_min: float,
    reader_em_noisy_max: float,
) -> None:
    """Passes if a fixed reader answers from the useful documents and does not from the noisy ones.

    What counts are the searches for which the real engine's documents were useful.

    Args:
      report_path: `report.json` of the report job.
      asked: `asked_of` the simulator that is about to be used.
      reader_em_useful_min: least exact match of the reader on useful documents, 0-1.
      reader_em_noisy_max: greatest on noisy ones, 0-1.

    Raises:
      UserError: no such report, it is of other weights or of another way to ask them, or a
        figure fails.
    """
    try:
        report = json.loads(Path(report_path).read_text(encoding="utf-8"))
        simulators = report["simulators"]
        em = {
            (row["source"], row["label"]): row["reader_em"]
            for row in report["rows"]
            if row["queries"] == "useful"
        }
    except OSError as error:
        raise UserError(
            f"{report_path}: cannot be read ({error.strerror}); configs/simulator_report.py makes "
            "it, or leave simulator.gate.report empty"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{report_path}: not a report of configs/simulator_report.py") from error
    others = {
        name: [f"{key}={value!r}" for key, value in asked.items() if one.get(key) != value]
        for name, one in simulators.items()
    }
    name = min(others, key=lambda name: len(others[name]), default="")
    lacking = others.get(name, ["any simulator"])
    if lacking:
        raise UserError(
            f"{report_path} is not about this simulator: nothing there has "
            f"{', '.join(lacking)}; make a new report with configs/simulator_report.py"
        )
    useful, noisy = em[name, "useful"], em[name, "noisy"]
    failures = []
    if useful < reader_em_useful_min:
        failures.append(
            f"the reader's EM on useful documents is {useful:.3f}, "
            f"{reader_em_useful_min - useful:.3f} below {reader_em_useful_min}"
        )
    if noisy > reader_em_noisy_max:
        failures.append(
            f"the reader's EM on noisy documents is {noisy:.3f}, "
            f"{noisy - reader_em_noisy_max:.3f} above {reader_em_noisy_max}"
        )
    if failures:
        raise UserError(
            f"simulator {name} fails its gate: {'; '.join(failures)} ({report_path}); "
            "fine-tune it further or on more pairs, or move simulator.gate.useful_min and noisy_max"
        )


def weights_sha256(directory: str | Path) -> str:
    """The SHA-256, in hex, of a model directory's *.safetensors files, one after another by name.

    Raises:
      UserError: there is none.
    """
    files = sorted(Path(directory).glob("*.safetensors"))
    if not files:
        raise UserError(
            f"{directory} holds no .safetensors file, so it cannot be told which weights these "
            "are; give a model directory (a server's model can have neither report nor gate)"
        )
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
