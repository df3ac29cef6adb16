"""Where rows come from: files, folders, globs, saved datasets, the hub, and the sample.

A source gives its records in one order, so that a number of records says how far a run has read.
"""

from __future__ import annotations

import csv
import glob
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from liger_cli.data.rows import Record
from liger_cli.data.samples import SAMPLE_LICENCE, SAMPLE_NAME, find_sample, read_sample
from liger_cli.errors import ConfigError, DataError
from liger_kernels.nearest import nearest_name

__all__ = ["SYNTHETIC_NAME", "Source", "Split", "find_source", "split_names"]

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
        files: What they are read from; their content stands for the records'.
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
        """Yields the records from number `start` on.

        Raises:
            DataError: A file cannot be read; names it and the line.
        """
        return islice(self.records(), start, None)

    @property
    def num_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.files)

    def fingerprint(self) -> str:
        """Returns a hash of the content; a file under another name has the same."""
        digest = hashlib.sha256()
        for path in self.files:
            with path.open("rb") as stream:
                digest.update(path.suffix.encode() + hashlib.file_digest(stream, "sha256").digest())
        return digest.hexdigest()


def split_names(text: str) -> list[tuple[str, float | None]]:
    """Returns the datasets that a value of `dataset` names, each with its weight if it has one.

    Several are written NAME:WEIGHT,NAME,...; the path of one that exists is taken as it is.
    """
    if Path(text).expanduser().exists():
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
                f"dataset {text!r}: each of several is NAME or NAME:WEIGHT, with a weight above 0"
            )
    return found


def find_source(name: str, split: Split = "train", *, streaming: bool = False) -> Source:
    """Returns the source of that name.

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
    path = Path(name).expanduser()
    if path.is_dir() and (path / "dataset_dict.json").is_file():
        return _saved(name, path / _choose_split(_split_folders(path), split, name))
    if path.is_dir() and (path / "state.json").is_file():
        return _saved(name, path)
    if path.is_dir() and path.suffix not in _READERS:
        return _files(name, _inside(path), path)
    if not path.exists() and glob.has_magic(name):
        matches = sorted(Path(match) for match in glob.glob(str(path), recursive=True))
        matches = [match for match in matches if match.is_file()]
        if not matches:
            raise DataError(f"no file matches {name}")
        return _files(name, matches, matches[0].parent)
    if path.suffix in _READERS or path.is_file():
        return _files(name, [path], path.parent)
    if _is_hub_name(name):
        return _from_hub(name, split, streaming)
    if path.suffix or name[:1] in "./~":
        raise DataError(f"there is no data file {path}" + _readable(path))
    known = (SAMPLE_NAME, SYNTHETIC_NAME)
    nearest = nearest_name(name.lower(), known, cutoff=0.5)
    raise ConfigError(
        f"dataset {name!r} is neither one of {', '.join(known)} nor a file, folder or glob"
        + (f"; did you mean {nearest}?" if nearest else ""),
        hint="a dataset of the hub is written organisation/name",
    )


def _readable(path: Path) -> str:
    return "" if path.suffix in _READERS else f"; files end in {', '.join(_READERS)}"


def _inside(folder: Path) -> list[Path]:
    """The data files of a folder and those below it, in the order of their names."""
    files = [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    data = [path for path in files if path.suffix in _READERS]
    if not data:
        found = ", ".join(sorted({path.suffix or path.name for path in files})) or "nothing"
        raise DataError(f"{folder} holds no data file: wanted {', '.join(_READERS)}; found {found}")
    return data


def _files(name: str, paths: Sequence[Path], folder: Path) -> Source:
    for path in paths:
        if not path.exists():
            raise DataError(f"there is no data file {path}")
        if path.suffix not in _READERS:
            raise DataError(f"{path} is not a data file: wanted {', '.join(_READERS)}")
        if not path.is_file():
            raise DataError(f"{path} cannot be read: it is no file")

    def records() -> Iterator[Record]:
        for path in paths:
            try:
                yield from _READERS[path.suffix](path)
            except OSError as error:
                raise DataError(f"{path} cannot be read: {error.strerror or error}") from error

    return Source(name, records, tuple(paths), folder)


# Readers of files.


def _read_lines(path: Path) -> Iterator[Record]:
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if line.strip().removeprefix(b"\xef\xbb\xbf"):
                yield f"{path}:{number}", line


def _read_json(path: Path) -> Iterator[Record]:
    """A list, or an object a line."""
    with path.open("rb") as stream:
        is_list = stream.read(1024).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["
    if is_list:
        return _read_list(path, _decode(path.read_bytes(), path, 1))
    return _read_lines(path)


def _decode(content: bytes, path: Path, line: int) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line += content[: error.start].count(b"\n")
        raise DataError(f"{path}:{line}: not UTF-8: {error.reason}") from error


def _read_list(path: Path, text: str) -> Iterator[Record]:
    """Yields the items of a JSON list, each with the line it starts on."""
    decoder = json.JSONDecoder()
    line, seen = 1, 0

    def skip_space(position: int) -> int:
        nonlocal line, seen
        while position < len(text) and text[position] in " \t\r\n":
            position += 1
        line += text.count("\n", seen, position)
        seen = position
        return position

    def fail(message: str) -> DataError:
        return DataError(f"{path}:{line}: not JSON: {message}")

    position = skip_space(skip_space(0) + 1)
    is_open = text[position : position + 1] != "]"
    while is_open:
        try:
            item, end = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            line += text.count("\n", position, error.pos)
            raise fail(error.msg) from error
        except RecursionError as error:
            raise DataError(f"{path}:{line}: not usable JSON: nested too deep") from error
        yield f"{path}:{line}", item
        position = skip_space(end)
        is_open = text[position : position + 1] == ","
        if is_open:
            position = skip_space(position + 1)
        elif text[position : position + 1] != "]":
            raise fail("expected a comma or the end of the list")
    if skip_space(position + 1) != len(text):
        raise fail("text after the end of the list")


def _read_text(path: Path) -> Iterator[Record]:
    """Every line that is not blank is a row."""
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            text = _decode(line, path, number).strip("\r\n")
            if text.strip():
                yield f"{path}:{number}", {"text": text}


def _read_csv(path: Path) -> Iterator[Record]:
    # The limit of the module is 128 KiB a field, and a document is longer.
    csv.field_size_limit(2**31 - 1)
    with path.open(encoding="utf-8-sig", newline="") as stream:
        delimiter = "\t" if path.suffix == ".tsv" else ","
        reader = csv.reader(stream, delimiter=delimiter, strict=True)
        try:
            header = next(reader, [])
            for row in reader:
                where = f"{path}:{reader.line_num}"
                # A blank line is no row of one empty field.
                if row and len(row) != len(header):
                    raise DataError(
                        f"{where}: {len(row)} fields, but the header names {len(header)}"
                    )
                if row:
                    yield where, dict(zip(header, row, strict=True))
        except csv.Error as error:
            raise DataError(f"{path}:{reader.line_num}: not CSV: {error}") from error
        except UnicodeDecodeError as error:
            raise DataError(f"{path}:{reader.line_num + 1}: not UTF-8: {error.reason}") from error


def _read_parquet(path: Path) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            yield from _table_rows(path, file.iter_batches(_TABLE_ROWS))
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: not Parquet: {error}") from error


def _table_rows(name: object, batches: Iterable[Any]) -> Iterator[Record]:
    number = 0
    for batch in batches:
        for row in batch.to_pylist():
            number += 1
            # A struct has the keys of all rows, and those that a row has not are null.
            content = {key: _without_nulls(value) for key, value in row.items()}
            yield f"{name}:{number}", content


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


_READERS: dict[str, Callable[[Path], Iterator[Record]]] = {
    ".jsonl": _read_lines,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".txt": _read_text,
}

# Saved datasets and the hub.


def _split_folders(path: Path) -> list[str]:
    try:
        return list(json.loads((path / "dataset_dict.json").read_text("utf-8"))["splits"])
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

    try:
        dataset = datasets.load_from_disk(str(path))
    # What is wrong in a folder of Arrow files comes from several libraries.
    except Exception as error:
        raise DataError(f"{path} cannot be read as a saved dataset: {error}") from error
    files = (*sorted(path.glob("*.arrow")), path / "state.json")
    return Source(name, lambda: _dataset_rows(path, dataset), files, path)


def _dataset_rows(name: object, dataset: Any) -> Iterator[Record]:
    # As Arrow the images stay what they are: bytes or a path.
    return _table_rows(name, dataset.with_format("arrow").iter(_TABLE_ROWS))


def _is_hub_name(name: str) -> bool:
    repository = name.partition(":")[0]
    return repository.count("/") == 1 and name[0] not in "./~" and not repository.endswith("/")


def _from_hub(name: str, split: Split, streaming: bool) -> Source:
    from liger_cli.hub import fetch_dataset

    dataset = fetch_dataset(
        name, lambda names: _choose_split(names, split, name), streaming=streaming
    )
    files = () if streaming else tuple(Path(file["filename"]) for file in dataset.cache_files)
    return Source(name, lambda: _dataset_rows(name, dataset), files)
