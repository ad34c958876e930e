"""Traces a process's file operations in a directory, and sends it a signal at a chosen one.

Python imports this module at its start if PYTHONPATH names its directory. See test_kills.py.
"""

import json
import os
import re
import sys
import threading
import time
from importlib.machinery import PathFinder
from typing import Any

FOLDER = os.environ["FILE_OPERATIONS_FOLDER"] + "/"
TRACE = os.open(os.environ["FILE_OPERATIONS_TRACE"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
SIGNALS = json.loads(os.environ["FILE_OPERATIONS_SIGNALS"])
"""In order, with "signal", "operation", "occurrence" (since the previous signal), "delay_secs"."""
EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree")
NUMBERS = re.compile(r"\d+")
WRITES = os.O_WRONLY | os.O_RDWR
seen = 0


def on_event(event: str, arguments: tuple[Any, ...]) -> None:
    """Traces one operation. Python calls this before the operation, with its audit event."""
    global seen
    if event not in EVENTS or not isinstance(arguments[0], str | os.PathLike):
        return
    path = os.fspath(arguments[0])
    if not isinstance(path, str) or not path.startswith(FOLDER):
        return
    if event == "open" and not arguments[2] & WRITES:
        return
    operation = f"{event} {NUMBERS.sub('N', path.removeprefix(FOLDER))}"
    os.write(TRACE, f"{time.monotonic()} {operation}\n".encode())
    if SIGNALS and SIGNALS[0]["operation"] == operation:
        seen += 1
        if seen == SIGNALS[0]["occurrence"]:
            planned, seen = SIGNALS.pop(0), 0
            send(planned["signal"], planned["delay_secs"])


def send(number: int, delay_secs: float) -> None:
    """Signals the process group of this process, now or later."""
    if delay_secs:
        timer = threading.Timer(delay_secs, send, (number, 0.0))
        timer.daemon = True
        timer.start()
    else:
        os.write(TRACE, f"{time.monotonic()} signal {number}\n".encode())
        os.killpg(0, number)


class WithoutTorch(PathFinder):
    """Hides torch, which only tests install, so that transformers does not import it."""

    @classmethod
    def find_spec(cls, fullname: str, *arguments: Any) -> Any:
        return None if fullname == "torch" else super().find_spec(fullname, *arguments)


sys.meta_path[sys.meta_path.index(PathFinder)] = WithoutTorch
sys.addaudithook(on_event)
