"""The error for bad input, and checks that raise it."""

import signal


class UserError(Exception):
    """Input that the user can fix: a config key, a file, a row, a model directory.

    The message is one line that names the thing and says how to fix it. `main` prints it without
    a traceback and exits with status 2.
    """


class Terminated(BaseException):
    """SIGTERM ended the run. Like KeyboardInterrupt, it is no `Exception`."""

    EXIT_STATUS = 128 + signal.SIGTERM  # 143, as a shell reports for a process that it killed


def check_positive(where: str = "", **values: int) -> None:
    """Raises UserError for a value below 1. `where` precedes the key in the message."""
    for key, value in values.items():
        if value < 1:
            raise UserError(f"{where}{key}={value} must be at least 1")


def check_choice(key: str, value: str, known: tuple[str, ...]) -> None:
    """Raises UserError if `value` is not one of `known`."""
    if value not in known:
        raise UserError(f"{key} is {value!r}; choose one of {', '.join(known)}")
