"""Loads the passages of a corpus, which real engines search."""

from collections.abc import Mapping
from pathlib import Path

from zerosearch_jax.data.embedded.synthetic import PREFIX, synthetic_world
from zerosearch_jax.data.embedded.world import corpus, load_entities
from zerosearch_jax.data.rows import as_text, read_rows
from zerosearch_jax.errors import UserError, shown
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
    if path.suffix != ".jsonl":
        raise UserError(f"corpus {source!r}: choose world, {PREFIX}COUNT:SEED or a .jsonl file")
    return [_passage(f"{path}: row {number}", row) for number, row in read_rows(path)]


def _passage(where: str, row: object) -> Passage:
    if not isinstance(row, Mapping) or not {"id", "contents"} <= row.keys():
        raise UserError(f'{where}: expected {{"id", "contents"}}; fix or delete the row')
    key, contents = as_text(row["id"]), row["contents"]
    if key is None:
        raise UserError(f"{where}: key 'id' is {shown(row['id'])}; set it to a text or a number")
    if not isinstance(contents, str) or not contents.strip():
        raise UserError(f"{where}: key 'contents' is empty; set it to a text")
    title, _, text = contents.strip().partition("\n")
    title, text = title.strip().strip('"'), text.strip()
    return Passage(key, key, title, f"{title}: {text}" if text else title, ())
