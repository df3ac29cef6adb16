"""Reads the rows of a data file and checks each, so that an error names its line."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from liger_cli.errors import DataError

__all__ = ["Row", "read_rows"]

# The formats, by the columns that make them; the first that fits the first row is the file's.
FORMATS: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "conversations": ("conversations",),
    "prompt and completion": ("prompt", "completion"),
    "text": ("text",),
}
WANTED = (
    "text; or prompt and completion; or messages (a list of role and content); "
    "or conversations (a list of from and value)"
)

# The speakers of the conversations format, as roles of the messages format.
SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}


@dataclass(frozen=True)
class Row:
    """A row that has passed its checks.

    Args:
        where: File and line, for errors.
        columns: The columns that are used.
        parts: The text; or the prompt and the completion; or nothing in a conversation.
        messages: Of a conversation, with role and content at least.
    """

    where: str
    columns: tuple[str, ...]
    parts: tuple[str, ...] = ()
    messages: tuple[Mapping[str, Any], ...] = ()


def read_rows(path: Path) -> Iterator[Row]:
    """Yields the rows of a .jsonl file (an object a line) or a .json file (that, or a list).

    All rows have the format of the first. Columns that the format does not use are ignored.

    Raises:
        DataError: The file or a row of it cannot be used; names the file, the line and the reason.
    """
    form: str | None = None
    first = ""
    for line, content in _read_objects(path):
        where = f"{path}:{line}"
        if not isinstance(content, dict):
            raise DataError(f"{where}: a row must be an object, found {_describe(content)}")
        if form is None:
            form, first = _find_format(content, where), where
        elif not set(FORMATS[form]) <= set(content):
            raise _other_format(content, where, form, first)
        yield make_row(form, content, where)
    if form is None:
        raise DataError(f"{path} holds no rows")


def make_row(form: str, content: Mapping[str, Any], where: str) -> Row:
    """Returns a checked row of one of the FORMATS."""
    columns = FORMATS[form]
    if form == "messages":
        return Row(where, columns, messages=_check_messages(content["messages"], where))
    if form == "conversations":
        messages = _check_conversation(content["conversations"], where)
        return Row(where, columns, messages=messages)
    return Row(where, columns, tuple(_check_text(content[key], key, where) for key in columns))


def _read_objects(path: Path) -> Iterator[tuple[int, Any]]:
    """Yields each row with the number of its line."""
    if not path.exists():
        raise DataError(f"there is no data file {path}")
    if path.suffix not in (".jsonl", ".json"):
        raise DataError(f"{path} is not a .jsonl or .json file")
    try:
        with path.open("rb") as stream:
            is_list = path.suffix == ".json" and _first_byte(stream) == b"["
            stream.seek(0)
            if is_list:
                yield from _read_list(path, _decode(stream.read(), path, 1))
                return
            for number, line in enumerate(stream, start=1):
                if text := _decode(line, path, number).strip():
                    yield number, _parse(text, path, number)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error


def _first_byte(stream: Any) -> bytes:
    return stream.read(1024).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]


def _decode(content: bytes, path: Path, line: int) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line += content[: error.start].count(b"\n")
        raise DataError(f"{path}:{line}: not UTF-8: {error.reason}") from error


def _parse(text: str, path: Path, line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{line}: not JSON: {error.msg} (column {error.colno})") from error
    except RecursionError as error:
        raise DataError(f"{path}:{line}: not usable JSON: nested too deep") from error


def _read_list(path: Path, text: str) -> Iterator[tuple[int, Any]]:
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
        yield line, item
        position = skip_space(end)
        is_open = text[position : position + 1] == ","
        if is_open:
            position = skip_space(position + 1)
        elif text[position : position + 1] != "]":
            raise fail("expected a comma or the end of the list")
    if skip_space(position + 1) != len(text):
        raise fail("text after the end of the list")


def _find_format(content: Mapping[str, Any], where: str) -> str:
    for form, columns in FORMATS.items():
        if set(columns) <= set(content):
            return form
    raise DataError(f"{where}: found the columns {_join(content)}; wanted {WANTED}")


def _other_format(content: Mapping[str, Any], where: str, form: str, first: str) -> DataError:
    if any(set(columns) <= set(content) for columns in FORMATS.values()):
        return DataError(
            f"{where}: found the columns {_join(content)}, but the file starts with {form} "
            f"({first}); a file has one format"
        )
    missing = [column for column in FORMATS[form] if column not in content]
    return DataError(
        f"{where}: the column {missing[0]} is missing; found {_join(content)}, "
        f"wanted {form} as in {first}"
    )


def _check_text(value: Any, name: str, where: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where}: {name} must be a string, found {_describe(value)}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: {name} holds half of a surrogate pair, not text") from error
    return value


def _check_messages(messages: Any, where: str) -> tuple[Mapping[str, Any], ...]:
    return tuple(
        _check_message(message, f"messages[{number}]", where)
        for number, message in _check_list(messages, "messages", where)
    )


def _check_message(message: Any, name: str, where: str) -> Mapping[str, Any]:
    if not isinstance(message, dict):
        raise DataError(f"{where}: {name} must be an object, found {_describe(message)}")
    # What is null is absent: a table of rows with different keys is written with nulls.
    message = {key: value for key, value in message.items() if value is not None}
    if "role" not in message or not ({"content", "tool_calls"} & set(message)):
        raise DataError(
            f"{where}: {name} must have role and content, found {_join(message) or 'nothing'}"
        )
    _check_text(message["role"], f"{name}.role", where)
    message["content"] = _check_text(message.get("content", ""), f"{name}.content", where)
    return message


def _check_conversation(turns: Any, where: str) -> tuple[Mapping[str, Any], ...]:
    messages = []
    for number, turn in _check_list(turns, "conversations", where):
        name = f"conversations[{number}]"
        if not isinstance(turn, dict) or not {"from", "value"} <= set(turn):
            found = _join(turn) if isinstance(turn, dict) else _describe(turn)
            raise DataError(f"{where}: {name} must have from and value, found {found}")
        role = SPEAKERS.get(_check_text(turn["from"], f"{name}.from", where))
        if role is None:
            raise DataError(
                f"{where}: {name}.from is {turn['from']!r}; allowed are {', '.join(SPEAKERS)}"
            )
        content = _check_text(turn["value"], f"{name}.value", where)
        messages.append({"role": role, "content": content})
    return tuple(messages)


def _check_list(value: Any, name: str, where: str) -> Iterator[tuple[int, Any]]:
    if not isinstance(value, list):
        raise DataError(f"{where}: {name} must be a list, found {_describe(value)}")
    if not value:
        raise DataError(f"{where}: {name} is empty")
    return iter(enumerate(value))


def _join(columns: Mapping[str, Any]) -> str:
    return ", ".join(map(str, columns)) or "none"


def _describe(value: Any) -> str:
    kinds = {
        type(None): "null",
        bool: "a boolean",
        int: "a number",
        float: "a number",
        str: "a string",
        list: "a list",
        dict: "an object",
    }
    return kinds[type(value)]
