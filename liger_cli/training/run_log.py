"""Logs of a run: a line of JSON for each step or evaluation, cut back where a run is resumed."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

__all__ = ["STEP_LOG", "JsonLines", "copy_logs", "read_lines"]

STEP_LOG = "metrics.jsonl"


class JsonLines:
    """A file of one JSON object a line, each flushed as it is written.

    Args:
        path: The file; created with its directory.
        last_step: Lines of later steps are cut off first: a resumed run appends to its past.
        write: False keeps the rows without a file, on processes that are not the main one.
    """

    def __init__(self, path: Path, *, last_step: int = 0, write: bool = True) -> None:
        self.rows = [row for row in read_lines(path) if row["step"] <= last_step]
        self._file: TextIO | None = None
        if write:
            path.parent.mkdir(parents=True, exist_ok=True)
            unfinished = path.with_name(f".{path.name}.unfinished")
            unfinished.write_text("".join(map(_line, self.rows)), encoding="utf-8")
            unfinished.replace(path)
            self._file = path.open("a", encoding="utf-8")

    def write(self, row: dict[str, Any]) -> None:
        """Appends a row."""
        self.rows.append(row)
        if self._file is not None:
            self._file.write(_line(row))
            self._file.flush()

    def sync(self) -> None:
        """Waits until all rows are on the disk: a checkpoint there must not be ahead of them."""
        if self._file is not None:
            os.fsync(self._file.fileno())


def copy_logs(names: Sequence[str], source: Path, target: Path, accelerator: Any) -> None:
    """Copies the logs that one run has to the directory of another, before any process reads it."""
    if accelerator.is_main_process:
        for name in names:
            if (source / name).is_file():
                shutil.copyfile(source / name, target / name)
    accelerator.wait_for_everyone()


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yields the rows of a log, up to one that was not finished; none where there is no file."""
    if not path.is_file():
        return
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            # The process was killed while it wrote this line; the checkpoint is older than it.
            return


def _line(row: dict[str, Any]) -> str:
    return json.dumps(_finite(row)) + "\n"


def _finite(value: Any) -> Any:
    """A value with None for NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
