"""Turn the records of a data source into rows, each checked, so that an error names its place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from liger_cli.common.readers import JsonError, parse_json
from liger_cli.config.datasets import Naming
from liger_cli.data.formats import FORMATS, OPTIONAL, TURNS, WANTED, find_format, row_marks
from liger_cli.data.image_parts import place_images
from liger_cli.data.instructions import instruction_messages, instruction_parts
from liger_cli.data.layouts import layout_hint, not_utf8
from liger_cli.data.messages import Messages, read_messages
from liger_cli.data.names import RowNames, join_names
from liger_cli.data.threads import Thread
from liger_cli.data.token_ids import read_token_ids
from liger_cli.data.values import check_list, check_text, describe
from liger_cli.errors import DataError

__all__ = ["Record", "Row", "RowFormat", "as_object", "make_row", "only_last", "with_names"]

# Where a record stands, and what is there: an object, or a line of JSON that is yet to be parsed.
Record = tuple[str, Any]

_OUR_NAMES = RowNames()


@dataclass(frozen=True)
class Row:
    """A row that has passed its checks.

    Args:
        where: File and line, for errors.
        columns: The columns that are used, with their names in the data: question as prompt.
        unused: The columns and fields that are there and are not used.
        fields: The fields of messages that are used, likewise.
        others: Fields of messages that a chat template may use.
        seen: The columns that were mapped and are there, empty ones too.
        parts: The text; or the prompt and the completion, of an instruction with a history those of
            each turn; or nothing in a conversation.
        messages: Of a conversation, with role and content at least. An instruction has both: it
            is a conversation where the tokenizer has a chat template.
        marks: Of each message, the weight that it says it has, 0 for not trained; None where it
            says nothing.
        weight: Of the whole row, times that of each message; 0 where nothing of it is trained.
        is_text: Whether its parts are what is trained, with a chat template too.
        num_prompt: Messages that are the prompt, where a row has prompt and completion.
        token_ids: The ids, where a row has them and no text.
        labels: Of the ids.
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
    marks: tuple[float | None, ...] = ()
    weight: float = 1.0
    is_text: bool = False
    num_prompt: int = 0
    fields: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    seen: tuple[str, ...] = ()
    token_ids: tuple[int, ...] = ()
    labels: tuple[int, ...] = ()

    @property
    def is_trained(self) -> bool:
        """Whether anything of the row is trained."""
        return self.weight > 0

    @property
    def has_weights(self) -> bool:
        """Whether a weight is neither 0 nor 1."""
        return any(weight not in (None, 0, 1) for weight in (self.weight, *self.marks))


@dataclass(frozen=True)
class RowFormat:
    """The format of a source, which all of its records have.

    Args:
        name: One of FORMATS.
        first: Where the record stands that decided it.
        folder: Where relative paths of images start.
        names: Of its columns, roles and fields.
    """

    name: str
    first: str
    folder: Path | None = None
    names: RowNames = _OUR_NAMES

    @classmethod
    def find(
        cls, record: Record, folder: Path | None = None, naming: Naming | None = None
    ) -> RowFormat:
        """Return the format of a source by its first record.

        Args:
            folder: Where relative paths of images start.
            naming: The names of columns, roles and fields in the source.

        Raises:
            DataError: Its columns are of no format; names those found and those wanted.
        """
        where, content = record[0], as_object(record)
        naming = naming or Naming()
        hint = layout_hint(RowNames(naming.columns).row(content)[0])
        if (missing := RowNames.missing(content, naming)) is not None:
            raise DataError(f"{where}: {missing}; found {join_names(content)}", hint=hint)
        if hint is not None:
            found = f"found the columns {join_names(content)}"
            raise DataError(f"{where}: {found}; wanted {WANTED}", hint=hint)
        name, names = RowNames.find(content, naming, where)
        return cls(name, where, folder, names)

    def row(self, record: Record) -> Row:
        """Return the row of a record. Columns that the format does not use are noted.

        Raises:
            DataError: The record cannot be used; names its place and the reason.
        """
        where, raw = record[0], as_object(record)
        content, hidden = self.names.row(raw)
        if not set(FORMATS[self.name]) <= set(content):
            raise self._other_format(raw, where)
        try:
            row = make_row(self.name, content, where, self.folder, self.names)
        except DataError as error:
            raise with_names(error, self.names) from error
        if isinstance(raw, Thread):
            return replace(row, columns=raw.used, unused=raw.unused, fields=())
        return replace(row, unused=(*row.unused, *hidden))

    def _other_format(self, content: Mapping[str, Any], where: str) -> DataError:
        if not self.names.columns and find_format(content) is not None:
            return DataError(
                f"{where}: found the columns {join_names(content)}, but the data start with "
                f"{self.name} ({self.first}); a source has one format"
            )
        columns = (self.names.columns.get(column, column) for column in FORMATS[self.name])
        missing = [column for column in columns if column not in content]
        return DataError(
            f"{where}: the column {missing[0]} is missing; found {join_names(content)}, "
            f"wanted {self.name} as in {self.first}"
        )


def with_names(error: DataError, names: RowNames) -> DataError:
    """Return an error about a row with the names that its columns have in the data."""
    renamed = {ours: name for ours, name in names.columns.items() if ours != name}
    if not renamed:
        return error
    said = ", ".join(f"{ours} is the column {name}" for ours, name in renamed.items())
    return DataError(error.message, hint=f"{said}; {error.hint}" if error.hint else said)


def make_row(
    form: str,
    content: Mapping[str, Any],
    where: str,
    folder: Path | None = None,
    names: RowNames = _OUR_NAMES,
) -> Row:
    """Return a checked row of one of the FORMATS, whose columns have our names."""
    content, functions = _with_tools(form, content)
    given = {key for key, value in content.items() if value not in (None, "", [])}
    optional = [name for name in _optional(form, content) if name in given]
    columns = (*FORMATS[form], *optional)
    fields = row_marks(content, form, where)
    used = {*columns, *fields.fields}
    row = _make_row(form, {name: content[name] for name in columns}, (where, folder, names))
    row = row if fields.mask is None else replace(row, marks=_with_mask(row, fields.mask))
    row = only_last(row) if fields.only_last else row
    shown = (functions.get(name) or names.shown(name) for name in (*columns, *fields.fields))
    return replace(
        row,
        columns=tuple(shown),
        seen=tuple(names.shown(name) for name in names.columns if name in content),
        unused=(*(names.shown(name) for name in content if name in given - used), *row.unused),
        weight=fields.weight,
    )


def _with_tools(form: str, content: Mapping[str, Any]) -> tuple[Mapping[str, Any], dict[str, str]]:
    """Return a row with OpenAI's older column functions as tools, and what to show for it."""
    functions = content.get("functions")
    if form not in TURNS or not isinstance(functions, list) or content.get("tools"):
        return content, {}
    tools = [{"type": "function", "function": function} for function in functions]
    rest = {key: value for key, value in content.items() if key not in ("functions", "tools")}
    return {**rest, "tools": tools}, {"tools": "functions as tools"}


def _optional(form: str, content: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the columns that a row of a format may have in addition."""
    if form == "prompt and completion" and not _has_messages(content):
        return ()
    return OPTIONAL.get(form, ())


def _has_messages(content: Mapping[str, Any]) -> bool:
    """Return whether prompt or completion is a list of messages, as in TRL."""
    return isinstance(content["prompt"], list) or isinstance(content["completion"], list)


# Where a row is, where relative paths of images start, and the names of its source.
_Place = tuple[str, Path | None, RowNames]


def _make_row(form: str, content: dict[str, Any], place: _Place) -> Row:
    where, _, names = place
    columns = tuple(content)
    if form == "instruction and output":
        joint = "\n" if names.naming.as_llama_factory else "\n\n"
        messages = instruction_messages(content, where, joint)
        parts = instruction_parts(messages, content["instruction"], content.get("input", ""))
        is_text = names.naming.instruction_style == "alpaca"
        return Row(where, columns, parts=parts, messages=messages, is_text=is_text)
    if form == "token ids":
        ids, labels = read_token_ids(content, where)
        return Row(where, columns, token_ids=ids, labels=labels)
    if form == "text" or (form == "prompt and completion" and not _has_messages(content)):
        parts = tuple(check_text(value, key, where) for key, value in content.items())
        return Row(where, columns, parts=parts)
    if form != "prompt and completion":
        return _chat_row(content, read_messages(content[form], form, where, names), place)
    prompt, completion = (_part(content, name, where, names) for name in FORMATS[form])
    if completion.messages[0]["role"] != "assistant":
        name = names.columns.get("completion", "completion")
        raise DataError(
            f"{where}: {name}[0].role is {completion.messages[0]['role']!r}; a completion "
            "begins with a message of the assistant"
        )
    row = _chat_row(content, prompt + completion, place)
    return replace(row, num_prompt=len(row.messages) - len(completion.messages))


def _part(content: Mapping[str, Any], name: str, where: str, names: RowNames) -> Messages:
    if not isinstance(content[name], list):
        raise DataError(
            f"{where}: prompt and completion are both text or both lists of messages; {name} is "
            f"{describe(content[name])}"
        )
    return read_messages(content[name], name, where, names)


def _chat_row(content: Mapping[str, Any], read: Messages, place: _Place) -> Row:
    """Return the row of messages and of the columns beside them."""
    where, folder, _ = place
    messages, marks = read.messages, read.marks
    if "system" in content:
        messages, marks = _with_system(messages, marks, content["system"], where)
    given = content.get("images", [])
    images: list[Any] = []
    if given or any(isinstance(message["content"], list) for message in messages):
        messages, images = place_images(messages, given, where, folder)
    tools = _check_tools(content["tools"], where) if "tools" in content else ()
    return Row(
        where,
        tuple(content),
        read.unused,
        (),
        messages,
        tools,
        tuple(images),
        marks,
        fields=read.fields,
        others=read.others,
    )


def _with_mask(row: Row, mask: tuple[str, tuple[bool, ...]]) -> tuple[float | None, ...]:
    """Return the marks of messages that the column of a mask gives.

    Raises:
        DataError: It has another length, or a message says the contrary.
    """
    name, values = mask
    # The text of the column system is the first message, which the mask does not count.
    added = len(row.messages) - len(values)
    if added not in (0, 1) or (added and row.messages[0]["role"] != "system"):
        raise DataError(
            f"{row.where}: {name} has {len(values)} marks for {len(row.messages)} messages"
        )
    marks: list[float | None] = [None] * added
    for i, value in enumerate(values, start=added):
        said = row.marks[i]
        if said is not None and (said > 0) != value:
            raise DataError(
                f"{row.where}: {name}[{i - added}] and its message contradict each other"
            )
        marks.append(float(value) if said is None else said)
    return tuple(marks)


def only_last(row: Row) -> Row:
    """Return a row of which only the last answer is trained, if it is."""
    answers = [i for i, message in enumerate(row.messages) if message["role"] == "assistant"]
    marks = list(row.marks or [None] * len(row.messages))
    for i in answers[:-1]:
        marks[i] = 0.0
    return replace(row, marks=tuple(marks))


def _with_system(
    messages: tuple[Mapping[str, Any], ...], marks: tuple[float | None, ...], text: Any, where: str
) -> tuple[tuple[Mapping[str, Any], ...], tuple[float | None, ...]]:
    """Put the text of the column system before the messages."""
    system = {"role": "system", "content": check_text(text, "system", where)}
    if messages[0]["role"] != "system":
        return (system, *messages), (None, *marks)
    if messages[0]["content"] != system["content"]:
        raise DataError(f"{where}: the column system and the first message are two system messages")
    return messages, marks


def as_object(record: Record) -> Mapping[str, Any]:
    """Return the object of a record.

    Raises:
        DataError: Its line is no JSON, or something else than an object.
    """
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
