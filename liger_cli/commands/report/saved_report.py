"""Reports as they lie on a disk: a run directory, or the JSON document of a command."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from liger_cli.common.readers import JsonError, parse_json, read_file_bytes
from liger_cli.errors import ConfigError
from liger_cli.report.run_files import read_run
from liger_cli.report.summary import SavedReport
from liger_cli.report.values import RunReport

__all__ = ["read_saved"]

_WHAT = (
    "Name the output_dir of `liger train`, its report.json, or a file that --json of train, eval, "
    "inspect or bench was written to."
)
# Commands whose JSON is a report; that of the others has other parts.
_READ = ("train", "eval", "inspect", "bench")


def read_saved(path: Path) -> SavedReport:
    """Return the report of a run directory, finished or not, or of a file of JSON.

    Raises:
        ConfigError: There is none, or it cannot be read.
    """
    if path.is_dir() and (path / "metrics.jsonl").is_file():
        run = read_run(path)
        return SavedReport(run.report, run.steps, run.evaluations, run.is_finished)
    file = path / "report.json" if path.is_dir() else path
    if file.name == "report.json" and (file.parent / "metrics.jsonl").is_file():
        return read_saved(file.parent)
    try:
        # The name may be that of a pipe, which a command writes to.
        return SavedReport(_parse(read_file_bytes(file, any_kind=True), str(file)))
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}", hint=_WHAT) from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ConfigError(
            f"{file} is no report that this version reads: {where}: {first['msg']}",
            hint="Another version may have written it.",
        ) from error
    except ValueError as error:
        raise ConfigError(f"{file} is no report: {error}", hint=_WHAT) from error


def _parse(document: bytes, name: str) -> RunReport:
    try:
        values = parse_json(document, name)
    except JsonError as error:
        raise ValueError(f"it is not JSON ({error})") from error
    command = values.get("command") if isinstance(values, dict) else None
    if command is not None and command not in _READ:
        instead = ", and its --markdown FILE writes the tables" if command == "bench ops" else ""
        raise ValueError(
            f"liger {command} writes JSON of another kind, which it also prints as text{instead}"
        )
    return RunReport.from_json(document)
