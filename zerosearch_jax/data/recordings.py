"""Loads recorded responses of a web search service, which the engine `recorded_web` searches."""

from pathlib import Path

from zerosearch_jax.data.rows import read_rows
from zerosearch_jax.errors import UserError
from zerosearch_jax.search.web import KEYS, record_of


def load_recording(path: str | Path) -> list[dict]:
    """Reads a .jsonl file of Serper's replies into rows like those of `record_of`.

    Raises:
      UserError: the file is not a readable .jsonl, or a row is not a reply of Serper.
    """
    if Path(path).suffix != ".jsonl":
        raise UserError(f"{path}: not a recording; give a .jsonl file of Serper's replies")
    return [_reply(f"{path}: row {number}", row) for number, row in read_rows(path)]


def _reply(where: str, row: object) -> dict:
    parameters = row.get("searchParameters") if isinstance(row, dict) else None
    query = parameters.get("q") if isinstance(parameters, dict) else None
    if not isinstance(query, str):
        raise UserError(
            f"{where}: searchParameters.q, the query, is missing or not text; fix the row"
        )
    organic = row.get("organic", [])  # Serper omits the list if it found nothing
    if not isinstance(organic, list) or not all(isinstance(result, dict) for result in organic):
        raise UserError(f"{where}: organic is not a list of results; fix the row")
    for rank, result in enumerate(organic):
        bad = [key for key in KEYS if not isinstance(result.get(key, ""), str)]
        if bad:
            raise UserError(f"{where}: organic[{rank}].{bad[0]} is not text; fix the row")
    return record_of(query, organic)
