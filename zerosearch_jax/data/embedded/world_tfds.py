"""Serves the questions of the embedded world as a TFDS dataset in array_record files.

TensorFlow is neither installed nor needed. The files are written on first use into a folder
named by a checksum of everything they depend on, so stale files are never read.
"""

import contextlib
import hashlib
import io
import json
import os
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

from zerosearch_jax.data.embedded import phrasing, world
from zerosearch_jax.data.embedded.world import Hop, Question
from zerosearch_jax.errors import UserError

with warnings.catch_warnings():  # its imports warn about things that are not ours to mend
    warnings.simplefilter("ignore")
    import tensorflow_datasets as tfds

DEFAULT_DATA_DIR = Path("~/.cache/zerosearch_jax/tfds")
_SEED = 0  # of the phrasing and the order of the questions


class EmbeddedWorld(tfds.core.GeneratorBasedBuilder):
    """One- and two-hop questions on true facts, split by entity; see `data/embedded/world.py`."""

    name = "embedded_world"
    VERSION = tfds.core.Version("1.0.0")
    # TFDS would look beside the code for checksums of downloads, which needs a package that it
    # does not install (importlib_resources). Nothing is downloaded here.
    code_path = None

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict(
                {
                    "id": tfds.features.Text(),
                    "question": tfds.features.Text(),
                    "golden_answers": tfds.features.Sequence(tfds.features.Text()),
                    "hops": tfds.features.Text(doc="JSON list of the fields of world.Hop"),
                }
            ),
            supervised_keys=None,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager):
        del dl_manager
        return {split: self._generate_examples(split) for split in world.SPLITS}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict]]:
        questions = world.write_questions(world.load_entities(), split, _SEED)
        for number, question in enumerate(questions):
            yield (
                number,
                {
                    "id": question.id,
                    "question": question.question,
                    "golden_answers": list(question.golden_answers),
                    "hops": json.dumps([vars(hop) for hop in question.hops]),
                },
            )


def _fingerprint() -> str:
    """Checksum of the facts and of the code that turns them into questions."""
    digest = hashlib.sha256()
    for file in (world.FACTS_PATH, Path(world.__file__), Path(phrasing.__file__), Path(__file__)):
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()[:16]


def _builder(folder: Path) -> EmbeddedWorld:
    return EmbeddedWorld(data_dir=folder, file_format="array_record")


def prepare(data_dir: str | Path | None = None) -> Path:
    """Folder of the prepared dataset, written now if it is not there.

    It is written beside its place and moved there whole, so processes that start together all
    end up with one complete dataset and none reads half of one.

    Raises:
      UserError: the folder cannot be written, or the facts file is broken.
    """
    world.load_entities()  # a broken facts file is reported before anything is written
    root = Path(data_dir or DEFAULT_DATA_DIR).expanduser()
    place = root / _fingerprint()
    if place.is_dir():
        return place
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root, prefix="writing-") as scratch:
            with _quiet():
                _builder(Path(scratch) / "data").download_and_prepare()
            with contextlib.suppress(OSError):  # another process was first: its files are as good
                os.rename(Path(scratch) / "data", place)
    except OSError as error:
        raise UserError(f"{root}: cannot write the prepared questions there ({error})") from error
    if not place.is_dir():
        raise UserError(f"{place}: could not be put in place; remove it or choose another folder")
    return place


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps TFDS from announcing a download, with bars, of what is made here in a second."""
    tfds.disable_progress_bar()
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def load_questions(split: str, data_dir: str | Path | None = None) -> list[Question]:
    """The questions of `split` ("train", "validation", "test", "compositions"), in fixed order.

    Raises:
      UserError: unknown split, or the dataset cannot be prepared.
    """
    if split not in world.SPLITS:
        raise UserError(f"split {split!r}: choose one of {', '.join(world.SPLITS)}")
    with _quiet():
        source = _builder(prepare(data_dir)).as_data_source(split=split)
        rows = list(source)
    questions = [
        Question(
            id=row["id"].decode(),
            question=row["question"].decode(),
            golden_answers=tuple(a.decode() for a in row["golden_answers"]),
            split=split,
            hops=tuple(Hop(**hop) for hop in json.loads(row["hops"])),
        )
        for row in rows
    ]
    return sorted(questions, key=lambda q: world.order(_SEED, q.id))
