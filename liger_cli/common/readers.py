"""Readers of files and names from elsewhere: bounded in size and depth, with the line of a mistake.

Everything that liger reads back (a run, a cache, a report, a model's configuration, an adapter, a
row of data) passes through here, so that no content can hang the program or end it otherwise than
by a message.
"""

from __future__ import annotations

import errno
import json
import os
import re
import stat
from pathlib import Path
from typing import Any

from liger_cli.common.text import shorten
from liger_cli.errors import ConfigError, LigerError

__all__ = [
    "MAX_BYTES",
    "JsonError",
    "check_regular_files",
    "expand_path",
    "parse_json",
    "parse_json_at",
    "path_exists",
    "read_file_bytes",
    "read_json",
]

MAX_BYTES = 256 * 2**20
MAX_DEPTH = 100
# A float has no more of them, and Python converts no text of more than a few thousand.
_MAX_DIGITS = 300

_OPENING = re.compile(r'"(?:[^"\\]|\\.)*"|([\[{])|[\]}]', re.DOTALL)


class JsonError(ValueError):
    """A text that is not JSON, or JSON that is larger than any that liger writes.

    Args:
        reason: In words, without the place.
        line: Counted from 1.
        source: The file; "" for a text by itself.
    """

    def __init__(self, reason: str, line: int = 1, source: str = "") -> None:
        super().__init__(f"{source}:{line}: {reason}" if source else f"{reason} (line {line})")
        self.reason = reason
        self.line = line
        self.source = source


class _LongNumber(ValueError):
    pass


def _parse_int(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise _LongNumber(digits)
    return int(digits)


_DECODER = json.JSONDecoder(parse_int=_parse_int)


def parse_json(content: str | bytes, source: str = "") -> Any:
    """Parse one JSON document.

    Args:
        content: Text, or UTF-8 with or without a byte order mark.
        source: Name of the file for errors.

    Raises:
        JsonError: It is not UTF-8 or not JSON, nested deeper than 100 levels, or has an integer of
            more than 300 digits; with the line.
    """
    try:
        text = content.decode("utf-8-sig") if isinstance(content, bytes) else content
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise JsonError(f"not UTF-8: {error.reason}", line, source) from None
    value, end = parse_json_at(text, len(text) - len(text.lstrip(" \t\r\n")), source)
    if rest := text[end:].strip(" \t\r\n"):
        raise JsonError("not JSON: extra data", _line(text, text.index(rest, end)), source)
    return value


def parse_json_at(text: str, start: int, source: str = "") -> tuple[Any, int]:
    """Parse the JSON value that starts at an index; return it and the index where it ends.

    Raises:
        JsonError: As parse_json.
    """
    try:
        value, end = _DECODER.raw_decode(text, start)
    except json.JSONDecodeError as error:
        reason = f"not JSON: {error.msg} (column {error.colno})"
        raise JsonError(reason, _line(text, error.pos), source) from None
    except _LongNumber as error:
        digits = str(error)
        line = _line(text, text.index(digits, start))
        raise JsonError(
            f"not usable JSON: a number of {len(digits)} digits", line, source
        ) from None
    except RecursionError:
        raise _too_deep(text, start, source) from None
    # A value of few brackets is not deep, whatever is in it.
    if text.count("[", start, end) + text.count("{", start, end) > MAX_DEPTH and _is_deep(value):
        raise _too_deep(text, start, source)
    return value, end


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            child
            for parent in level
            for child in (parent.values() if isinstance(parent, dict) else parent)
            if isinstance(child, dict | list)
        ]
        if not level:
            return False
    return True


def _too_deep(text: str, start: int, source: str) -> JsonError:
    depth = 0
    for match in _OPENING.finditer(text, start):
        if match[0][0] != '"':
            depth += 1 if match[1] else -1
        if depth > MAX_DEPTH:
            break
    reason = f"not usable JSON: nested too deep, more than {MAX_DEPTH} levels"
    return JsonError(reason, _line(text, match.start()), source)


def _line(text: str, position: int) -> int:
    return text.count("\n", 0, position) + 1


def read_file_bytes(path: Path, *, max_bytes: int = MAX_BYTES, any_kind: bool = False) -> bytes:
    """Read a file as a whole.

    Args:
        path: The file.
        max_bytes: The most it may have.
        any_kind: Whether it may be a pipe or a device, as one that the user names.

    Raises:
        OSError: There is none, it cannot be read, it is larger, or it is no regular file: those
            may have no end, or wait for somebody to write.
    """
    # Without the flag, opening a pipe waits for its other end.
    flags = os.O_RDONLY | os.O_CLOEXEC | (0 if any_kind else os.O_NONBLOCK)
    with open(os.open(path, flags), "rb") as file:
        mode = os.fstat(file.fileno()).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not any_kind and not stat.S_ISREG(mode):
            raise OSError(errno.EINVAL, "it is no regular file", str(path))
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise OSError(errno.EFBIG, f"it has more than {max_bytes} bytes", str(path))
    return content


def read_json(path: Path, *, any_kind: bool = False) -> Any:
    """Parse a file of JSON.

    Raises:
        OSError: As read_file_bytes.
        JsonError: As parse_json; the message begins with FILE:LINE.
    """
    return parse_json(read_file_bytes(path, any_kind=any_kind), str(path))


def check_regular_files(directory: Path) -> None:
    """Check that a directory of a model or of data holds no pipe, socket or device.

    Raises:
        ConfigError: It does: a library that opens it would wait for ever.
    """
    for path in sorted(directory.iterdir()):
        try:
            mode = path.stat().st_mode
        except OSError:
            # A broken link: an error where the file is needed.
            continue
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            raise ConfigError(f"{path} is no regular file, but a pipe, a socket or a device")


def expand_path(text: str, what: str, kind: type[LigerError] = ConfigError) -> Path:
    """Return the path of a name that a user or a file gives, with ~ and ~user expanded.

    Args:
        text: The name.
        what: The argument, key or place that has it, for the message.
        kind: Class of the error.

    Raises:
        LigerError: Of that kind: no such user, or no file system has such names.
    """
    path = Path(os.path.expanduser(text))
    if text.startswith("~") and str(path).startswith("~"):
        raise kind(f"{what} {shorten(text)}: there is no user {shorten(path.parts[0][1:])!r}")
    try:
        path.lstat()
    except ValueError:
        raise kind(f"{what} {shorten(text)}: a path has no NUL characters") from None
    except OSError as error:
        if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            raise kind(f"{what} {shorten(text)}: {(error.strerror or '').lower()}") from None
    return path


def path_exists(text: str) -> bool:
    """Say whether a name, with ~ expanded, is that of a file or directory."""
    return os.path.exists(os.path.expanduser(text))
