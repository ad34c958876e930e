"""The error for bad input. It knows nothing of the rest of the package."""


class UserError(Exception):
    """Input that the user can fix: a config key, a file, a row, a model directory.

    The message is one line that names the thing and says how to fix it. `main` prints it without
    a traceback and exits with status 2.
    """
