"""Gate before RL: refuses a simulator whose report fails the configured bounds.

The gate reads reports of `jobs/simulator_report.py` and hashes models. It runs no model.
"""

from collections.abc import Mapping
from pathlib import Path

from zerosearch_jax.errors import UserError
from zerosearch_jax.files import read_json
from zerosearch_jax.training.fingerprints import model_sha256
from zerosearch_jax.training.sections import SearchConfig

_REPORT = {
    "simulators": {str: dict},
    "rows": [{"source": str, "label": str, "queries": str, "reader_em": float | None}],
}
"""The part of a report that the gate reads; see `files` for shapes."""


def simulator_identity(search: SearchConfig) -> dict[str, object]:
    """Returns the fingerprint of a `search` section's simulator and its prompt settings.

    A report is valid for exactly one identity.

    Raises:
      UserError: the simulator runs on a server, or its directory has no weights.
    """
    simulator = search.simulator
    if simulator.url:
        raise UserError(
            f"simulator.url={simulator.url}: a model on a server has no fingerprint, so it can "
            "have neither a report nor a gate; leave the url or simulator.gate.report empty"
        )
    keys = ("form", "temperature", "top_k", "top_p", "max_new_tokens")
    settings = {key: getattr(simulator, key) for key in keys}
    return {"weights": model_sha256(simulator.model), "topk": search.topk, **settings}


def check(
    report_path: str | Path,
    identity: Mapping[str, object],
    *,
    reader_em_useful_min: float,
    reader_em_noisy_max: float,
) -> None:
    """Passes if the reader answers from useful documents and does not from noisy ones.

    Only searches for which the real engine found useful documents count.

    Args:
      report_path: `report.json` of the report job.
      identity: `simulator_identity` of the simulator to be used.
      reader_em_useful_min: least exact match of the reader on useful documents, 0-1.
      reader_em_noisy_max: greatest exact match of the reader on noisy documents, 0-1.

    Raises:
      UserError: the report is missing, is about other weights or settings, or fails a bound.
    """
    name, reader_em = _reader_em_of(Path(report_path), identity)
    useful, noisy = reader_em["useful"], reader_em["noisy"]
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
            "fine-tune it longer or on more pairs, or change simulator.gate.useful_min and "
            "noisy_max"
        )


def _reader_em_of(path: Path, identity: Mapping[str, object]) -> tuple[str, dict[str, float]]:
    """Returns the name of the simulator with this identity and its reader EM by label."""
    fix = "create it with configs/simulator_report.py, or leave simulator.gate.report empty"
    report = read_json(path, _REPORT, fix)
    simulators = report["simulators"]
    reader_em = {
        (row["source"], row["label"]): row["reader_em"]
        for row in report["rows"]
        if row["queries"] == "useful"
    }
    differences = {
        name: [f"{key}={value!r}" for key, value in identity.items() if found.get(key) != value]
        for name, found in simulators.items()
    }
    name = min(differences, key=lambda name: len(differences[name]), default="")
    missing = differences.get(name, ["any simulator"])
    if missing:
        raise UserError(
            f"{path} is not about this simulator: it has no entry with {', '.join(missing)}; "
            "make a new report with configs/simulator_report.py"
        )
    found = {label: reader_em.get((name, label)) for label in ("useful", "noisy")}
    for label, value in found.items():
        if value is None:
            raise UserError(f"{path}: no reader_em of {name} on {label} documents; {fix}")
    return name, found
