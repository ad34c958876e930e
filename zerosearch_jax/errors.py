"""Errors that end a run without a traceback: bad input, SIGTERM, and errors of the disk."""

import errno
import os
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_DISK_ERRORS = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space",
    errno.ENAMETOOLONG: "give a shorter path or --workdir",
    errno.EFBIG: "raise the limit (ulimit -f)",
    errno.EROFS: "give another --workdir",
    errno.EACCES: "change the permissions, or give another --workdir",
    errno.EPERM: "change the permissions, or give another --workdir",
    errno.ENOTDIR: "remove the file in the way, or give another --workdir",
    errno.EEXIST: "remove the file in the way, or give another --workdir",
    errno.ELOOP: "remove the circular link, or give another --workdir",
    errno.EISDIR: "remove the directory in the way, or give another --workdir",
    errno.EIO: "check the disk",
}
"""Error number of the operating system → how to fix it."""
UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]+")
"""Control characters, line breaks and lone surrogates."""
_CREDENTIALS = re.compile(r"(://)[^/\s'\"]*@")


class UserError(Exception):
    """Input that the user can fix: a config key, a file, a row, a model directory.

    The message is one line that names the thing and says how to fix it. `main` prints it without
    a traceback and exits with status 2.
    """


class Terminated(BaseException):
    """SIGTERM ended the run. Like KeyboardInterrupt, it is no `Exception`."""

    EXIT_STATUS = 128 + signal.SIGTERM  # 143, as a shell reports for a process that it killed


def disk_error(error: Exception) -> str | None:
    """Returns the line for an error of the disk that the user can fix; None for other errors."""
    number = _os_error_number(error)
    # A rename names its target second.
    name = getattr(error, "filename2", None) or getattr(error, "filename", None)
    if number not in _DISK_ERRORS:
        return None
    where = "" if name is None else f"{name}: "
    return f"{where}{os.strerror(number)}; {_DISK_ERRORS[number]} and repeat the command"


@contextmanager
def named_disk_errors(path: str | Path) -> Iterator[None]:
    """Raises an error of the disk within the block as an OSError that names `path`.

    A failed write to an open file names no file. TensorStore and libraries in Rust raise other
    classes, which have no file name either.
    """
    try:
        yield
    except Exception as error:
        if disk_error(error) is None or getattr(error, "filename", None) is not None:
            raise
        number = _os_error_number(error)
        raise OSError(number, os.strerror(number), str(path)) from error


@contextmanager
def named_errors(where: str | Path, fix: str) -> Iterator[None]:
    """Raises any exception of a library within the block as a UserError: "where: reason; fix".

    Enclose only calls that read the user's input with a library. Libraries do not document which
    exceptions damaged input raises, and an exception of our own code must stay a program error.
    A panic of a Rust library derives from BaseException and is translated, too.

    Args:
      where: file, row or key that is read.
      fix: how the user fixes it.
    """
    try:
        yield
    except UserError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise UserError(f"{where}: {reason(error)}; {fix}") from error


def reason(error: BaseException, limit: int = 300) -> str:
    """Returns an exception's message as one line of at most `limit` characters."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return one_line(" ".join(str(text).split()).rstrip("."), limit)


def error_line(error: UserError) -> str:
    """Returns the printed line of an error that ends a run."""
    return f"error: {one_line(str(error), 2000)}"


def shown(value: Any, limit: int = 120) -> str:
    """Returns `repr(value)` for a message, shortened by `one_line`."""
    try:
        return one_line(repr(value), limit)
    except (ValueError, RecursionError):  # an int of more than 4,300 digits; deep nesting
        return f"<{type(value).__name__}>"


def one_line(text: str, limit: int) -> str:
    """Returns `text` as one printable line of at most `limit` characters, cut in its middle.

    Passwords in addresses (`http://user:password@host`) are replaced by `***`.
    """
    line = _CREDENTIALS.sub(r"\1***@", UNPRINTABLE.sub(" ", text))
    half = (limit - 1) // 2
    return line if len(line) <= limit else f"{line[:half]}…{line[-half:]}"


def _os_error_number(error: Exception) -> int | None:
    """Returns the error number of the operating system, which may only be in the message."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\bos[ _]error(?:_code=)?[ ']*(\d{1,9})", str(error))
    return int(found[1]) if found else None
