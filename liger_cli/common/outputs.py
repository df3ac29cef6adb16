"""Files that people keep: checked before there is anything to lose, and replaced in one step."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from liger_cli.common.numbers import format_bytes
from liger_cli.errors import ConfigError, EnvironmentProblem

__all__ = [
    "check_files",
    "check_writable",
    "replacing",
    "sync_path",
    "write_file",
    "write_problem",
]


def write_file(path: Path, content: str | bytes) -> None:
    """Write a file in one step: a reader sees the old content or all of the new one.

    Args:
        path: The file; directories above it are created.
        content: Text is written as UTF-8.

    Raises:
        EnvironmentProblem: It cannot be written; what was there is as it was.
    """
    with replacing(path) as unfinished:
        unfinished.write_bytes(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a path beside `path` to write to; that file replaces `path` when the block ends.

    After an error `path` is as it was. What is there and is no regular file, such as /dev/stdout,
    is yielded itself.

    Raises:
        EnvironmentProblem: A file cannot be written, with the name of `path`.
    """
    try:
        if path.exists() and not path.is_file():
            yield path
            return
        target = path.resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        # Libraries choose a format by the ending.
        name = f".{target.stem}.{os.getpid()}.unfinished{target.suffix}"
        unfinished = target.with_name(name)
        try:
            yield unfinished
            sync_path(unfinished)
            if target.exists():
                shutil.copymode(target, unfinished)
            unfinished.replace(target)
        finally:
            unfinished.unlink(missing_ok=True)
    except OSError as error:
        raise write_problem(path, error) from error


def write_problem(path: Path, error: Exception, hint: str | None = None) -> EnvironmentProblem:
    """Return the error of a file or directory that cannot be written, with the space left."""
    # In those of compiled libraries a stack of addresses follows.
    text = getattr(error, "strerror", None) or (str(error).strip() or type(error).__name__)
    text = text.splitlines()[0]
    with contextlib.suppress(OSError):
        text += f" ({format_bytes(shutil.disk_usage(path.parent).free)} are free)"
    return EnvironmentProblem(f"{path} cannot be written: {text}", hint=hint)


def sync_path(path: Path) -> None:
    """Wait until a file, or the names in a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_files(files: Mapping[str, Path | None]) -> None:
    """check_writable for each file that is given, by its flag."""
    for flag, path in files.items():
        if path is not None:
            check_writable(path, flag)


def check_writable(path: Path, what: str, *, is_directory: bool = False) -> None:
    """Find out whether a file, or files in a directory, can be written; leave nothing behind.

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
