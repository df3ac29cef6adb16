"""liger config validate: every problem of configuration files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from liger_cli.config import find_problems
from liger_cli.errors import ConfigError
from liger_cli.report import show_json, show_lines

__all__ = ["validate_files"]


def validate_files(files: Sequence[Path], *, as_json: bool) -> None:
    """Print the problems of files, or one JSON document of them.

    Raises:
        ConfigError: There is a problem.
    """
    problems = {str(file): find_problems(file) for file in files}
    found = [problem for of_file in problems.values() for problem in of_file]
    if as_json:
        show_json({"command": "config validate", "problems": problems})
    else:
        show_lines(*(f"{file}: ok" for file, of_file in problems.items() if not of_file))
    if found:
        raise ConfigError("\n".join(found), is_reported=True)
