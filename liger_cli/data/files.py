"""Readers of data files: each file as records in its order, with the line of each.

A file of another layout (rows under a key, columns, another delimiter or encoding, compressed) is
refused with the option that reads it, or the command that converts it.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from liger_cli.common.readers import JsonError, parse_json, parse_json_at
from liger_cli.data.layouts import (
    decode,
    other_delimiter,
    refuse_other_bytes,
)
from liger_cli.data.rows import Record
from liger_cli.data.values import describe
from liger_cli.errors import DataError

__all__ = ["AS_NAMED", "READERS", "FileOptions", "read_file", "table_rows"]

_TABLE_ROWS = 1000
_BOM = b"\xef\xbb\xbf"
# A tokenizer takes some 100 bytes of memory for each byte of a text.
_MAX_TEXT = 256 * 1024 * 1024
# The endings of files that each option is for.
_KINDS = {
    "delimiter": (".csv", ".tsv"),
    "encoding": (".jsonl", ".json", ".csv", ".tsv", ".txt"),
    "data_key": (".json",),
}
# Bytes that are not UTF-8, as the error handler surrogateescape keeps them.
_ESCAPED = re.compile("[\udc80-\udcff]")


@dataclass(frozen=True)
class FileOptions:
    """How files are read that are not as their ending says.

    Args:
        delimiter: Between the fields of a CSV or TSV file.
        encoding: Of text, as Python names it; None is UTF-8.
        data_key: Where the rows of a JSON file are: a key, or several joined by dots.
        whole_text: A .txt file is one row, and not a row a line.
    """

    delimiter: str | None = None
    encoding: str | None = None
    data_key: str | None = None
    whole_text: bool = False

    @property
    def given(self) -> list[str]:
        """The names of the options that say something about one file."""
        return [name for name in _KINDS if getattr(self, name) is not None]

    def check(self, path: Path) -> None:
        """Raise a DataError for an option that says nothing about a file of this kind."""
        for name in self.given:
            endings = _KINDS[name]
            if path.suffix not in endings:
                raise DataError(f"{name} is for {', '.join(endings)}, and {path} is none of them")


# As their endings say.
AS_NAMED = FileOptions()


def read_file(path: Path, options: FileOptions = AS_NAMED) -> Iterator[Record]:
    """Yield the records of a file whose ending is one of READERS.

    Raises:
        DataError: It cannot be read; names the file and the line.
    """
    options.check(path)
    try:
        if path.suffix != ".parquet":
            with path.open("rb") as stream:
                refuse_other_bytes(path, stream.read(4096), encoding=options.encoding)
        yield from READERS[path.suffix](path, options)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error


def _open(path: Path, options: FileOptions) -> BinaryIO:
    """Open a file of text as UTF-8."""
    if options.encoding in (None, "utf-8", "utf-8-sig"):
        return path.open("rb")
    content = path.read_bytes()
    try:
        return io.BytesIO(content.decode(options.encoding).encode())
    except UnicodeDecodeError as error:
        line = content[: error.start].decode(options.encoding, "ignore").count("\n") + 1
        raise DataError(f"{path}:{line}: not {options.encoding}: {error.reason}") from error


def _read_lines(path: Path, options: FileOptions) -> Iterator[Record]:
    with _open(path, options) as stream:
        for number, line in enumerate(stream, start=1):
            if line.strip().removeprefix(_BOM):
                yield f"{path}:{number}", line


def _read_json(path: Path, options: FileOptions) -> Iterator[Record]:
    """Read a list, an object a line, one object over several lines, or the list under a key."""
    with _open(path, options) as stream:
        if options.data_key is not None:
            return _read_key(path, decode(stream.read(), path, 1), options.data_key)
        is_list = stream.read(1024).removeprefix(_BOM).lstrip()[:1] == b"["
        stream.seek(0)
        first = next((line for line in stream if line.strip().removeprefix(_BOM)), b"")
        stream.seek(0)
        if is_list:
            return _read_list(path, decode(stream.read(), path, 1))
        if first.strip().removeprefix(_BOM) == b"{":
            return iter([(f"{path}:1", stream.read())])
    return _read_lines(path, options)


def _read_key(path: Path, text: str, data_key: str) -> Iterator[Record]:
    """Return the items of the list under a key, or under several joined by dots."""
    try:
        value = parse_json(text, str(path))
    except JsonError as error:
        raise DataError(str(error)) from error
    # A key may have a dot in it.
    keys = [data_key] if isinstance(value, dict) and data_key in value else data_key.split(".")
    for key in keys:
        if not isinstance(value, dict) or key not in value:
            found = ", ".join(value) if isinstance(value, dict) else describe(value)
            raise DataError(f"{path}: data_key {data_key}: there is no {key!r}; found {found}")
        value = value[key]
    if not isinstance(value, list):
        raise DataError(f"{path}: data_key {data_key} is {describe(value)}; wanted a list of rows")
    return iter([(f"{path}:{data_key}[{i}]", item) for i, item in enumerate(value)])


def _read_list(path: Path, text: str) -> Iterator[Record]:
    """Yield the items of a JSON list, each with the line it starts on."""
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
            item, end = parse_json_at(text, position, str(path))
        except JsonError as error:
            raise DataError(str(error)) from error
        yield f"{path}:{line}", item
        position = skip_space(end)
        is_open = text[position : position + 1] == ","
        if is_open:
            position = skip_space(position + 1)
        elif text[position : position + 1] != "]":
            raise fail("expected a comma or the end of the list")
    if skip_space(position + 1) != len(text):
        raise fail("text after the end of the list")


def _read_text(path: Path, options: FileOptions) -> Iterator[Record]:
    """Yield every line that is not blank as a row, or all of the file as one."""
    with _open(path, options) as stream:
        if options.whole_text:
            if path.stat().st_size > _MAX_TEXT:
                raise DataError(
                    f"{path} has more than {_MAX_TEXT >> 20} MB, which text_mode stream would "
                    "tokenise at once; split it into files of a folder"
                )
            text = decode(stream.read(), path, 1)
            if text.strip():
                yield f"{path}:1", {"text": text}
            return
        for number, line in enumerate(stream, start=1):
            text = decode(line, path, number).strip("\r\n")
            if text.strip():
                yield f"{path}:{number}", {"text": text}


def _read_csv(path: Path, options: FileOptions) -> Iterator[Record]:
    # The limit of the module is 128 KiB a field, and a document is longer.
    csv.field_size_limit(2**31 - 1)
    usual = "\t" if path.suffix == ".tsv" else ","
    delimiter = "\t" if options.delimiter == "tab" else options.delimiter or usual
    with io.TextIOWrapper(
        _open(path, options), encoding="utf-8-sig", errors="surrogateescape", newline=""
    ) as stream:
        reader = csv.reader(_checked_lines(stream, path), delimiter=delimiter, strict=True)
        start = 1
        try:
            header = next(reader, [])
            if options.delimiter is None:
                other_delimiter(path, header, delimiter)
            start = reader.line_num + 1
            for row in reader:
                # A field may have several lines: a row stands where it begins.
                where, start = f"{path}:{start}", reader.line_num + 1
                # A blank line is no row of one empty field.
                if row and len(row) != len(header):
                    raise DataError(
                        f"{where}: {len(row)} fields, but the header names {len(header)}"
                    )
                if row:
                    yield where, dict(zip(header, row, strict=True))
        except csv.Error as error:
            since = f" in the row that begins on line {start}" if start < reader.line_num else ""
            raise DataError(f"{path}:{reader.line_num}: not CSV: {error}{since}") from error


def _checked_lines(stream: Iterable[str], path: Path) -> Iterator[str]:
    for number, line in enumerate(stream, start=1):
        if not line.isascii() and _ESCAPED.search(line):
            decode(line.encode("utf-8", "surrogateescape"), path, number)
        yield line


def _read_parquet(path: Path, options: FileOptions) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            yield from table_rows(path, file.iter_batches(_TABLE_ROWS))
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: not Parquet: {error}") from error


def table_rows(name: object, batches: Iterable[Any]) -> Iterator[Record]:
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


READERS: dict[str, Callable[[Path, FileOptions], Iterator[Record]]] = {
    ".jsonl": _read_lines,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".txt": _read_text,
}
