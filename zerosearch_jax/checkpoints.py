"""Saves and restores training state. The only module that uses Orbax.

It knows nothing of the contents of a state or of the metadata.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from zerosearch_jax.errors import UserError
from zerosearch_jax.files import FORMAT, check_format

# Orbax joins the names of nested nodes with ".", and optax's states are tuples without names. A
# flat dict with a separator that no parameter name contains works for every pytree.
_SEPARATOR = "/"


class Checkpoints(AbstractContextManager):
    """The checkpoints of one run: `directory/STEP/`, the newest `keep` of them and the best.

    A checkpoint appears under its name only when it is complete, because Orbax writes to a
    temporary directory and renames it. A run killed at any moment finds the previous checkpoint.
    """

    def __init__(self, directory: str | Path, keep: int = 2) -> None:
        self._directory = Path(directory).absolute()
        self._manager = ocp.CheckpointManager(
            self._directory,
            options=ocp.CheckpointManagerOptions(create=True, enable_async_checkpointing=False),
        )
        self._keep = keep
        metadata = ocp.args.Composite(metadata=ocp.args.JsonRestore())
        saved = {s: self._manager.restore(s, args=metadata) for s in self._manager.all_steps()}
        scores = {step: one.metadata.get("score") for step, one in sorted(saved.items())}
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
        kept = {"format": FORMAT, "leaves": _shapes(state), "user": dict(metadata)}
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(_flat(state)),
                metadata=ocp.args.JsonSave(kept | {"score": score}),
            ),
            force=True,
        )
        self._manager.wait_until_finished()
        if score is not None:
            self._scores[step] = score
        for old in sorted(self._manager.all_steps())[: -self._keep]:
            if old != self.best_step():
                self._manager.delete(old)
                self._scores.pop(old, None)

    def improves(self, score: float | None) -> bool:
        """Whether `score` is higher than the best score so far; False for None."""
        return score is not None and score > max(self._scores.values(), default=float("-inf"))

    def best_step(self) -> int | None:
        """Returns the step with the highest score, the first of equals; None without a score."""
        return max(self._scores, key=self._scores.__getitem__, default=None)

    def latest_step(self) -> int | None:
        """Returns the step of the newest complete checkpoint, or None if there is none."""
        return self._manager.latest_step()

    def restore(self, step: int | None, abstract_like: Any) -> tuple[Any, dict[str, Any]]:
        """Reads checkpoint `step`, or the newest if `step` is None.

        Args:
          abstract_like: a pytree like the saved state, of arrays or `jax.ShapeDtypeStruct`s.
            Each leaf is restored with the dtype and sharding of the leaf given here.

        Returns:
          (state, metadata). The leaves of the state have the bits that were saved.

        Raises:
          UserError: there is no such checkpoint, an older version wrote it, or its state has
            another structure.
        """
        step = self.latest_step() if step is None else step
        if step is None or step not in self._manager.all_steps():
            which = "checkpoint" if step is None else f"checkpoint of step {step}"
            raise UserError(f"there is no {which} in {self._directory}")
        saved = self._manager.restore(
            step, args=ocp.args.Composite(metadata=ocp.args.JsonRestore())
        )
        check_format(saved.metadata, self._directory / str(step))
        self._check_same(step, saved.metadata["leaves"], _shapes(abstract_like))
        abstract = {name: _abstract(leaf) for name, leaf in _flat(abstract_like).items()}
        restored = self._manager.restore(
            step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
        ).state
        tree = jax.tree.structure(abstract_like)
        state = jax.tree.unflatten(tree, [restored[name] for name in abstract])
        return state, saved.metadata["user"]

    def __exit__(self, *error: object) -> None:
        """Releases Orbax's threads."""
        self._manager.close()

    def _check_same(self, step: int, saved: dict[str, Any], wanted: dict[str, Any]) -> None:
        for name in sorted(saved.keys() | wanted.keys()):
            if saved.get(name) != wanted.get(name):
                raise UserError(
                    f"{self._directory}/{step} is a checkpoint of another config: {name} is "
                    f"{saved.get(name, 'absent')} there and {wanted.get(name, 'absent')} here; "
                    "use another --workdir, or the config that wrote it"
                )


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
