"""The one error for bad input. It knows nothing of the rest of the package."""


class UserError(Exception):
    """Input that the user can mend: a config key, a file, a row, a model directory.

    The message is one line that names the thing and how to mend it. `main` prints it
    without a traceback and exits with status 2.
    """
