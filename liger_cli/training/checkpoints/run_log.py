"""Logs of a run: a line of JSON for each step or evaluation, cut back where a run is resumed."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from liger_cli.common.numbers import finite
from liger_cli.common.outputs import write_file, write_problem
from liger_cli.common.readers import JsonError, parse_json
from liger_cli.common.text import shorten

__all__ = ["STEP_LOG", "JsonLines", "copy_logs", "read_lines"]

_log = logging.getLogger(__name__)

STEP_LOG = "metrics.jsonl"
_MAX_LINE_BYTES = 2**20
# Differences and sums of such numbers are finite too.
_LARGEST = 1e100


class JsonLines:
    """A file of one JSON object a line, each given to the operating system as it comes.

    A line that cannot be written, on a full disk for one, ends nothing: it is kept, and written
    with the next one. `sync` raises where lines are missing.

    Args:
        path: The file; created with its directory. Lines in it that are no rows are left out, with
            a warning.
        required: Names that a row in the file has next to step, with a number or null.
        counts: Those of them that are whole numbers.
        last_step: Lines of later steps are cut off first: a resumed run appends to its past.
        write: False keeps the rows without a file, on processes that are not the main one.
    """

    def __init__(
        self,
        path: Path,
        *,
        required: Sequence[str] = (),
        counts: Sequence[str] = (),
        last_step: int = 0,
        write: bool = True,
    ) -> None:
        def leave_out(problem: str) -> None:
            _log.warning("%s is left out: %s", path, shorten(problem, 200))

        rows = read_lines(path, required, counts=counts, on_bad=leave_out)
        self.rows = [row for row in rows if row["step"] <= last_step]
        self._path = path
        self._file: BinaryIO | None = None
        # Of the file: its whole lines, and their size.
        self._num_lines = len(self.rows)
        self._num_bytes = 0
        if write:
            content = "".join(map(_line, self.rows)).encode()
            write_file(path, content)
            self._num_bytes = len(content)
            self._file = path.open("r+b", buffering=0)

    def write(self, row: dict[str, Any]) -> None:
        """Append a row."""
        was_whole = self._num_lines == len(self.rows)
        self.rows.append(row)
        if (error := self._append()) is not None and was_whole:
            _log.warning(
                "%s cannot be written: %s; its lines are kept until they can be",
                self._path,
                error.strerror,
            )

    def sync(self) -> None:
        """Wait until all rows are on the disk: a checkpoint there must not be ahead of them.

        Raises:
            EnvironmentProblem: Some cannot be written.
        """
        if self._file is None:
            return
        error = self._append()
        try:
            os.fsync(self._file.fileno())
        except OSError as failure:
            error = error or failure
        if error is not None:
            raise write_problem(self._path, error) from error

    def _append(self) -> OSError | None:
        """Write the rows that are not in the file yet; return why that cannot be done."""
        if self._file is None:
            return None
        rest = "".join(map(_line, self.rows[self._num_lines :])).encode()
        end = self._num_bytes
        try:
            while rest:
                # Over half a line that an earlier try has left.
                written = os.pwrite(self._file.fileno(), rest, end)
                end, rest = end + written, rest[written:]
        except OSError as error:
            return error
        self._num_lines, self._num_bytes = len(self.rows), end
        return None


def copy_logs(names: Sequence[str], source: Path, target: Path, accelerator: Any) -> None:
    """Copy the logs that one run has to the directory of another, before any process reads it."""
    if accelerator.is_main_process:
        for name in names:
            if (source / name).is_file():
                write_file(target / name, (source / name).read_bytes())
    accelerator.wait_for_everyone()


def read_lines(
    path: Path,
    required: Sequence[str],
    *,
    counts: Sequence[str] = (),
    on_bad: Callable[[str], None],
) -> Iterator[dict[str, Any]]:
    """Yield the rows of a log; none where there is no file.

    A value that is no finite number is None: a gap. The last line may be unfinished.

    Args:
        path: The file.
        required: Names that every row has next to step, with a number or null.
        counts: Those of them that are whole numbers from 0 on, as step is.
        on_bad: Called with a sentence on each whole line that is no such row, which is left out.

    Raises:
        OSError: The file cannot be read.
    """
    if not path.is_file():
        return
    with path.open("rb") as file:
        number = 0
        while line := file.readline(_MAX_LINE_BYTES):
            number += 1
            is_whole = line.endswith(b"\n")
            is_huge = len(line) == _MAX_LINE_BYTES and not is_whole
            while is_huge and not is_whole and (rest := file.readline(_MAX_LINE_BYTES)):
                is_whole = rest.endswith(b"\n")
            try:
                if is_huge:
                    raise ValueError(f"it has more than {_MAX_LINE_BYTES} bytes")
                yield _row(parse_json(line), required, ("step", *counts))
            except ValueError as error:
                # Without its end the process was killed while it wrote the line; the checkpoint is
                # older than it.
                if is_whole:
                    reason = error.reason if isinstance(error, JsonError) else error
                    on_bad(f"line {number}: {reason}")


def _row(values: Any, required: Sequence[str], counts: Sequence[str]) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise ValueError("it is no object")
    for name in (*counts, *required):
        if name not in values:
            raise ValueError(f"{name} is missing")
        if values[name] is not None and not _is_number(values[name]):
            raise ValueError(f"{name} is no number")
    row = {name: _finite_number(value) for name, value in values.items()}
    for name in counts:
        value = row[name]
        if not isinstance(value, int) or not 0 <= value < 2**63:
            raise ValueError(f"{name} is no whole number from 0 on")
    return row


def _finite_number(value: Any) -> int | float | None:
    return value if _is_number(value) and abs(value) < _LARGEST else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _line(row: dict[str, Any]) -> str:
    return json.dumps(finite(row)) + "\n"
