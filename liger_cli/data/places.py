"""The files of a folder or a pattern, each once whatever links lead to it."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

__all__ = ["files_below", "matching_files", "without_repeats"]


def files_below(folder: Path) -> list[Path]:
    """Return the files of a folder and of the folders below it, in the order of their names.

    Links are followed; hidden files and folders are passed over.
    """
    return without_repeats(
        Path(entry.path)
        for place in _folders([str(folder)])
        for entry in _entries(place)
        if entry.is_file()
    )


def matching_files(pattern: str) -> list[Path]:
    """Return the files that match a pattern of glob, in the order of their names.

    `**` is any number of folders. Each of them is entered once, so that a link which leads back
    ends there.
    """
    return without_repeats(path for path in map(Path, _expand(pattern)) if path.is_file())


def without_repeats(paths: Iterable[Path]) -> list[Path]:
    """Return paths in the order of their names, of several to one file the first."""
    first: dict[str, Path] = {}
    for path in sorted(paths):
        first.setdefault(os.path.realpath(path), path)
    return list(first.values())


def _expand(pattern: str) -> list[str]:
    parts = pattern.split(os.sep)
    if "**" not in parts:
        return glob.glob(pattern)
    place = parts.index("**")
    above, below = os.sep.join(parts[:place]), os.sep.join(parts[place + 1 :]) or "*"
    roots = glob.glob(f"{above}{os.sep}") if place else [f".{os.sep}"]
    return [
        path
        for folder in _folders(roots)
        for path in _expand(os.path.join(glob.escape(folder), below))
    ]


def _folders(roots: Iterable[str]) -> Iterator[str]:
    """Return the folders at and below others that are not hidden, each once."""
    seen = set()
    waiting = sorted(roots, reverse=True)
    while waiting:
        folder = waiting.pop()
        real = os.path.realpath(folder)
        if real in seen or not os.path.isdir(folder):
            continue
        seen.add(real)
        yield folder
        waiting += [entry.path for entry in reversed(_entries(folder)) if entry.is_dir()]


def _entries(folder: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            found = [entry for entry in entries if not entry.name.startswith(".")]
    except PermissionError:
        return []
    return sorted(found, key=lambda entry: entry.name)
