"""Where rows come from: files, folders, globs, saved datasets, the hub, and the sample.

A source gives its records in one order, so that a number of records says how far a run has read.
"""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from liger_cli.common.readers import check_regular_files, expand_path, read_json
from liger_cli.config.datasets import DatasetEntry, datasets_name, read_datasets, split_names
from liger_cli.data.factory import INFO_FILE, translate_entry
from liger_cli.data.files import AS_NAMED, READERS, FileOptions, read_file, table_rows
from liger_cli.data.layouts import refuse_ending
from liger_cli.data.places import files_below, matching_files
from liger_cli.data.rows import Record
from liger_cli.data.samples import (
    SAMPLE_CLASSES,
    SAMPLE_LICENCE,
    SAMPLE_NAME,
    SAMPLE_PAIRS,
    code_files,
    find_sample,
    read_sample,
    read_sample_classes,
    read_sample_pairs,
)
from liger_cli.data.threads import conversations_of
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
        note: What a run says of it.
    """

    name: str
    records: Callable[[], Iterator[Record]]
    files: tuple[Path, ...]
    folder: Path | None = None
    licence: str | None = None
    split: str = ""
    note: str = ""

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


def find_sources(
    datasets: str | Sequence[DatasetEntry],
    split: Split = "train",
    *,
    streaming: bool = False,
    as_stream: bool = False,
    pairs: bool = False,
    classes: bool = False,
) -> list[tuple[DatasetEntry, Source | None]]:
    """Return the source of each dataset; synthetic has none.

    Args:
        datasets: Text, as split_names reads it, or entries.
        as_stream: A .txt file is one text, and not a row a line.
        pairs: The sample is of pairs.
        classes: The sample is of texts with a label.

    Raises:
        ConfigError: Two of them have a file in common, whose rows would be used twice.
        LigerError: As split_names and find_source.
    """
    entries = read_datasets(datasets) if isinstance(datasets, str) else datasets
    found: list[tuple[DatasetEntry, Source | None]] = []
    owners: dict[str, str] = {}
    for given in entries:
        entry, source = translate_entry(given), None
        if entry.path != SYNTHETIC_NAME:
            source = _from_entry(entry, split, streaming=streaming, as_stream=as_stream)
            source = _sample_of(source, entry, split, pairs=pairs, classes=classes)
        elif idle := [key for key, value in vars(entry).items() if value and key not in _ANY]:
            raise ConfigError(f"{SYNTHETIC_NAME} data have no {idle[0]}")
        found.append((entry, source))
        for file in source.places if source else ():
            # Two lists of one file are different rows.
            place = f"{file} {entry.data_key}" if entry.data_key else file
            if place in owners:
                raise ConfigError(
                    f"{datasets_name(datasets)!r} names {place} twice, in {owners[place]} and in "
                    f"{entry.path}",
                    hint=f"{entry.path}:2,OTHER uses the rows of a dataset more often than those "
                    "of another",
                )
            owners[place] = entry.path
    return found


# What of an entry may be there for any dataset: names may come from all of them.
_ANY = ("path", "weight", "columns", "roles", "message_fields")


def _from_entry(entry: DatasetEntry, split: Split, *, streaming: bool, as_stream: bool) -> Source:
    """Return the source of an entry, of which max_samples rows are read."""
    options = FileOptions(entry.delimiter, entry.encoding, entry.data_key, whole_text=as_stream)
    source = find_source(entry.path, split, streaming=streaming, options=options, part=entry.split)

    def records() -> Iterator[Record]:
        found = source.records()
        # Columns that are named are read as they are.
        found = found if entry.columns else conversations_of(found)
        return islice(found, entry.max_samples)

    return replace(source, records=records)


def _sample_of(
    source: Source, entry: DatasetEntry, split: Split, *, pairs: bool, classes: bool
) -> Source:
    """Return a source as it is; the sample has pairs, or texts with labels, where these are asked.

    By itself it has neither rejected answers nor labels.
    """
    if entry.path != SAMPLE_NAME or not (pairs or classes):
        return source
    read = read_sample_pairs if pairs else read_sample_classes

    def records() -> Iterator[Record]:
        return islice(read(split), entry.max_samples)

    if pairs:
        return replace(source, records=records, note=SAMPLE_PAIRS)
    files = (*source.files, *code_files())
    return replace(source, records=records, note=SAMPLE_CLASSES, files=files)


def find_source(
    name: str,
    split: Split = "train",
    *,
    streaming: bool = False,
    options: FileOptions = AS_NAMED,
    part: str | None = None,
) -> Source:
    """Return the source of that name.

    Args:
        name: chitchat, a file, a folder, a glob, a folder of datasets.save_to_disk, or a dataset of
            the hub, which is organisation/name or organisation/name:configuration.
        split: Of the sample, of saved datasets and of the hub's; a file is the same for both.
        streaming: A hub dataset is read as it arrives and not stored.
        options: How files are read.
        part: The name of the split to read, where the data have several.

    Raises:
        ConfigError: The name is none of these, or an option says nothing about such data.
        DataError: There is no file, or one of a kind that is not read.
        EnvironmentProblem: The sample's package is missing, or the hub is out of reach.
    """
    path = expand_path(name, "dataset", DataError)
    is_sample = name == SAMPLE_NAME
    splits = path.is_dir() and (path / "dataset_dict.json").is_file()
    is_saved = splits or (path.is_dir() and (path / "state.json").is_file())
    is_files = not is_sample and not is_saved and _is_files(name, path)
    if (is_sample or is_files or (is_saved and not splits)) and part is not None:
        raise ConfigError(f"split {part}: {name} has no splits with names")
    if not is_files and (idle := options.given):
        raise ConfigError(f"{idle[0]} is for files, and {name} is none")
    if is_sample:
        files = (find_sample(),)
        return Source(name, lambda: read_sample(split), files, licence=SAMPLE_LICENCE, split=split)
    if is_saved:
        return _saved(name, path, _Choice(name, split, part) if splits else None)
    if is_files:
        return _of_files(name, path, options)
    if _is_hub_name(name):
        return _from_hub(name, _Choice(name, split, part), streaming)
    if path.suffix or name[:1] in "./~":
        raise DataError(f"there is no data file {path}" + _readable(path))
    known = (SAMPLE_NAME, SYNTHETIC_NAME)
    nearest = nearest_name(name.lower(), known, cutoff=0.5)
    raise ConfigError(
        f"{name!r} is neither one of {', '.join(known)} nor a file, folder or glob"
        + (f"; did you mean {nearest}?" if nearest else ""),
        hint="a dataset of the hub is written organisation/name",
    )


def _is_files(name: str, path: Path) -> bool:
    is_pattern = not path.exists() and glob.has_magic(name)
    return is_pattern or path.is_dir() or path.is_file() or path.suffix in READERS


def _of_files(name: str, path: Path, options: FileOptions) -> Source:
    if path.is_dir() and path.suffix not in READERS:
        return _files(name, _inside(path), path, options)
    if not path.exists() and glob.has_magic(name):
        matches = matching_files(str(path))
        if not matches:
            raise DataError(f"no file matches {name}")
        return _files(name, matches, matches[0].parent, options)
    return _files(name, [path], path.parent, options)


def _readable(path: Path) -> str:
    return "" if path.suffix in READERS else f"; files end in {', '.join(READERS)}"


def _inside(folder: Path) -> list[Path]:
    """Return the data files of a folder and those below it, in the order of their names."""
    files = files_below(folder)
    data = [path for path in files if path.suffix in READERS]
    if info := next((path for path in data if path.name == INFO_FILE), None):
        raise DataError(
            f"{folder} is a folder of LLaMA-Factory, whose datasets have a name each",
            hint=f"take one of those in {info}: {info}:NAME",
        )
    if not data:
        found = ", ".join(sorted({path.suffix or path.name for path in files})) or "nothing"
        raise DataError(f"{folder} holds no data file: wanted {', '.join(READERS)}; found {found}")
    return data


def _files(name: str, paths: Sequence[Path], folder: Path, options: FileOptions) -> Source:
    for path in paths:
        if not path.exists():
            raise DataError(f"there is no data file {path}")
        if path.suffix not in READERS:
            raise refuse_ending(path, READERS)
        if not path.is_file():
            raise DataError(f"{path} cannot be read: it is no file")
        options.check(path)

    def records() -> Iterator[Record]:
        for path in paths:
            yield from read_file(path, options)

    return Source(name, records, tuple(paths), folder)


# Saved datasets and the hub.


def _split_folders(path: Path) -> list[str]:
    try:
        return list(map(str, read_json(path / "dataset_dict.json")["splits"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}/dataset_dict.json cannot be read: {error!r}") from error


@dataclass(frozen=True)
class _Choice:
    """Which split of a dataset is read.

    Args:
        name: Of the dataset, for errors.
        part: The name of the split; by default it is the usual one of training or evaluation.
    """

    name: str
    split: Split
    part: str | None

    def of(self, names: Sequence[str]) -> str:
        """Return the name of the split.

        Raises:
            DataError: There is none of that name.
        """
        usual = ("train",) if self.split == "train" else _EVAL_SPLITS
        wanted = usual if self.part is None else (self.part,)
        found = next((one for one in wanted if one in names), None)
        if found is None:
            raise DataError(
                f"{self.name} has the splits {', '.join(names) or 'none'}; wanted "
                f"{' or '.join(wanted)}"
            )
        return found


def _saved(name: str, path: Path, choice: _Choice | None) -> Source:
    import datasets

    if choice is not None:
        path = path / choice.of(_split_folders(path))
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


def _from_hub(name: str, choice: _Choice, streaming: bool) -> Source:
    from liger_cli.common.hub import fetch_dataset

    dataset = fetch_dataset(name, choice.of, streaming=streaming)
    files = () if streaming else tuple(Path(file["filename"]) for file in dataset.cache_files)
    return Source(name, lambda: _dataset_rows(name, dataset), files)
