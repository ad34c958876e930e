"""Addresses and API keys of servers, checked before a run."""

import os
import re

import httpx

from zerosearch_jax.errors import UserError

_KEY = re.compile(r"[!-~]+")  # visible ASCII, as in RFC 6750


def check_address(key: str, address: str) -> str:
    """Returns a server's address without a final "/".

    Args:
      key: the config key, for the error.

    Raises:
      UserError: the address is not "http://HOST:PORT/PATH" or "https://HOST/PATH". A user name and
        password are refused, because addresses are stored and printed; they are not shown.
    """
    if "@" in address:
        raise UserError(
            f"{key}: the address has a user name or password, which would be stored in the "
            "workdir; remove it and put an API key into an environment variable (key_variable)"
        )
    if not address.startswith(("http://", "https://")):
        raise UserError(
            f"{key}={address} must begin with http:// or https://, as in http://HOST:PORT"
        )
    if found := re.search(r"[?#\s]", address):
        raise UserError(
            f"{key}={address[: found.start()]}…: remove the part from {found[0]!r} on; an address "
            "is a host, a port and a path"
        )
    try:
        url = httpx.URL(address)
    except (httpx.InvalidURL, UnicodeError):
        url = None
    valid = url is not None and re.fullmatch(r"[\w.:-]+", url.host)
    if not valid or not 0 < (80 if url.port is None else url.port) < 65_536:
        raise UserError(f"{key}={address}: not an address; write it as http://HOST:PORT")
    return address.rstrip("/")


def endpoint(address: str, path: str) -> str:
    """Returns the address of `path` on a server, whose address may end in a first part of it.

    "http://a", "http://a/v1" and "http://a/v1/chat/completions" have the same endpoint for the path
    "/v1/chat/completions".

    Args:
      address: result of `check_address`.
    """
    scheme, _, rest = address.partition("://")
    host, slash, prefix = rest.partition("/")
    prefix = slash + prefix
    parts = path.split("/")  # the first is ""
    for end in range(len(parts), 1, -1):
        if prefix.endswith("/".join(parts[:end])):
            prefix = prefix.removesuffix("/".join(parts[:end]))
            break
    return f"{scheme}://{host}{prefix}{path}"


def check_key_variable(name: str) -> None:
    """Raises UserError unless `name` is "" or the name of an environment variable.

    The message does not show it, because it may be the key itself.
    """
    if not re.fullmatch(r"[A-Z_][A-Z0-9_]*|", name):
        raise UserError(
            "key_variable must be the name of an environment variable, in capitals such as "
            "OPENAI_API_KEY, not the key"
        )


def read_key(variable: str) -> str:
    """Returns the API key in an environment variable. It is never in a config or a log.

    Raises:
      UserError: the variable is absent or holds no API key. The message shows no part of it.
    """
    value = os.environ.get(variable)
    if not value:
        raise UserError(
            f"the environment variable {variable} is not set; set it to the API key of the server"
        )
    if not _KEY.fullmatch(value):
        raise UserError(
            f"the environment variable {variable} holds a space, a line break or a "
            "character that is not ASCII; set it to the API key alone"
        )
    return value


def authorization(variable: str) -> dict[str, str]:
    """Returns the header with the API key in an environment variable; none if `variable` is "".

    Raises UserError as `read_key` does.
    """
    return {"Authorization": f"Bearer {read_key(variable)}"} if variable else {}
