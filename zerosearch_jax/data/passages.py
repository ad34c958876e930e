"""Loads the passages of a corpus, which real engines search."""

import json
from collections.abc import Iterator
from pathlib import Path

from zerosearch_jax.data.embedded.synthetic import PREFIX, synthetic_world
from zerosearch_jax.data.embedded.world import corpus, load_entities
from zerosearch_jax.errors import UserError
from zerosearch_jax.search.engine import Passage


def load_passages(source: str) -> list[Passage]:
    """Loads the passages of "world", of "synthetic:COUNT:SEED" or of a .jsonl file.

    The rows of a file are `{"id", "contents"}`, the format of Search-R1's corpora. The first line
    of the contents is the title, with or without quotation marks; the rest is the text. Engines
    search and show both: the text of a passage is "Title: text".

    Raises:
      UserError: unknown source, an empty file, or an invalid row.
    """
    if source == "world":
        return corpus(load_entities())
    if source.startswith(PREFIX):
        entities, seed = synthetic_world(source)
        return corpus(entities, seed)
    path = Path(source)
    if path.suffix != ".jsonl" or not path.is_file():
        raise UserError(
            f"corpus {source!r}: choose world, {PREFIX}COUNT:SEED or an existing .jsonl file"
        )
    passages = list(_rows(path))
    if not passages:
        raise UserError(f"{path}: the corpus has no passages; use a file with at least one")
    return passages


def _rows(path: Path) -> Iterator[Passage]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            where = f"{path}: row {number}"
            try:
                row = json.loads(line)
                key, contents = str(row["id"]), row["contents"]
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(
                    f'{where}: expected {{"id", "contents"}} ({error!r}); fix or delete the row'
                ) from error
            if not isinstance(contents, str) or not contents.strip():
                raise UserError(f"{where}: key 'contents' is empty; set it to a text")
            title, _, text = contents.strip().partition("\n")
            title, text = title.strip().strip('"'), text.strip()
            yield Passage(key, key, title, f"{title}: {text}" if text else title, ())
