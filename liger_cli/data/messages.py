"""Messages of a row, in the forms of OpenAI and of ShareGPT, with what they say is trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from liger_cli.data.calls import check_calls
from liger_cli.data.formats import MESSAGE_FIELDS, message_weight
from liger_cli.data.names import RowNames, join_names
from liger_cli.data.values import check_list, check_text, describe
from liger_cli.errors import DataError

__all__ = ["Messages", "read_messages"]

# What is read of a message here; what else it has is the template's.
_READ = ("role", "content", "tool_calls", "function_call")


@dataclass(frozen=True)
class Messages:
    """The messages of a row that have passed their checks.

    Args:
        messages: With role and content at least.
        marks: Of each, the weight that it says it has, 0 for not trained; None where it says
            nothing.
        fields: Their fields that are used, with their names in the data.
        unused: Those that are not, with the column before them.
        others: Those that a chat template may use, likewise.
    """

    messages: tuple[Mapping[str, Any], ...]
    marks: tuple[float | None, ...]
    fields: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    others: tuple[str, ...] = ()

    def __add__(self, other: Messages) -> Messages:
        joined = {
            name: tuple(dict.fromkeys((*getattr(self, name), *getattr(other, name))))
            for name in ("fields", "unused", "others")
        }
        return Messages(self.messages + other.messages, self.marks + other.marks, **joined)


def read_messages(turns: Any, name: str, where: str, names: RowNames) -> Messages:
    """Return the messages of a list.

    A message with role and content is OpenAI's, one with from and value is ShareGPT's, whatever the
    column is called.

    Args:
        name: Our name of the column: messages, conversations, prompt or completion.

    Raises:
        DataError: One of them is no message, or a mark of it is not allowed.
    """
    messages, marks = [], []
    fields, unused, others = dict[str, None](), dict[str, None](), dict[str, None]()
    column, name = name, names.columns.get(name, name)
    for number, raw in check_list(turns, name, where):
        place = f"{name}[{number}]"
        turn = names.turn(raw) if isinstance(raw, dict) else raw
        # What is null is absent: a table of rows with different keys is written with nulls.
        turn = {k: v for k, v in turn.items() if v is not None} if isinstance(turn, dict) else turn
        if _is_speech(turn, column):
            messages.append(_check_turn(turn, place, where, names))
            used = [key for key in turn if key in ("from", "value", *MESSAGE_FIELDS)]
            unused |= dict.fromkeys(f"{name}.{key}" for key in turn if key not in used)
        else:
            messages.append(_check_message(turn, raw, place, where, names))
            used = [key for key in turn if key in (*_READ, *MESSAGE_FIELDS)]
            others |= dict.fromkeys(f"{name}.{key}" for key in turn if key not in used)
        if isinstance(raw, dict) and names.naming.message_fields:
            hidden = [k for k, v in raw.items() if k not in turn and v not in (None, "")]
            taken = names.naming.message_fields.values()
            unused |= dict.fromkeys(f"{name}.{key}" for key in hidden if key not in taken)
        fields |= dict.fromkeys(map(names.field, used))
        marks.append(message_weight(turn, place, where))
    return Messages(tuple(messages), tuple(marks), tuple(fields), tuple(unused), tuple(others))


def _is_speech(turn: Any, column: str) -> bool:
    """Return whether a turn is one of ShareGPT: the column decides where its keys do not."""
    keys = set(turn) if isinstance(turn, dict) else set()
    if column == "conversations":
        return "from" in keys or "role" not in keys
    return "from" in keys and "role" not in keys


def _check_turn(turn: Any, name: str, where: str, names: RowNames) -> Mapping[str, Any]:
    """Return a turn of ShareGPT as a message."""
    if not isinstance(turn, dict) or not {"from", "value"} <= set(turn):
        found = join_names(turn) if isinstance(turn, dict) else describe(turn)
        # Nulls are taken out before.
        is_null = isinstance(turn, dict) and len(turn) == 1 and set(turn) < {"from", "value"}
        raise DataError(
            f"{where}: {name} must have from and value, found {found}",
            hint="a null is as if it were not there: write a text, or leave the turn out"
            if is_null
            else "message_fields: {role: X, content: Y} names the fields of other data",
        )
    speaker = check_text(turn["from"], f"{name}.from", where)
    role = names.role(speaker, name, where, is_speaker=True)
    content = check_text(turn["value"], f"{name}.value", where)
    if role == "function_call":
        return _call_message(content, f"{name}.value", where)
    return {"role": role, "content": content}


def _check_message(
    message: Any, raw: Any, name: str, where: str, names: RowNames
) -> Mapping[str, Any]:
    """Return a checked message, which was `raw` before its fields had our names."""
    if not isinstance(message, dict):
        raise DataError(f"{where}: {name} must be an object, found {describe(message)}")
    # What marks a message as trained is read apart, and is no business of a template.
    message = {key: value for key, value in message.items() if key not in MESSAGE_FIELDS}
    says = {"content", "tool_calls", "function_call"} & set(message)
    if "role" not in message or not says:
        raise DataError(
            f"{where}: {name} must have {names.wanted('role')} and {names.wanted('content')}, "
            f"found {join_names(raw)}",
            hint="message_fields: {role: X, content: Y} names the fields of other data",
        )
    role = check_text(message["role"], f"{name}.role", where)
    message["role"] = names.role(role, name, where, is_speaker=False)
    if message["role"] == "function_call":
        content = check_text(message.get("content", ""), f"{name}.content", where)
        return _call_message(content, f"{name}.content", where)
    message = _without_older_form(message, name, where)
    if "tool_calls" in message:
        message["tool_calls"] = check_calls(message["tool_calls"], f"{name}.tool_calls", where)
    content = message.get("content", "")
    if isinstance(content, list):
        message["content"] = _check_parts(content, message["role"], f"{name}.content", where)
    else:
        message["content"] = check_text(content, f"{name}.content", where)
    return message


def _without_older_form(message: dict[str, Any], name: str, where: str) -> dict[str, Any]:
    """Return a message of OpenAI's older form, with one function_call, in the newer one."""
    if message["role"] == "function":
        message = {**message, "role": "tool"}
    if "function_call" not in message:
        return message
    if "tool_calls" in message:
        raise DataError(f"{where}: {name} has function_call and tool_calls; keep one of them")
    call = message["function_call"]
    if not isinstance(call, dict):
        raise DataError(
            f"{where}: {name}.function_call must be an object of name and arguments, found "
            f"{describe(call)}"
        )
    # Its own name is in errors.
    check_calls([call], f"{name}.function_call", where)
    rest = {key: value for key, value in message.items() if key != "function_call"}
    return {**rest, "tool_calls": [{"type": "function", "function": call}]}


def _call_message(text: str, name: str, where: str) -> Mapping[str, Any]:
    """Return the message of an assistant that calls tools, by the JSON of one call or several."""
    calls = check_calls(text if text.lstrip().startswith("[") else f"[{text}]", name, where)
    functions = [{"type": "function", "function": call.get("function", call)} for call in calls]
    return {"role": "assistant", "content": "", "tool_calls": functions}


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
