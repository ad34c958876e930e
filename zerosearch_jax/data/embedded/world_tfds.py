"""The questions of the embedded world as a TFDS dataset in array_record files.

TensorFlow is not needed. The first use writes the files to a folder whose name is a checksum of
their facts and code, so stale files are never read.
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
from zerosearch_jax.errors import UserError, named_errors
from zerosearch_jax.text import matching

with warnings.catch_warnings():  # TFDS imports raise warnings that we cannot fix.
    warnings.simplefilter("ignore")
    import tensorflow_datasets as tfds

DEFAULT_DATA_DIR = Path("~/.cache/zerosearch_jax/tfds")
_SEED = 0  # decides the wording and the order of the questions


class EmbeddedWorld(tfds.core.GeneratorBasedBuilder):
    """One- and two-hop questions on true facts, split by entity; see `data/embedded/world.py`."""

    name = "embedded_world"
    VERSION = tfds.core.Version("1.0.0")
    # None keeps TFDS from looking for download checksums next to the code. That search needs
    # importlib_resources, which TFDS does not install, and this dataset downloads nothing.
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
    """Returns a checksum of the facts and of the code that turns them into questions."""
    digest = hashlib.sha256()
    for file in (world.FACTS_PATH, *(m.__file__ for m in (world, phrasing, matching)), __file__):
        digest.update(hashlib.sha256(Path(file).read_bytes()).digest())
    return digest.hexdigest()[:16]


def _builder(folder: Path) -> EmbeddedWorld:
    return EmbeddedWorld(data_dir=folder, file_format="array_record")


def prepare(data_dir: str | Path | None = None) -> Path:
    """Returns the folder of the prepared dataset; writes it first if it does not exist.

    The dataset is written to a temporary folder and then renamed. Concurrent processes therefore
    share one complete dataset, and none reads a partial one.

    Raises:
      UserError: the folder cannot be written, or the facts file is broken.
    """
    world.load_entities()  # Report a broken facts file before writing anything.
    root = Path(data_dir or DEFAULT_DATA_DIR).expanduser()
    place = root / _fingerprint()
    if place.is_dir():
        return place
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root, prefix="writing-") as scratch:
            with _quiet():
                _builder(Path(scratch) / "data").download_and_prepare()
            with contextlib.suppress(OSError):  # Another process has written the same files.
                os.rename(Path(scratch) / "data", place)
    except OSError as error:
        raise UserError(
            f"{root}: cannot write the prepared questions ({error}); make the folder writable or "
            "choose another"
        ) from error
    if not place.is_dir():
        raise UserError(f"{place}: cannot be created; remove it or choose another folder")
    return place


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences the download messages and progress bars of TFDS."""
    tfds.disable_progress_bar()
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def load_questions(split: str, data_dir: str | Path | None = None) -> list[Question]:
    """Returns the questions of `split`, one of `world.SPLITS`, in a fixed order.

    Raises:
      UserError: unknown split, or the dataset cannot be prepared or is damaged.
    """
    if split not in world.SPLITS:
        raise UserError(f"split {split!r}: choose one of {', '.join(world.SPLITS)}")
    place = prepare(data_dir)
    with _quiet(), named_errors(place, "delete this folder; the next run writes it again"):
        questions = [
            Question(
                id=row["id"].decode(),
                question=row["question"].decode(),
                golden_answers=tuple(a.decode() for a in row["golden_answers"]),
                split=split,
                hops=tuple(Hop(**hop) for hop in json.loads(row["hops"])),
            )
            for row in _builder(place).as_data_source(split=split)
        ]
    return sorted(questions, key=lambda q: world.order(_SEED, q.id))
