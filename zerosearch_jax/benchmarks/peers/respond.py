"""Request and response of a peer script: JSON on stdin, one JSON line on stdout.

It imports nothing of this project, because every peer has a separate environment.
"""

import json
import os
import sys
from collections.abc import Callable


def respond(run: Callable[[dict], dict], *, limit_cores: bool = True) -> None:
    """Reads the request from stdin and writes `run(request)` to stdout.

    Args:
      run: makes the response; it imports the peer's libraries.
      limit_cores: use only as many cores as the request has `threads`. XLA and torch size their
        thread pools by the available cores when they are loaded.
    """
    stdout = os.dup(1)
    os.dup2(2, 1)  # Libraries may print to stdout, also from C++.
    request = json.load(sys.stdin)
    if limit_cores:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: request["threads"]])
    os.write(stdout, json.dumps(run(request)).encode() + b"\n")
