"""The error for bad input, and a check that raises it."""


class UserError(Exception):
    """Input that the user can fix: a config key, a file, a row, a model directory.

    The message is one line that names the thing and says how to fix it. `main` prints it without
    a traceback and exits with status 2.
    """


def check_choice(key: str, value: str, known: tuple[str, ...]) -> None:
    """Raises UserError if `value` is not one of `known`."""
    if value not in known:
        raise UserError(f"{key} is {value!r}; choose one of {', '.join(known)}")
