"""The lock of a workdir, and `config.json`: the config it was made with and a format version."""

import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from zerosearch_jax import config_flags
from zerosearch_jax.errors import UserError
from zerosearch_jax.files import FORMAT, check_format, read_json, write_json

RESTORE = "restore it from a copy, or use another --workdir"
"""The fix of a damaged config.json. Deleting the file would skip the check of the base model."""

_ATTEMPTS = 100  # to lock a file that other runs create and remove


def check_workdir(workdir: str | Path) -> dict[str, Any] | None:
    """Returns the config in `workdir`, or None if there is none.

    Raises:
      UserError: an older version wrote the directory, or the file is damaged.
    """
    path = Path(workdir) / "config.json"
    if not path.exists():
        return None
    config = read_json(path, dict, RESTORE)
    check_format(config, workdir)
    return config


def keep_config(config: Mapping[str, Any], workdir: str | Path) -> None:
    """Writes `workdir/config.json` and prints a warning per key that differs from the last run.

    Args:
      config: the config as nested dicts or as a ConfigDict. Its section "contents", if any, holds
        fingerprints by name.

    Raises:
      UserError: an older version wrote the directory.
    """
    # Tuples become lists, as in the file.
    now = json.loads(json.dumps({"format": FORMAT, **config_flags.plain(config)}))
    before = check_workdir(workdir)
    if before is not None:
        for difference in config_flags.differences(before, now):
            key, _, _ = difference.partition(": ")
            if key.startswith("contents."):  # two fingerprints, which say nothing to a reader
                name = key.removeprefix("contents.")
                print(f"warning: the content of {name} has changed since {workdir} was started")
            else:
                print(f"warning: {workdir} was started with another config.{difference}")
    write_json(Path(workdir) / "config.json", now)


@contextmanager
def locked(workdir: str | Path) -> Iterator[None]:
    """Creates `workdir` and keeps other processes out of it while the block runs.

    The lock is held on `workdir/lock` and ends with the process. If the block leaves nothing else
    in the workdir, the lock file and the created directories are removed. A run that refuses its
    config therefore leaves no trace.

    On Cloud Storage and some network file systems, the lock does not reach other machines.

    Raises:
      UserError: another process holds the lock, or the directory cannot be created.
    """
    workdir = Path(workdir)
    created = [path for path in (workdir, *workdir.parents) if not path.exists()]
    path = workdir / "lock"
    with _lock_file(path) as file:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        try:
            yield
        finally:
            if list(workdir.iterdir()) == [path]:
                path.unlink()
                with suppress(OSError):  # not empty
                    for folder in created:
                        folder.rmdir()


def _lock_file(path: Path) -> TextIO:
    """Opens and locks `path`; creates its directory. Raises as `locked`."""
    for _ in range(_ATTEMPTS):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except FileNotFoundError:
            raise UserError(f"{path.parent} cannot be created; give another --workdir") from None
        # Another run that ends may remove the file and its directory before or after the lock.
        with ExitStack() as closing, suppress(FileNotFoundError):
            file = closing.enter_context(path.open("a+", encoding="utf-8", errors="replace"))
            _flock(file, path.parent)
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                closing.pop_all()
                return file
    raise UserError(f"{path} disappears after each lock; end the processes that use {path.parent}")


def _flock(file: TextIO, workdir: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        time.sleep(0.1)  # the other process writes its name right after it has locked the file
        file.seek(0)
        holder = " ".join(file.read(200).split()) or "another process"
        raise UserError(
            f"{workdir} is in use by {holder}; wait for it, end it, or give another --workdir"
        ) from None
    except OSError as error:
        if error.errno not in (errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK):
            raise
        print(f"warning: {workdir} cannot be locked; use it in one process at a time")
