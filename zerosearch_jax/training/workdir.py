"""The config that a workdir was made with, `config.json`, and its format version."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zerosearch_jax import config_flags
from zerosearch_jax.files import FORMAT, check_format, write_json


def check_workdir(workdir: str | Path) -> dict[str, Any] | None:
    """Returns the config in `workdir`, or None if there is none.

    Raises:
      UserError: an older version wrote the directory.
    """
    path = Path(workdir) / "config.json"
    if not path.exists():
        return None
    config = json.loads(path.read_text(encoding="utf-8"))
    check_format(config, workdir)
    return config


def keep_config(config: Mapping[str, Any], workdir: str | Path) -> None:
    """Writes `workdir/config.json` and prints a warning per key that differs from the last run.

    Args:
      config: the config as nested dicts or as a ConfigDict.

    Raises:
      UserError: an older version wrote the directory.
    """
    # Tuples become lists, as in the file.
    now = json.loads(json.dumps({"format": FORMAT, **config_flags.plain(config)}))
    before = check_workdir(workdir)
    if before is not None:
        for difference in config_flags.differences(before, now):
            print(f"warning: {workdir} was started with another config.{difference}")
    write_json(Path(workdir) / "config.json", now)
