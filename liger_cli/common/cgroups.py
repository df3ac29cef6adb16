"""The memory limit of the control groups of this process, as containers and Slurm set it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

__all__ = ["GroupMemory", "group_memory"]

# More than any machine has: how version 1 writes that there is no limit.
_UNLIMITED = 1 << 60


class GroupMemory(NamedTuple):
    """Bytes that the processes of a control group may have, and how many are free."""

    limit: int
    free: int


class _Files(NamedTuple):
    """Names of the files of a version: the limit, what is used, and of that what is file cache."""

    limit: str
    used: str
    cache: str


_VERSION_2 = _Files("memory.max", "memory.current", "inactive_file")
_VERSION_1 = _Files("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def group_memory(root: Path = Path("/")) -> GroupMemory | None:
    """Return the tightest limit, and the least that is free; None where there is no limit.

    Args:
        root: Of the file system.
    """
    found = [memory for folder, files in _folders(root) if (memory := _read(folder, files))]
    if not found:
        return None
    return GroupMemory(min(one.limit for one in found), min(one.free for one in found))


def _folders(root: Path) -> Iterator[tuple[Path, _Files]]:
    """Yield the folders of the groups of this process, each with those above it."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    mount = root / "sys/fs/cgroup"
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top, files = (mount / "memory", _VERSION_1) if controllers else (mount, _VERSION_2)
        # Inside a container the path may be that of the host, of which the top alone is here.
        names = path.strip("/").split("/")
        for count in range(len(names), -1, -1):
            yield top.joinpath(*names[:count]), files


def _read(folder: Path, files: _Files) -> GroupMemory | None:
    try:
        limit = int((folder / files.limit).read_text(encoding="utf-8"))
        used = int((folder / files.used).read_text(encoding="utf-8"))
        cache = _cache(folder, files)
    except (OSError, ValueError):
        # There is no such file at the top, and `max` is no number.
        return None
    return None if limit >= _UNLIMITED else GroupMemory(limit, max(0, limit - used + cache))


def _cache(folder: Path, files: _Files) -> int:
    """Return the bytes of file cache that the kernel gives up when memory is asked for."""
    for line in (folder / "memory.stat").read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition(" ")
        if name == files.cache:
            return int(value)
    return 0
