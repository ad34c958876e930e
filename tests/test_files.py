"""Tests of atomic file writes."""

import os

import pytest

from zerosearch_jax.files import write_atomically


def test_interrupted_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_atomically(path, "old")

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", killed)
        write_atomically(path, "new")
    assert path.read_text() == "old"
    write_atomically(path, "néw")
    assert path.read_text(encoding="utf-8") == "néw"
    write_atomically(path, b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff"
