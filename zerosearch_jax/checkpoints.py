"""Saves and restores training state. The only module that uses Orbax.

It knows nothing of the contents of a state or of the metadata.
"""

import errno
import hashlib
import itertools
import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging

from zerosearch_jax.errors import UserError, named_disk_errors
from zerosearch_jax.files import FORMAT, check_format, check_shape, read_json, write_json
from zerosearch_jax.parallel.processes import gather, part

# Orbax joins the names of nested nodes with ".", and optax's states are tuples without names. A
# flat dict with a separator that no parameter name contains works for every pytree.
_SEPARATOR = "/"
_CHECKSUMS = "checksums.json"
_REMEDY = "restore it from a copy, use another checkpoint, or start over with another --workdir"
_METADATA = "metadata/metadata"  # where Orbax's JsonSave puts it

_LISTINGS = 10  # tries to list a directory from which another process deletes


class _DamagedError(Exception):
    """The files of a checkpoint differ from the saved ones; the message names a file."""


class Checkpoints(AbstractContextManager):
    """The checkpoints of one run: `directory/STEP/`, the newest `keep` of them and the best.

    A checkpoint appears under its name only when it is complete, because Orbax writes to a
    temporary directory and renames it. A run killed at any moment finds the previous checkpoint.

    `STEP/checksums.json` has the SHA-256 of every file, because Orbax does not notice a changed
    byte in an array. A save therefore reads its files once more; with several processes, each
    reads a part. A run that is killed before it writes the checksums leaves a checkpoint without
    them. Such a checkpoint is restored unchecked, and then gets its checksums.

    A run that is killed while it writes or deletes a checkpoint leaves parts of it. The next run
    removes them: partial writes at once, partial deletions after it has restored a newer one.

    Args:
      metadata: shape of the metadata (see `files`). A checkpoint with another shape is damaged.
      keep: number of newest checkpoints to keep.
      read_only: changes nothing in the directory, so that another process may use it.
    """

    def __init__(
        self,
        directory: str | Path,
        metadata: Mapping[str, Any] | None = None,
        keep: int = 2,
        read_only: bool = False,
    ) -> None:
        self._directory = Path(directory).absolute()
        self._shape = {"leaves": {str: [int]}, "user": dict(metadata or {})}
        self._keep = keep
        self._read_only = read_only
        if self._directory.exists() and not self._directory.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "not a directory", str(self._directory))
        self._manager: ocp.CheckpointManager | None = None
        self._scores: dict[int, float] = {}
        with _nothing_logged():  # `read_only` gives warnings
            self._manager = self._listed()
        scores = {step: self._saved_score(step) for step in sorted(self._manager.all_steps())}
        self._scores = {step: score for step, score in scores.items() if score is not None}

    def save(
        self, step: int, state: Any, metadata: Mapping[str, Any], score: float | None = None
    ) -> None:
        """Writes `state` and `metadata` as checkpoint `step`; returns when it is on disk.

        Args:
          step: number of finished steps. A step that is already saved is not written again.
          state: any pytree of jax or numpy arrays and numbers.
          metadata: JSON values, such as the data position.
          score: result of an evaluation of `state`, if there was one; higher is better.
        """
        if step in self._manager.all_steps():
            return
        if score is not None and math.isnan(score):
            score = None
        kept = {"format": FORMAT, "leaves": _shapes(state), "user": dict(metadata)}
        with named_disk_errors(self._directory / str(step)), _nothing_logged():
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(_flat(state)),
                    metadata=ocp.args.JsonSave(kept | {"score": score}),
                ),
                force=True,
            )
            self._manager.wait_until_finished()
            self._write_checksums(step)
        if score is not None:
            self._scores[step] = score
        self._delete_old()  # last, so that a failed save removes none

    def improves(self, score: float | None) -> bool:
        """Whether `score` is higher than the best score so far; False for None and NaN."""
        return score is not None and score > max(self._scores.values(), default=float("-inf"))

    def latest_step(self) -> int | None:
        """Returns the step of the newest complete checkpoint, or None if there is none."""
        return self._manager.latest_step()

    def best_step(self) -> int | None:
        """Returns the step with the highest score, the first of equals; None without a score."""
        return max(self._scores, key=self._scores.__getitem__, default=None)

    def restore(self, step: int | None, abstract_like: Any) -> tuple[Any, dict[str, Any]]:
        """Reads checkpoint `step`, or the newest undamaged one if `step` is None.

        With `step=None`, damaged checkpoints that are newer than the restored one are renamed to
        `directory/damaged-STEP` with a warning; then `latest_step()` is the step restored. If
        every checkpoint is damaged, nothing is renamed.

        Args:
          abstract_like: a pytree like the saved state, of arrays or `jax.ShapeDtypeStruct`s.
            Each leaf is restored with the dtype and sharding of the leaf given here.

        Returns:
          (state, metadata). The leaves of the state have the bits that were saved.

        Raises:
          UserError: there is no such checkpoint, an older version wrote it, its state has
            another structure, or it is damaged (with `step=None`: every checkpoint is damaged).
        """
        steps = sorted(self._manager.all_steps())
        if step is not None:
            steps = [step] if step in steps else []
        if not steps:
            which = "checkpoint" if step is None else f"checkpoint of step {step}"
            kept = ", ".join(map(str, sorted(self._manager.all_steps())))
            remedy = f"choose one of the steps {kept}" if kept else "run the job first"
            raise UserError(f"there is no {which} in {self._directory}; {remedy}")
        damaged: dict[int, str] = {}
        for candidate in reversed(steps[-1:] if self._read_only else steps):
            try:
                restored = self._read(candidate, abstract_like)
            except _DamagedError as damage:
                where = self._directory / str(candidate)
                damaged[candidate] = f"checkpoint {where} is damaged: {damage}"
                continue
            self._set_all_aside(damaged)
            if not self._read_only:
                gather([None])  # every process has listed the steps
                self._delete_old()  # only now, because a newer checkpoint is known to be undamaged
            return restored
        raise UserError(f"{'; '.join(damaged.values())}; {_REMEDY}")

    def __exit__(self, *error: object) -> None:
        """Releases Orbax's threads."""
        self._manager.close()

    def _read(self, step: int, abstract_like: Any) -> tuple[Any, dict[str, Any]]:
        folder = self._directory / str(step)
        checked = (folder / _CHECKSUMS).exists()
        if checked:
            self._compare_checksums(folder)
        saved = self._read_metadata(folder)
        self._check_same(step, saved["leaves"], _shapes(abstract_like))
        abstract = {name: _abstract(leaf) for name, leaf in _flat(abstract_like).items()}
        trouble, result = "", None
        try:
            restored = self._manager.restore(
                step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
            ).state
            leaves = [restored[name] for name in abstract]
            result = jax.tree.unflatten(jax.tree.structure(abstract_like), leaves), saved["user"]
        except (MemoryError, jax.errors.JaxRuntimeError):
            raise
        except Exception as error:  # Orbax does not document its exceptions for damaged files.
            if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
                raise  # too many open files, or a disk error
            trouble = f"{type(error).__name__} when it was read"
        _raise_damage(trouble)
        if not checked and not self._read_only:
            self._write_checksums(step)
        return result

    def _read_metadata(self, folder: Path) -> dict[str, Any]:
        trouble, saved = "", {}
        try:
            saved = read_json(folder / _METADATA, dict, "")
            if saved.get("format") == FORMAT:
                check_shape(saved, self._shape, folder / _METADATA, "")
        except UserError as error:
            trouble = str(error).removesuffix("; ")
        _raise_damage(trouble)
        check_format(saved, folder)
        return saved

    def _delete_old(self) -> None:
        for old in sorted(self._manager.all_steps())[: -self._keep]:
            if old != self.best_step():
                self._manager.delete(old)
                self._scores.pop(old, None)

    def _saved_score(self, step: int) -> float | None:
        """Returns the score in a checkpoint's metadata; None if it has none or is damaged."""
        path = self._directory / str(step) / _METADATA
        try:
            score = read_json(path, {"score": float | None}, "")["score"]
        except UserError:
            return None
        return None if score is None or math.isnan(score) else score

    def _set_aside(self, step: int) -> Path:
        """Renames a damaged checkpoint, so that Orbax no longer sees it."""
        paths = (self._directory / f"damaged-{step}{'+' * i}" for i in itertools.count())
        aside = next(path for path in paths if not path.exists())
        gather([None])  # every process has chosen the name
        if jax.process_index() == 0:
            (self._directory / str(step)).rename(aside)
        gather([None])
        if self._manager is not None:
            self._manager.reload()
        self._scores.pop(step, None)
        return aside

    def _listed(self) -> ocp.CheckpointManager:
        """Returns Orbax's manager, which lists the steps in the directory once."""
        options = ocp.CheckpointManagerOptions(
            create=not self._read_only,
            read_only=self._read_only,
            cleanup_tmp_directories=not self._read_only,
            enable_async_checkpointing=False,
        )
        for left in reversed(range(_LISTINGS)):
            try:
                self._check_listing()
                return ocp.CheckpointManager(self._directory, options=options)
            except FileNotFoundError:  # another process has deleted an old checkpoint
                if not left:
                    raise

    def _check_listing(self) -> None:
        """Sets aside checkpoints that are too damaged for Orbax to list the directory.

        Raises:
          UserError: every checkpoint is, or one is and `read_only` is set.
        """
        if not self._directory.exists():
            return
        damaged: dict[int, str] = {}
        found = list(ocp.path.step.standard_name_format().find_all(self._directory))
        for one in found:
            try:
                one.commit_timestamp  # noqa: B018 (reads the file)
            except Exception as error:  # Orbax does not document its exceptions for damaged files.
                if not one.path.exists():
                    raise FileNotFoundError(one.path) from error
                name = type(error).__name__
                damaged[one.step] = f"checkpoint {one.path} is damaged: {name} when it was listed"
        if damaged and (self._read_only or len(damaged) == len(found)):
            raise UserError(f"{'; '.join(damaged.values())}; {_REMEDY}")
        self._set_all_aside(damaged)

    def _set_all_aside(self, damaged: Mapping[int, str]) -> None:
        for step, what in damaged.items():
            print(f"warning: {what}; it is kept as {self._set_aside(step)}", flush=True)

    def _write_checksums(self, step: int) -> None:
        folder = self._directory / str(step)
        # A kill in an earlier call leaves checksums.json.part.
        names = sorted(name for name in _files(folder) if not name.startswith(_CHECKSUMS))
        sums = dict(gather([(name, _sha256(folder / name)) for name in part(names)]))
        if jax.process_index() == 0:
            write_json(folder / _CHECKSUMS, sums)
        gather([None])

    def _compare_checksums(self, folder: Path) -> None:
        trouble, sums = "", {}
        try:
            sums = read_json(folder / _CHECKSUMS, {str: str}, "")
        except UserError as error:
            trouble = str(error).removesuffix("; ")
        names = _files(folder)
        for name in part(sorted(sums)):
            if name not in names:
                trouble = trouble or f"{name!r} is missing"
            elif _sha256(folder / name) != sums[name]:
                trouble = trouble or f"{name} has changed since it was saved"
        _raise_damage(trouble)

    def _check_same(self, step: int, saved: dict[str, Any], wanted: dict[str, Any]) -> None:
        for name in sorted(saved.keys() | wanted.keys()):
            if saved.get(name) != wanted.get(name):
                raise UserError(
                    f"{self._directory}/{step} is a checkpoint of another config: {name} is "
                    f"{saved.get(name, 'absent')} there and {wanted.get(name, 'absent')} here; "
                    "use another --workdir, or the config that wrote it"
                )


def _raise_damage(trouble: str) -> None:
    """Raises _DamagedError on every process if one of them has trouble with its files."""
    found = [one for one in gather([trouble]) if one]
    if found:
        raise _DamagedError(found[0])


@contextmanager
def _nothing_logged() -> Iterator[None]:
    """Keeps Orbax from logging warnings, and the traceback of an error that it also raises.

    After an error, logging stays off, because other threads of Orbax may still log that error.
    """
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.FATAL)
    yield
    logging.set_verbosity(verbosity)


def _files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flat(tree: Any) -> dict[str, Any]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    names = [jax.tree_util.keystr(path, simple=True, separator=_SEPARATOR) for path, _ in leaves]
    assert len(set(names)) == len(names), "two leaves of a state have the same name"
    return dict(zip(names, (leaf for _, leaf in leaves), strict=True))


def _shapes(tree: Any) -> dict[str, list[int]]:
    return {name: list(getattr(leaf, "shape", ())) for name, leaf in _flat(tree).items()}


def _abstract(leaf: Any) -> Any:
    if isinstance(leaf, jax.Array):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
    return leaf
