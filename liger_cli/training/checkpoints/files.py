"""Checkpoints as directories: written in one step, known to be whole or damaged, kept or deleted.

A directory is written beside its place, brought to the disk and renamed, so that one with its final
name is whole. What happens to its files later shows against manifest.json, which holds their sizes
and hashes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from liger_cli.common.failures import is_out_of_memory
from liger_cli.common.outputs import sync_path as _sync
from liger_cli.common.outputs import write_problem
from liger_cli.common.readers import read_json
from liger_cli.errors import DataError, EnvironmentProblem

__all__ = [
    "BEST",
    "MANIFEST",
    "checkpoint_path",
    "delete_old",
    "file_entries",
    "find_checkpoints",
    "find_damage",
    "glob_names",
    "mark_best",
    "newest_whole",
    "read_manifest",
    "step_of",
    "unfinished_path",
    "write_failure",
    "write_manifest",
    "written_aside",
]

MANIFEST = "manifest.json"
# A link in the directory of a run to the checkpoint of its best evaluation.
BEST = "best"

_TYPES = {
    "step": int,
    "is_evaluated": bool,
    "num_processes": int,
    "device": str,
    "data": dict,
    "config": dict,
    "files": dict,
}

_NAME = re.compile(r"checkpoint-(\d+)")
# Errors of reading and writing files: torch and safetensors add theirs to OSError.
WRITE_ERRORS = (OSError, RuntimeError, SafetensorError)


def checkpoint_path(run_dir: Path, step: int) -> Path:
    """Return where the checkpoint of a step is, or would be."""
    return run_dir / f"checkpoint-{step}"


def find_checkpoints(run_dir: Path) -> list[Path]:
    """Return the checkpoints of a run, whole or damaged, the oldest first."""
    paths = run_dir.iterdir() if run_dir.is_dir() else ()
    return sorted((path for path in paths if step_of(path) and path.is_dir()), key=step_of)


def step_of(path: Path) -> int:
    """Return the step in a checkpoint's name; 0 for another name."""
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match else 0


def newest_whole(checkpoints: Sequence[Path], notify: Callable[[str], None]) -> Path | None:
    """Return the newest checkpoint that is whole, or None where there are none at all.

    Args:
        checkpoints: The oldest first.
        notify: Gets a line about each newer one that is damaged, and the one used in its place.

    Raises:
        DataError: There are checkpoints, and none is whole.
    """
    damaged: list[str] = []
    for path in reversed(checkpoints):
        if (damage := find_damage(path)) is None:
            for text in damaged:
                notify(f"{text}; resuming from {path.name} instead")
            return path
        damaged.append(f"{path} is damaged: {damage}")
    if damaged:
        raise DataError(
            "no checkpoint is whole: " + "; ".join(damaged),
            hint="Without --resume, in another --output-dir, the run starts from the beginning.",
        )
    return None


def find_damage(checkpoint: Path, *, reads_files: bool = True) -> str | None:
    """Return a description of the damage to a checkpoint, or None where it is whole.

    Args:
        reads_files: False looks at sizes only.
    """
    try:
        files = read_manifest(checkpoint)["files"]
        for name, entry in files.items():
            if Path(name).is_absolute() or ".." in Path(name).parts:
                return f"{MANIFEST} names {name}, which is outside the checkpoint"
            found = (checkpoint / name).stat().st_size
            # To read a pipe or a device might never end.
            if not (checkpoint / name).is_file():
                return f"{MANIFEST} names {name}, which is no regular file"
            if found != entry["bytes"]:
                return f"{name} has {found} bytes, not {entry['bytes']}"
        if reads_files:
            hashes = _hashes(checkpoint, list(files))
            for name, entry in files.items():
                if hashes[name] != entry["sha256"]:
                    return f"{name} has changed since it was written"
    except FileNotFoundError as error:
        return f"{os.path.relpath(error.filename, checkpoint)} is missing"
    except OSError as error:
        return f"it cannot be read: {error}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} has changed since it was written"
    return None


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """Return the values of a manifest, with the sizes and hashes of the files.

    Raises:
        OSError: There is none.
        ValueError: It is not what was written.
    """
    values = read_json(checkpoint / MANIFEST)
    # The hash finds accidents; a manifest made by hand meets the types.
    is_whole = isinstance(values, dict) and values.pop("sha256", None) == _hash_of(values)
    if not is_whole or not all(isinstance(values.get(key), kind) for key, kind in _TYPES.items()):
        raise ValueError(f"{checkpoint / MANIFEST} has changed since it was written")
    return values


def write_manifest(
    directory: Path, values: dict[str, Any], known: Mapping[str, Any] | None = None
) -> None:
    """Write values that can be read without loading anything, and what the files are known by.

    Args:
        known: The entries of files that need not be read again, by name.
    """
    known = known or {}
    names = [name for name in glob_names(directory, "**/*") if name not in known]
    files = dict(sorted({**known, **file_entries(directory, names)}.items()))
    content = {**values, "files": files}
    text = json.dumps({**content, "sha256": _hash_of(content)}, indent=1)
    (directory / MANIFEST).write_text(text, encoding="utf-8")


def glob_names(directory: Path, pattern: str) -> list[str]:
    """Return the names of the files of a pattern, from the directory on."""
    paths = directory.glob(pattern)
    return sorted(str(path.relative_to(directory)) for path in paths if path.is_file())


def file_entries(directory: Path, names: Sequence[str]) -> dict[str, Any]:
    """Return the size and the hash of each file, by name."""
    hashes = _hashes(directory, names)
    return {
        name: {"bytes": (directory / name).stat().st_size, "sha256": hashes[name]} for name in names
    }


def _hash_of(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _hashes(directory: Path, names: Sequence[str]) -> dict[str, str]:
    # Hashing lets other threads run; a large model has many files.
    with ThreadPoolExecutor(max_workers=4) as threads:
        hashes = threads.map(_hash, [directory / name for name in names])
        return dict(zip(names, hashes, strict=True))


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def unfinished_path(target: Path) -> Path:
    """Return where a directory is written before it becomes `target`."""
    return target.with_name(f".{target.name}.unfinished")


@contextlib.contextmanager
def written_aside(target: Path) -> Iterator[Path]:
    """Yield a directory to write into; it becomes `target` at the end, or nothing after an error.

    A process that is killed meanwhile leaves a hidden directory beside the target, which the next
    call for the same target removes.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = unfinished_path(target)
    replaced = target.with_name(f".{target.name}.replaced")
    for leftover in (unfinished, replaced):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        unfinished.mkdir()
        yield unfinished
        for path in (*unfinished.rglob("*"), unfinished):
            _sync(path)
        if target.exists():
            target.rename(replaced)
        unfinished.rename(target)
        _sync(target.parent)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    shutil.rmtree(replaced, ignore_errors=True)


def write_failure(error: Exception, target: Path, hint: str | None = None) -> EnvironmentProblem:
    """Return the error of a directory that cannot be written, most often for want of space.

    Raises:
        Exception: The error itself, where it is of another kind.
    """
    if not isinstance(error, WRITE_ERRORS) or is_out_of_memory(error):
        raise error
    return write_problem(target, error, hint)


def delete_old(
    run_dir: Path,
    step: int,
    limit: int,
    notify: Callable[[str], None],
    *,
    best: int | None = None,
) -> None:
    """Delete checkpoints before `step`, which is whole, until `limit` are left.

    That of `best` is not deleted; damaged ones are the first to go. Later ones are left of a run
    that was resumed from before them: they are not this run's.

    Args:
        notify: Gets a line about one that cannot be deleted.
    """
    older = [path for path in find_checkpoints(run_dir) if step_of(path) < step]
    others = [path for path in older if step_of(path) != best]
    others.sort(key=lambda path: (find_damage(path, reads_files=False) is None, step_of(path)))
    num_kept = max(limit - 1 - (len(older) - len(others)), 0)
    for path in others[: len(others) - num_kept]:
        # Renamed first: half of a checkpoint must not have the name of one.
        doomed = path.with_name(f".{path.name}.replaced")
        try:
            path.rename(doomed)
            shutil.rmtree(doomed)
        except OSError as error:
            notify(f"the old {path} cannot be deleted: {error}")


def mark_best(run_dir: Path, step: int | None, notify: Callable[[str], None]) -> None:
    """Point the link `best` to the checkpoint of a step, or remove it where there is none.

    Args:
        notify: Gets a line where the file system has no links.
    """
    link, new = run_dir / BEST, run_dir / f".{BEST}.unfinished"
    target = None if step is None else checkpoint_path(run_dir, step)
    try:
        if target is None or not target.is_dir():
            link.unlink(missing_ok=True)
        elif not link.is_symlink() or os.readlink(link) != target.name:
            new.unlink(missing_ok=True)
            new.symlink_to(target.name, target_is_directory=True)
            new.replace(link)
    except OSError as error:
        notify(f"the link {link} to the best checkpoint cannot be made: {error}")
