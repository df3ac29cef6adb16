"""Turns the records of a data source into rows, each checked, so that an error names its place."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from liger_cli.data.calls import check_calls, check_role
from liger_cli.errors import DataError

__all__ = ["Record", "Row", "RowFormat", "make_row"]

# Where a record stands, and what is there: an object, or a line of JSON that is yet to be parsed.
Record = tuple[str, Any]

# The formats, by the columns that make them; the first that fits the first row is the source's.
FORMATS: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "conversations": ("conversations",),
    "prompt and completion": ("prompt", "completion"),
    "instruction and output": ("instruction", "output"),
    "text": ("text",),
}
WANTED = (
    "text; or prompt and completion; or instruction, output and perhaps input; or messages (a list "
    "of role and content); or conversations (a list of from and value)"
)
_OPTIONAL: dict[str, tuple[str, ...]] = {
    "messages": ("tools", "images"),
    "conversations": ("tools", "images"),
    "instruction and output": ("input",),
}

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

# The wording of Stanford Alpaca, for a model without a chat template.
_INSTRUCTION = (
    "Below is an instruction that describes a task{with_input}. Write a response that "
    "appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n{input}"
    "### Response:\n"
)


@dataclass(frozen=True)
class Row:
    """A row that has passed its checks.

    Args:
        where: File and line, for errors.
        columns: The columns that are used.
        parts: The text; or the prompt and the completion; or nothing in a conversation.
        messages: Of a conversation, with role and content at least. An instruction has both: it
            is a conversation where the tokenizer has a chat template.
        tools: Descriptions of tools, for the chat template.
        images: Of the messages' image parts in their order: a path, the bytes or a PIL image.
    """

    where: str
    columns: tuple[str, ...]
    parts: tuple[str, ...] = ()
    messages: tuple[Mapping[str, Any], ...] = ()
    tools: tuple[Mapping[str, Any], ...] = ()
    images: tuple[Any, ...] = ()


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
        """Returns the format of a source by its first record.

        Raises:
            DataError: Its columns are of no format; names those found and those wanted.
        """
        where, content = record[0], _as_object(record)
        for name, columns in FORMATS.items():
            if set(columns) <= set(content):
                return cls(name, where, folder)
        raise DataError(f"{where}: found the columns {_join(content)}; wanted {WANTED}")

    def row(self, record: Record) -> Row:
        """Returns the row of a record. Columns that the format does not use are ignored.

        Raises:
            DataError: The record cannot be used; names its place and the reason.
        """
        where, content = record[0], _as_object(record)
        if not set(FORMATS[self.name]) <= set(content):
            raise self._other_format(content, where)
        return make_row(self.name, content, where, self.folder)

    def _other_format(self, content: Mapping[str, Any], where: str) -> DataError:
        if any(set(columns) <= set(content) for columns in FORMATS.values()):
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
    """Returns a checked row of one of the FORMATS."""
    optional = [name for name in _OPTIONAL.get(form, ()) if content.get(name) not in (None, "", [])]
    columns = (*FORMATS[form], *optional)
    if form == "instruction and output":
        return _instruction(columns, content, where)
    if form not in ("messages", "conversations"):
        return Row(where, columns, tuple(_check_text(content[key], key, where) for key in columns))
    check = _check_messages if form == "messages" else _check_conversation
    messages = check(content[form], where)
    given = content["images"] if "images" in optional else []
    images: list[Any] = []
    if given or any(isinstance(message["content"], list) for message in messages):
        messages, images = _place_images(messages, given, where, folder)
    tools = _check_tools(content["tools"], where) if "tools" in optional else ()
    return Row(where, columns, messages=messages, tools=tools, images=tuple(images))


def _as_object(record: Record) -> Mapping[str, Any]:
    where, content = record
    if isinstance(content, bytes):
        try:
            content = json.loads(content.decode("utf-8-sig").strip())
        except UnicodeDecodeError as error:
            raise DataError(f"{where}: not UTF-8: {error.reason}") from error
        except json.JSONDecodeError as error:
            raise DataError(f"{where}: not JSON: {error.msg} (column {error.colno})") from error
        except RecursionError as error:
            raise DataError(f"{where}: not usable JSON: nested too deep") from error
    if not isinstance(content, dict):
        raise DataError(f"{where}: a row must be an object, found {_describe(content)}")
    return content


def _instruction(columns: tuple[str, ...], content: Mapping[str, Any], where: str) -> Row:
    texts = {key: _check_text(content[key], key, where) for key in columns}
    extra = texts.get("input", "")
    prompt = _INSTRUCTION.format(
        with_input=", paired with an input that provides further context" if extra else "",
        instruction=texts["instruction"],
        input=f"### Input:\n{extra}\n\n" if extra else "",
    )
    asked = f"{texts['instruction']}\n\n{extra}" if extra else texts["instruction"]
    messages = (
        {"role": "user", "content": asked},
        {"role": "assistant", "content": texts["output"]},
    )
    return Row(where, columns, (prompt, texts["output"]), messages)


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
    if "function_call" in message:
        raise DataError(
            f"{where}: {name} has function_call, the older form, which chat templates do not show",
            hint='write it as tool_calls: [{"function": {"name": ..., "arguments": {...}}}]',
        )
    if "role" not in message or not ({"content", "tool_calls"} & set(message)):
        raise DataError(
            f"{where}: {name} must have role and content, found {_join(message) or 'nothing'}"
        )
    role = check_role(_check_text(message["role"], f"{name}.role", where), name, where)
    if "tool_calls" in message:
        message["tool_calls"] = check_calls(message["tool_calls"], f"{name}.tool_calls", where)
    content = message.get("content", "")
    if isinstance(content, list):
        message["content"] = _check_parts(content, role, f"{name}.content", where)
    else:
        message["content"] = _check_text(content, f"{name}.content", where)
    return message


def _check_parts(
    parts: list[Any], role: str, name: str, where: str
) -> str | list[Mapping[str, Any]]:
    """The parts of a content; without an image they are one text."""
    checked: list[Mapping[str, Any]] = []
    for number, part in enumerate(parts):
        kind = part.get("type") if isinstance(part, dict) else _describe(part)
        if kind in ("image", "image_url") and role != "assistant":
            checked.append({**part, "type": "image"})
        elif kind == "text":
            text = _check_text(part.get("text"), f"{name}[{number}].text", where)
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
    """Returns messages whose image parts hold no image, and the images in their order."""
    column = [image for _, image in _check_list(given, "images", where)] if given else []
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
    """A path, the bytes of a file or a PIL image; datasets writes {bytes, path}."""
    if isinstance(image, dict):
        image = image.get("bytes") or image.get("path") or image.get("url")
    if not isinstance(image, str):
        if image is None or isinstance(image, int | float | list):
            raise DataError(f"{where}: an image must be a path, found {_describe(image)}")
        return image
    if image.startswith("data:"):
        try:
            return base64.b64decode(image.partition(",")[2], validate=True)
        except ValueError as error:
            raise DataError(f"{where}: the image {image[:40]}... is not base64") from error
    if "://" in image:
        raise DataError(f"{where}: the image {image[:80]} is remote; images are read from files")
    path = Path(image).expanduser()
    path = path if path.is_absolute() or folder is None else folder / path
    if not path.is_file():
        raise DataError(f"{where}: there is no image {path}")
    return str(path)


def _check_tools(tools: Any, where: str) -> tuple[Mapping[str, Any], ...]:
    if isinstance(tools, str):
        # A table has one type a column, and tools have many shapes.
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError as error:
            raise DataError(f"{where}: tools is not JSON: {error.msg}") from error
    for number, tool in _check_list(tools, "tools", where):
        if not isinstance(tool, dict):
            raise DataError(f"{where}: tools[{number}] must be an object, found {_describe(tool)}")
    return tuple(tools)


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
    return kinds.get(type(value), f"a {type(value).__name__}")
