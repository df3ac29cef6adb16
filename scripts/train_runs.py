"""Train by `liger train` and read what it writes, for the scripts beside this one."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any


def train_into(folder: Path, keys: dict[str, Any]) -> None:
    """Run `liger train` with the keys of a configuration and an output_dir.

    Raises:
        subprocess.CalledProcessError: If it fails.
    """
    values = {**keys, "output_dir": folder}
    words = [w for key, value in values.items() for w in ("--set", f"{key}={spelled(value)}")]
    command = [sys.executable, "-m", "liger_cli", "train", *words]
    subprocess.run(command, check=True, stdout=sys.stderr)


def read_lines(file: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl or eval.jsonl."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def trained_steps(keys: dict[str, Any]) -> list[dict[str, Any]]:
    """Run `liger train` in a temporary directory and return the lines of its steps' metrics.

    Args:
        keys: Of the configuration; output_dir is that directory.
    """
    with tempfile.TemporaryDirectory() as folder:
        train_into(Path(folder), keys)
        lines = read_lines(Path(folder) / "metrics.jsonl")
    return [line for line in lines if "step_ms" in line]


def spelled(value: Any) -> str:
    """Write a value as `--set` reads it."""
    return str(value).lower() if isinstance(value, bool) else str(value)
