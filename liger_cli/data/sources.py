"""Where rows come from: files, folders, globs, saved datasets, the hub, and the sample.

A source gives its records in one order, so that a number of records says how far a run has read.
"""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from liger_cli.common.readers import check_regular_files, expand_path, path_exists, read_json
from liger_cli.data.files import READERS, read_file, table_rows
from liger_cli.data.layouts import refuse_ending
from liger_cli.data.places import files_below, matching_files
from liger_cli.data.rows import Record
from liger_cli.data.samples import SAMPLE_LICENCE, SAMPLE_NAME, find_sample, read_sample
from liger_cli.errors import ConfigError, DataError
from liger_kernels.nearest import nearest_name

__all__ = ["SYNTHETIC_NAME", "Source", "Split", "find_source", "find_sources", "split_names"]

SYNTHETIC_NAME = "synthetic"
Split = Literal["train", "eval"]

_EVAL_SPLITS = ("validation", "test", "eval", "dev")
_TABLE_ROWS = 1000


@dataclass(frozen=True)
class Source:
    """Records in a fixed order.

    Args:
        name: As it was given.
        records: Returns all of them from the first one on.
        files: What they are read from; a hash of their content identifies the records.
        folder: Where relative paths in the records start.
        split: Which part of the files it is, where they hold several.
    """

    name: str
    records: Callable[[], Iterator[Record]]
    files: tuple[Path, ...]
    folder: Path | None = None
    licence: str | None = None
    split: str = ""

    def read(self, start: int = 0) -> Iterator[Record]:
        """Yield the records from number `start` on.

        Raises:
            DataError: A file cannot be read; names it and the line.
        """
        return islice(self.records(), start, None)

    @property
    def num_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.files)

    @property
    def places(self) -> list[str]:
        """Where the records are, whatever it is called: the real paths of its files."""
        return [os.path.realpath(path) for path in self.files] or [self.name]

    def fingerprint(self) -> str:
        """Return a hash of the content; a file under another name has the same."""
        digest = hashlib.sha256()
        for path in self.files:
            with path.open("rb") as stream:
                digest.update(path.suffix.encode() + hashlib.file_digest(stream, "sha256").digest())
        return digest.hexdigest()


def split_names(text: str) -> list[tuple[str, float | None]]:
    """Return the datasets that a value of `dataset` names, each with its weight if it has one.

    Several are written NAME:WEIGHT,NAME,...; the path of one that exists is taken as it is.
    """
    if path_exists(text):
        return [(text, None)]
    found: list[tuple[str, float | None]] = []
    for part in text.split(","):
        name, colon, tail = part.strip().rpartition(":")
        try:
            weight = float(tail) if colon else None
        except ValueError:
            weight = None
        found.append((part.strip(), None) if weight is None else (name, weight))
    for name, weight in found:
        if not name or (weight is not None and not 0 < weight < float("inf")):
            raise ConfigError(
                f"{text!r}: each of several is NAME or NAME:WEIGHT, with a weight above 0"
            )
    return found


def find_sources(
    text: str, split: Split = "train", *, streaming: bool = False
) -> list[tuple[str, Source | None, float | None]]:
    """Return the name, source and weight of each dataset that a value names; synthetic has none.

    Raises:
        ConfigError: Two of them have a file in common, whose rows would be used twice.
        LigerError: As split_names and find_source.
    """
    found: list[tuple[str, Source | None, float | None]] = []
    owners: dict[str, str] = {}
    for name, weight in split_names(text):
        source = None if name == SYNTHETIC_NAME else find_source(name, split, streaming=streaming)
        found.append((name, source, weight))
        for place in source.places if source else ():
            if place in owners:
                raise ConfigError(
                    f"{text!r} names {place} twice, in {owners[place]} and in {name}",
                    hint=f"{name}:2,OTHER uses the rows of a dataset more often than those of "
                    "another",
                )
            owners[place] = name
    return found


def find_source(name: str, split: Split = "train", *, streaming: bool = False) -> Source:
    """Return the source of that name.

    Args:
        name: chitchat, a file, a folder, a glob, a folder of datasets.save_to_disk, or a dataset of
            the hub, which is organisation/name or organisation/name:configuration.
        split: Of the sample, of saved datasets and of the hub's; a file is the same for both.
        streaming: A hub dataset is read as it arrives and not stored.

    Raises:
        ConfigError: The name is none of these.
        DataError: There is no file, or one of a kind that is not read.
        EnvironmentProblem: The sample's package is missing, or the hub is out of reach.
    """
    if name == SAMPLE_NAME:
        files = (find_sample(),)
        return Source(name, lambda: read_sample(split), files, licence=SAMPLE_LICENCE, split=split)
    path = expand_path(name, "dataset", DataError)
    if path.is_dir() and (path / "dataset_dict.json").is_file():
        return _saved(name, path / _choose_split(_split_folders(path), split, name))
    if path.is_dir() and (path / "state.json").is_file():
        return _saved(name, path)
    if path.is_dir() and path.suffix not in READERS:
        return _files(name, _inside(path), path)
    if not path.exists() and glob.has_magic(name):
        matches = matching_files(str(path))
        if not matches:
            raise DataError(f"no file matches {name}")
        return _files(name, matches, matches[0].parent)
    if path.suffix in READERS or path.is_file():
        return _files(name, [path], path.parent)
    if _is_hub_name(name):
        return _from_hub(name, split, streaming)
    if path.suffix or name[:1] in "./~":
        raise DataError(f"there is no data file {path}" + _readable(path))
    known = (SAMPLE_NAME, SYNTHETIC_NAME)
    nearest = nearest_name(name.lower(), known, cutoff=0.5)
    raise ConfigError(
        f"{name!r} is neither one of {', '.join(known)} nor a file, folder or glob"
        + (f"; did you mean {nearest}?" if nearest else ""),
        hint="a dataset of the hub is written organisation/name",
    )


def _readable(path: Path) -> str:
    return "" if path.suffix in READERS else f"; files end in {', '.join(READERS)}"


def _inside(folder: Path) -> list[Path]:
    """Return the data files of a folder and those below it, in the order of their names."""
    files = files_below(folder)
    data = [path for path in files if path.suffix in READERS]
    if not data:
        found = ", ".join(sorted({path.suffix or path.name for path in files})) or "nothing"
        raise DataError(f"{folder} holds no data file: wanted {', '.join(READERS)}; found {found}")
    return data


def _files(name: str, paths: Sequence[Path], folder: Path) -> Source:
    for path in paths:
        if not path.exists():
            raise DataError(f"there is no data file {path}")
        if path.suffix not in READERS:
            raise refuse_ending(path, READERS)
        if not path.is_file():
            raise DataError(f"{path} cannot be read: it is no file")

    def records() -> Iterator[Record]:
        for path in paths:
            yield from read_file(path)

    return Source(name, records, tuple(paths), folder)


# Saved datasets and the hub.


def _split_folders(path: Path) -> list[str]:
    try:
        return list(map(str, read_json(path / "dataset_dict.json")["splits"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}/dataset_dict.json cannot be read: {error!r}") from error


def _choose_split(names: Sequence[str], split: Split, name: str) -> str:
    wanted = ("train",) if split == "train" else _EVAL_SPLITS
    found = next((one for one in wanted if one in names), None)
    if found is None:
        raise DataError(
            f"{name} has the splits {', '.join(names) or 'none'}; wanted {' or '.join(wanted)}"
        )
    return found


def _saved(name: str, path: Path) -> Source:
    import datasets

    check_regular_files(path)
    try:
        dataset = datasets.load_from_disk(str(path))
    # What is wrong in a folder of Arrow files comes from several libraries.
    except Exception as error:
        raise DataError(f"{path} cannot be read as a saved dataset: {error}") from error
    files = (*sorted(path.glob("*.arrow")), path / "state.json")
    return Source(name, lambda: _dataset_rows(path, dataset), files, path)


def _dataset_rows(name: object, dataset: Any) -> Iterator[Record]:
    # As Arrow the images stay what they are: bytes or a path.
    return table_rows(name, dataset.with_format("arrow").iter(_TABLE_ROWS))


def _is_hub_name(name: str) -> bool:
    repository = name.partition(":")[0]
    return repository.count("/") == 1 and name[0] not in "./~" and not repository.endswith("/")


def _from_hub(name: str, split: Split, streaming: bool) -> Source:
    from liger_cli.common.hub import fetch_dataset

    dataset = fetch_dataset(
        name, lambda names: _choose_split(names, split, name), streaming=streaming
    )
    files = () if streaming else tuple(Path(file["filename"]) for file in dataset.cache_files)
    return Source(name, lambda: _dataset_rows(name, dataset), files)
