"""The keys of a run that is resumed by its path."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from liger_cli.common.readers import expand_path
from liger_cli.common.text import shorten
from liger_cli.errors import ConfigError

__all__ = ["file_of_run"]


def file_of_run(arguments: dict[str, Any]) -> Path | None:
    """Return the configuration of the run, or of the checkpoint's run, that --resume names."""
    resume = arguments["resume"]
    if resume is None or resume == "auto":
        return None
    found = expand_path(resume, "--resume")
    if not found.exists():
        raise ConfigError(f"--resume {shorten(resume)}: there is no checkpoint of this name")
    # The folder of a run that has lost its file may hold another program's config.yaml.
    file = (found.parent if found.name.startswith("checkpoint-") else found) / "config.yaml"
    return file if file.is_file() else None
