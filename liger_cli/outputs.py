"""Whether what a command is to write can be written, found out before there is anything to lose."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

from liger_cli.errors import ConfigError, EnvironmentProblem

__all__ = ["check_files", "check_writable"]


def check_files(files: Mapping[str, Path | None]) -> None:
    """check_writable for each file that is given, by its flag."""
    for flag, path in files.items():
        if path is not None:
            check_writable(path, flag)


def check_writable(path: Path, what: str, *, is_directory: bool = False) -> None:
    """Finds out whether a file, or files in a directory, can be written; leaves nothing behind.

    Args:
        path: The file or the directory. It need not be there, nor the directories above it.
        what: The flag or key that names it, for the message.
        is_directory: Whether the path is a directory.

    Raises:
        ConfigError: A directory is where a file should be, or the other way round.
        EnvironmentProblem: The file system does not take it.
    """
    if path.exists() and path.is_dir() != is_directory:
        kinds = ("a file", "a directory") if is_directory else ("a directory", "a file")
        raise ConfigError(f"{what} {path} is {kinds[0]}, and should be {kinds[1]}")
    try:
        if path.exists() and not is_directory:
            with path.open("ab"):
                return
        # The directories that are missing are made later, in the last one that is there.
        places = (path.absolute(), *path.absolute().parents)
        with tempfile.TemporaryFile(dir=next(place for place in places if place.exists())):
            return
    except OSError as error:
        raise EnvironmentProblem(f"{what} {path} cannot be written: {error.strerror}") from error
