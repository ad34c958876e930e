"""SIGTERM is deferred, except in interruptible blocks; the second one ends the process."""

import os
import signal

import pytest

from zerosearch_jax.errors import Terminated
from zerosearch_jax.parallel.stop_request import StopRequest


def _send():
    os.kill(os.getpid(), signal.SIGTERM)


def test_sigterm_is_recorded_and_only_interruptible_work_ends_at_once():
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest() as stop:
        with stop.interruptible():
            pass
        assert not stop.received
        _send()  # raises nothing here
        assert stop.received
        with pytest.raises(Terminated), stop.interruptible():
            raise AssertionError("the block must not begin")
    with StopRequest() as stop:
        reached = []
        with pytest.raises(Terminated), stop.interruptible():
            _send()
            reached.append("after")
        assert stop.received and not reached
    assert signal.getsignal(signal.SIGTERM) == before


def test_second_sigterm_ends_the_process(monkeypatch):
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    with StopRequest():
        _send()
        assert ended == []
        _send()
        assert ended == [143]
