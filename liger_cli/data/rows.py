"""Turn the records of a data source into rows, each checked, so that an error names its place."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from liger_cli.common.readers import JsonError, expand_path, parse_json
from liger_cli.data.calls import check_calls, check_role
from liger_cli.data.formats import (
    FORMATS,
    MESSAGE_FIELDS,
    OPTIONAL,
    WANTED,
    find_format,
    message_mark,
    row_marks,
)
from liger_cli.data.instructions import instruction_messages, instruction_parts
from liger_cli.data.layouts import layout_hint, not_utf8
from liger_cli.data.values import check_list, check_text, describe
from liger_cli.errors import DataError

__all__ = ["Record", "Row", "RowFormat", "make_row"]

# Where a record stands, and what is there: an object, or a line of JSON that is yet to be parsed.
Record = tuple[str, Any]

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
        unused: The columns that are there and are not used.
        parts: The text; or the prompt and the completion, of an instruction with a history those of
            each turn; or nothing in a conversation.
        messages: Of a conversation, with role and content at least. An instruction has both: it
            is a conversation where the tokenizer has a chat template.
        marks: Of each message, whether it says that it is trained; None where it says nothing.
        is_trained: Whether anything of the row is trained.
        tools: Descriptions of tools, for the chat template.
        images: Of the messages' image parts in their order: a path, the bytes or a PIL image.
    """

    where: str
    columns: tuple[str, ...]
    unused: tuple[str, ...] = ()
    parts: tuple[str, ...] = ()
    messages: tuple[Mapping[str, Any], ...] = ()
    tools: tuple[Mapping[str, Any], ...] = ()
    images: tuple[Any, ...] = ()
    marks: tuple[bool | None, ...] = ()
    is_trained: bool = True


@dataclass(frozen=True)
class RowFormat:
    """The format of a source, which all of its records have.

    Args:
        name: One of FORMATS.
        first: Where the record stands that decided it.
        folder: Where relative paths of images start.
    """

    name: str
    first: str
    folder: Path | None = None

    @classmethod
    def find(cls, record: Record, folder: Path | None = None) -> RowFormat:
        """Return the format of a source by its first record.

        Raises:
            DataError: Its columns are of no format; names those found and those wanted.
        """
        where, content = record[0], _as_object(record)
        name, hint = find_format(content), layout_hint(content)
        if name is None or hint is not None:
            found = f"found the columns {_join(content)}"
            raise DataError(f"{where}: {found}; wanted {WANTED}", hint=hint)
        return cls(name, where, folder)

    def row(self, record: Record) -> Row:
        """Return the row of a record. Columns that the format does not use are noted.

        Raises:
            DataError: The record cannot be used; names its place and the reason.
        """
        where, content = record[0], _as_object(record)
        if not set(FORMATS[self.name]) <= set(content):
            raise self._other_format(content, where)
        return make_row(self.name, content, where, self.folder)

    def _other_format(self, content: Mapping[str, Any], where: str) -> DataError:
        if find_format(content) is not None:
            return DataError(
                f"{where}: found the columns {_join(content)}, but the data start with {self.name} "
                f"({self.first}); a source has one format"
            )
        missing = [column for column in FORMATS[self.name] if column not in content]
        return DataError(
            f"{where}: the column {missing[0]} is missing; found {_join(content)}, "
            f"wanted {self.name} as in {self.first}"
        )


def make_row(form: str, content: Mapping[str, Any], where: str, folder: Path | None = None) -> Row:
    """Return a checked row of one of the FORMATS."""
    given = {key for key, value in content.items() if value not in (None, "", [])}
    optional = [name for name in OPTIONAL.get(form, ()) if name in given]
    columns = (*FORMATS[form], *optional)
    fields = row_marks(content, form, where)
    used = {*columns, *fields.fields}
    row = _make_row(form, {name: content[name] for name in columns}, where, folder)
    return replace(
        row,
        columns=(*columns, *fields.fields),
        unused=(*(name for name in content if name in given - used), *row.unused),
        marks=_only_last(row) if fields.only_last else row.marks,
        is_trained=fields.is_trained,
    )


def _make_row(form: str, content: dict[str, Any], where: str, folder: Path | None) -> Row:
    columns = tuple(content)
    if form == "instruction and output":
        messages = instruction_messages(content, where)
        parts = instruction_parts(messages, content["instruction"], content.get("input", ""))
        return Row(where, columns, parts=parts, messages=messages)
    if form not in ("messages", "conversations"):
        parts = tuple(check_text(value, key, where) for key, value in content.items())
        return Row(where, columns, parts=parts)
    turns = content[form]
    check = _check_messages if form == "messages" else _check_conversation
    messages = check(turns, where)
    marks = tuple(message_mark(turn, f"{form}[{i}]", where) for i, turn in enumerate(turns))
    if "system" in content:
        messages, marks = _with_system(messages, marks, content["system"], where)
    given = content.get("images", [])
    images: list[Any] = []
    if given or any(isinstance(message["content"], list) for message in messages):
        messages, images = _place_images(messages, given, where, folder)
    tools = _check_tools(content["tools"], where) if "tools" in content else ()
    unused = _unused_keys(turns) if form == "conversations" else ()
    return Row(where, columns, unused, (), messages, tools, tuple(images), marks)


def _only_last(row: Row) -> tuple[bool | None, ...]:
    """Return the marks of a row of which only the last answer is trained."""
    answers = [i for i, message in enumerate(row.messages) if message["role"] == "assistant"]
    marks = list(row.marks or [None] * len(row.messages))
    for i in answers[:-1]:
        marks[i] = False
    return tuple(marks)


def _with_system(
    messages: tuple[Mapping[str, Any], ...], marks: tuple[bool | None, ...], text: Any, where: str
) -> tuple[tuple[Mapping[str, Any], ...], tuple[bool | None, ...]]:
    """Put the text of the column system before the messages."""
    system = {"role": "system", "content": check_text(text, "system", where)}
    if messages[0]["role"] != "system":
        return (system, *messages), (None, *marks)
    if messages[0]["content"] != system["content"]:
        raise DataError(f"{where}: the column system and the first message are two system messages")
    return messages, marks


def _unused_keys(turns: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    known = {"from", "value", *MESSAGE_FIELDS}
    keys = dict.fromkeys(key for turn in turns for key, value in turn.items() if value is not None)
    return tuple(f"conversations.{key}" for key in keys if key not in known)


def _as_object(record: Record) -> Mapping[str, Any]:
    where, content = record
    if isinstance(content, bytes):
        try:
            text = content.decode("utf-8-sig").strip()
        except UnicodeDecodeError as error:
            raise not_utf8(where, error) from error
        try:
            content = parse_json(text)
        except JsonError as error:
            raise DataError(f"{where}: {error.reason}") from error
    if not isinstance(content, dict):
        raise DataError(f"{where}: a row must be an object, found {describe(content)}")
    return content


def _check_messages(messages: Any, where: str) -> tuple[Mapping[str, Any], ...]:
    return tuple(
        _check_message(message, f"messages[{number}]", where)
        for number, message in check_list(messages, "messages", where)
    )


def _check_message(message: Any, name: str, where: str) -> Mapping[str, Any]:
    if not isinstance(message, dict):
        raise DataError(f"{where}: {name} must be an object, found {describe(message)}")
    # What is null is absent: a table of rows with different keys is written with nulls. What marks
    # a message as trained is read apart, and is no business of a template.
    message = {
        key: value
        for key, value in message.items()
        if value is not None and key not in MESSAGE_FIELDS
    }
    if "function_call" in message:
        raise DataError(
            f"{where}: {name} has function_call, the older form, which chat templates do not show",
            hint='write it as tool_calls: [{"function": {"name": ..., "arguments": {...}}}]',
        )
    if "role" not in message or not ({"content", "tool_calls"} & set(message)):
        raise DataError(
            f"{where}: {name} must have role and content, found {_join(message) or 'nothing'}"
        )
    role = check_role(check_text(message["role"], f"{name}.role", where), name, where)
    if "tool_calls" in message:
        message["tool_calls"] = check_calls(message["tool_calls"], f"{name}.tool_calls", where)
    content = message.get("content", "")
    if isinstance(content, list):
        message["content"] = _check_parts(content, role, f"{name}.content", where)
    else:
        message["content"] = check_text(content, f"{name}.content", where)
    return message


def _check_parts(
    parts: list[Any], role: str, name: str, where: str
) -> str | list[Mapping[str, Any]]:
    """Check the parts of a content; without an image they are one text."""
    checked: list[Mapping[str, Any]] = []
    for number, part in enumerate(parts):
        kind = part.get("type") if isinstance(part, dict) else describe(part)
        if kind in ("image", "image_url") and role != "assistant":
            checked.append({**part, "type": "image"})
        elif kind == "text":
            text = check_text(part.get("text"), f"{name}[{number}].text", where)
            checked.append({"type": "text", "text": text})
        else:
            raise DataError(
                f"{where}: {name}[{number}] has the type {kind!r}; allowed are text"
                + ("" if role == "assistant" else " and image")
            )
    if any(part["type"] == "image" for part in checked):
        return checked
    return "".join(part["text"] for part in checked)


def _place_images(
    messages: Sequence[Mapping[str, Any]], given: Any, where: str, folder: Path | None
) -> tuple[tuple[Mapping[str, Any], ...], list[Any]]:
    """Return messages whose image parts hold no image, and the images in their order."""
    column = [image for _, image in check_list(given, "images", where)] if given else []
    parts = [
        part
        for message in messages
        if isinstance(message["content"], list)
        for part in message["content"]
        if part["type"] == "image"
    ]
    if not parts:
        # A column of images and plain messages: the images are what the user shows first.
        position = next((i for i, m in enumerate(messages) if m["role"] == "user"), None)
        if position is None:
            raise DataError(f"{where}: there are images, and no message of the user to show them")
        text = {"type": "text", "text": messages[position]["content"]}
        shown = [{"type": "image"} for _ in column]
        placed = list(messages)
        placed[position] = {**messages[position], "content": [*shown, text]}
        return tuple(placed), [_check_image(image, where, folder) for image in column]
    rest = iter(column)
    images = []
    for part in parts:
        own = next((part[key] for key in ("image", "path", "url", "image_url") if part.get(key)), 0)
        image = own or next(rest, None)
        if image is None:
            raise DataError(f"{where}: {len(parts)} image parts, but {len(column)} images for them")
        images.append(_check_image(image, where, folder))
    if (unused := len(list(rest))) and column:
        raise DataError(f"{where}: {unused} of {len(column)} images have no image part")
    bare = [
        {**message, "content": [_without_image(part) for part in message["content"]]}
        if isinstance(message["content"], list)
        else message
        for message in messages
    ]
    return tuple(bare), images


def _without_image(part: Mapping[str, Any]) -> Mapping[str, Any]:
    return {"type": "image"} if part["type"] == "image" else part


def _check_image(image: Any, where: str, folder: Path | None) -> Any:
    """Check an image: a path, the bytes of a file or a PIL image; datasets writes {bytes, path}."""
    if isinstance(image, dict):
        image = image.get("bytes") or image.get("path") or image.get("url")
    if not isinstance(image, str):
        if image is None or isinstance(image, int | float | list):
            raise DataError(f"{where}: an image must be a path, found {describe(image)}")
        return image
    if image.startswith("data:"):
        try:
            return base64.b64decode(image.partition(",")[2], validate=True)
        except ValueError as error:
            raise DataError(f"{where}: the image {image[:40]}... is not base64") from error
    if "://" in image:
        raise DataError(f"{where}: the image {image[:80]} is remote; images are read from files")
    path = expand_path(image, f"{where}: the image", DataError)
    path = path if path.is_absolute() or folder is None else folder / path
    if not path.is_file():
        raise DataError(f"{where}: there is no image {path}")
    return str(path)


def _check_tools(tools: Any, where: str) -> tuple[Mapping[str, Any], ...]:
    if isinstance(tools, str):
        # A table has one type a column, and tools have many shapes.
        try:
            tools = parse_json(tools)
        except JsonError as error:
            raise DataError(f"{where}: tools: {error.reason}") from error
    for number, tool in check_list(tools, "tools", where):
        if not isinstance(tool, dict):
            raise DataError(f"{where}: tools[{number}] must be an object, found {describe(tool)}")
    return tuple(tools)


def _check_conversation(turns: Any, where: str) -> tuple[Mapping[str, Any], ...]:
    messages = []
    for number, turn in check_list(turns, "conversations", where):
        name = f"conversations[{number}]"
        if not isinstance(turn, dict) or not {"from", "value"} <= set(turn):
            found = _join(turn) if isinstance(turn, dict) else describe(turn)
            raise DataError(f"{where}: {name} must have from and value, found {found}")
        role = SPEAKERS.get(check_text(turn["from"], f"{name}.from", where))
        if role is None:
            raise DataError(
                f"{where}: {name}.from is {turn['from']!r}; allowed are {', '.join(SPEAKERS)}"
            )
        content = check_text(turn["value"], f"{name}.value", where)
        messages.append({"role": role, "content": content})
    return tuple(messages)


def _join(columns: Mapping[str, Any]) -> str:
    return ", ".join(map(str, columns)) or "none"
