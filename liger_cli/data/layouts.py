"""Files and records of a layout that is not read, refused with the way to read them."""

from __future__ import annotations

import csv
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from liger_cli.data.formats import FORMATS, find_format, find_shape
from liger_cli.errors import DataError

__all__ = [
    "decode",
    "layout_hint",
    "not_utf8",
    "other_delimiter",
    "refuse_ending",
    "refuse_other_bytes",
]

_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_SIGNATURES = {
    b"\x1f\x8b": ("gzip", "gunzip"),
    b"BZh": ("bzip2", "bunzip2"),
    b"\xfd7zXZ": ("xz", "unxz"),
    b"\x28\xb5\x2f\xfd": ("Zstandard", "unzstd"),
    b"PK\x03\x04": ("zip", "unzip"),
}
_ENDINGS = {
    ".gz": "gunzip",
    ".bz2": "bunzip2",
    ".xz": "unxz",
    ".zst": "unzstd",
    ".zip": "unzip",
    ".xlsx": "save it as CSV",
}
_DELIMITERS = {";": "';'", "\t": "tabs", "|": "'|'", ",": "commas"}
# Rows that are wrapped are looked for so many keys deep.
_MAX_DEPTH = 4


def decode(content: bytes, path: Path, line: int) -> str:
    """Return bytes as text.

    Args:
        line: The line of the file that the bytes begin on.

    Raises:
        DataError: They are not UTF-8; names the line of the first byte that is not.
    """
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # Its object and places are those behind a byte order mark.
        line += error.object[: error.start].count(b"\n")
        raise not_utf8(f"{path}:{line}", error) from error


def not_utf8(where: str, error: UnicodeDecodeError) -> DataError:
    """Return the error for bytes that are no UTF-8, with the command that converts them."""
    encoding = "UTF-16" if error.object.startswith(_UTF16) else "CP1252"
    return DataError(
        f"{where}: not UTF-8: {error.reason} 0x{error.object[error.start]:02x}",
        hint=f"the entry {{path: FILE, encoding: ENCODING}} of dataset reads it, or convert it: "
        f"iconv -f ENCODING -t UTF-8 OLD > NEW, where ENCODING is {encoding} "
        + ("" if encoding == "UTF-16" else "for most files written on Windows"),
    )


def refuse_other_bytes(path: Path, head: bytes, *, encoding: str | None = None) -> None:
    """Refuse the first bytes of a file of text that is compressed, a table or UTF-16.

    Args:
        encoding: That the user gave; such a text may hold zero bytes.

    Raises:
        DataError: Says how to convert it.
    """
    for signature, (name, program) in _SIGNATURES.items():
        if head.startswith(signature):
            raise DataError(f"{path} is compressed by {name}", hint=f"unpack it first: {program}")
    if head.startswith(b"PAR1"):
        raise DataError(f"{path} is a Parquet file", hint="name it .parquet")
    if encoding is None and (head.startswith(_UTF16) or b"\0" in head):
        raise DataError(
            f"{path} is not UTF-8 but UTF-16 or no text: it holds zero bytes",
            hint="the entry {path: FILE, encoding: utf-16} of dataset reads it, or convert it: "
            "iconv -f UTF-16 -t UTF-8 OLD > NEW",
        )


def refuse_ending(path: Path, endings: Collection[str]) -> DataError:
    """Return the error for a file that exists and whose ending is not read."""
    way = _ENDINGS.get(path.suffix.lower())
    lower = path.suffix.lower()
    hint = f"unpack it first: {way}" if way else None
    if path.suffix != lower and lower in endings:
        hint = f"endings are lower case: name it {path.with_suffix(lower).name}"
    return DataError(f"{path} is not a data file: wanted {', '.join(endings)}", hint=hint)


def other_delimiter(path: Path, header: Sequence[str], delimiter: str) -> None:
    """Refuse a header that makes a format with another delimiter than that of the file's ending.

    Raises:
        DataError: Names the delimiter, and the command that converts the file.
    """
    if find_format(header) is not None:
        return
    line = delimiter.join(header)
    for other, name in _DELIMITERS.items():
        if other != delimiter and find_format(_split(line, other)) is not None:
            way = (
                f"name it {path.with_suffix('.tsv' if other == chr(9) else '.csv').name}"
                if other in "\t,"
                else f"the entry {{path: {path.name}, delimiter: '{other}'}} of dataset reads it, "
                'or convert it: python -c "import csv, sys; csv.writer(sys.stdout).writerows('
                f"csv.reader(sys.stdin, delimiter='{other}'))\" < OLD > NEW"
            )
            raise DataError(
                f"{path}:1: the columns are separated by {name}, and {path.suffix} files by "
                f"{_DELIMITERS[delimiter]}",
                hint=way,
            )


def _split(line: str, delimiter: str) -> list[str]:
    return [name.strip() for name in next(csv.reader([line], delimiter=delimiter), [])]


def layout_hint(content: Mapping[str, Any], needed: Sequence[str] = ()) -> str | None:
    """Return how to make rows of an object that holds all of them, or None: it does not.

    Args:
        needed: Columns that it has and that make a format, where FORMATS has none.
    """
    form = find_format(content)
    if form is not None or needed:
        columns = [content[name] for name in needed or FORMATS[form or ""]]
        # A list of messages has objects, and a column of such lists has lists.
        inner = list if form in ("messages", "conversations") else str
        if all(isinstance(c, list) and c and all(isinstance(v, inner) for v in c) for c in columns):
            return _way(
                "each column is one list",
                "[dict(zip(d, row)) for row in zip(*d.values())]",
            )
        if all(isinstance(c, dict) and "0" in c for c in columns):
            return _way(
                "each column is one object",
                "[{k: v[i] for k, v in d.items()} for i in next(iter(d.values()))]",
            )
        return None
    if find_shape(content):
        return None
    if content and all(isinstance(row, dict) and find_format(row) for row in content.values()):
        return _way("the rows are the values of an object", "list(d.values())")
    keys = next(_row_lists(content), None)
    if keys is not None:
        place = "".join(f"[{json.dumps(key)}]".replace('"', "'") for key in keys)
        name = ".".join(keys)
        rows: Any = content
        for key in keys:
            rows = rows[key]
        if len(keys) == 1 and not (find_format(rows[0]) or find_shape(rows[0])):
            return (
                f"columns: {{messages: {name}}} reads the list as messages, whose fields "
                f"message_fields names; data_key: {name} in its entry reads it as rows"
            )
        what = f"the rows are the list under {name}; data_key: {name} in its entry reads them"
        return _way(what, f"d{place}")
    return None


def _row_lists(content: Mapping[str, Any], depth: int = 1) -> Iterator[list[str]]:
    """Return the keys that lead to lists of rows, the nearest first."""
    for key, value in content.items():
        if isinstance(value, list) and value and all(isinstance(row, dict) for row in value):
            yield [key]
    for key, value in content.items() if depth < _MAX_DEPTH else ():
        if isinstance(value, dict):
            yield from ([key, *rest] for rest in _row_lists(value, depth + 1))


def _way(what: str, rows: str) -> str:
    return (
        f"{what}; a file that is a list of rows is made by: "
        f'python -c "import json, sys; d = json.load(sys.stdin); '
        f'json.dump({rows}, sys.stdout)" < OLD.json > NEW.json'
    )
