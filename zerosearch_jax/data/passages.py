"""What a real engine searches: the passages of a corpus, wherever they come from."""

import json
from collections.abc import Iterator
from pathlib import Path

from zerosearch_jax.data.embedded.synthetic import PREFIX, synthetic_world
from zerosearch_jax.data.embedded.world import corpus, load_entities
from zerosearch_jax.errors import UserError
from zerosearch_jax.search.engine import Passage


def load_passages(source: str) -> list[Passage]:
    """The passages of "world", of "made_up:COUNT:SEED" or of a .jsonl file.

    A file's rows are `{"id", "contents"}` as Search-R1's corpora have them: the first
    line of the contents is the title, in quotation marks or not, the rest the text. The title is
    searched, too, and shown: a passage's text is "Title: text".

    Raises:
      UserError: no such source, or a row that is not a passage, with its number.
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
        raise UserError(f"{path}: the corpus has no passages; give a file with at least one")
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
                    f'{where}: expected {{"id", "contents"}} ({error!r}); mend or drop the row'
                ) from error
            if not isinstance(contents, str) or not contents.strip():
                raise UserError(f"{where}: key 'contents' is empty; it must be a text")
            title, _, text = contents.strip().partition("\n")
            title, text = title.strip().strip('"'), text.strip()
            yield Passage(key, key, title, f"{title}: {text}" if text else title, ())
