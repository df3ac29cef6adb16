"""Train by `liger train` and read what it writes, for the scripts beside this one."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any


def trained_steps(keys: dict[str, Any]) -> list[dict[str, Any]]:
    """Run `liger train` in a temporary directory and return the lines of its steps' metrics.

    Args:
        keys: Of the configuration; output_dir is that directory.
    """
    with tempfile.TemporaryDirectory() as folder:
        values = {**keys, "output_dir": folder}
        words = [w for key, value in values.items() for w in ("--set", f"{key}={spelled(value)}")]
        command = [sys.executable, "-m", "liger_cli", "train", *words]
        subprocess.run(command, check=True, stdout=sys.stderr)
        lines = (Path(folder) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [line for line in map(json.loads, lines) if "step_ms" in line]


def spelled(value: Any) -> str:
    """Write a value as `--set` reads it."""
    return str(value).lower() if isinstance(value, bool) else str(value)
