"""Rows of OASST: a message a row, each with the message that it answers, read as conversations.

A conversation is the way from a first message to an answer that nothing else follows but messages
of the prompter. Where ways have their beginning in common, an answer in it is trained in the first
of them and is history in the others, so that each answer is trained once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

from liger_cli.common.readers import JsonError, parse_json
from liger_cli.errors import DataError

__all__ = ["Thread", "conversations_of"]

_COLUMNS = ("message_id", "parent_id", "text", "role")
_ROLES = {"prompter": "user", "assistant": "assistant"}

Record = tuple[str, Any]


class Thread(dict[str, Any]):
    """A conversation as a row of messages.

    Attributes:
        used: The columns of the data that are in it.
        unused: Those that are not.
    """

    used: tuple[str, ...] = (*_COLUMNS[:2], "text as content", "role")
    unused: tuple[str, ...] = ()


def conversations_of(records: Iterator[Record]) -> Iterator[Record]:
    """Yield the conversations of rows of OASST; rows of any other kind as they are.

    Raises:
        DataError: A row of OASST cannot be read, or answers a message that is not there.
    """
    first = next(records, None)
    if first is None:
        return
    all_records = chain([first], records)
    if _is_message(_parsed(first)):
        yield from _threads(all_records)
    else:
        yield from all_records


def _is_message(content: Any) -> bool:
    # A first message has no parent, which a table without nulls leaves out.
    return (
        isinstance(content, dict)
        and {"message_id", "text", "role"} <= set(content)
        and ("parent_id" in content or "message_tree_id" in content)
    )


def _parsed(record: Record) -> Any:
    where, content = record
    if not isinstance(content, bytes):
        return content
    try:
        return parse_json(content.decode("utf-8-sig"))
    except (JsonError, UnicodeDecodeError):
        # The reader of rows names the reason.
        return None


def _threads(records: Iterator[Record]) -> Iterator[Record]:
    messages: dict[str, tuple[str, Mapping[str, Any]]] = {}
    children: dict[str, list[str]] = {}
    columns: dict[str, None] = {}
    for record in records:
        where, content = record[0], _parsed(record)
        _check(content, where)
        name, parent = content["message_id"], content.get("parent_id") or ""
        if name in messages:
            raise DataError(
                f"{where}: the message_id {name!r} is there twice, first at {messages[name][0]}"
            )
        messages[name] = (where, content)
        children.setdefault(parent, []).append(name)
        columns |= dict.fromkeys(key for key, value in content.items() if value not in (None, ""))
    unused = tuple(name for name in columns if name not in _COLUMNS)
    for parent, answers in children.items():
        if parent and parent not in messages:
            raise DataError(
                f"{messages[answers[0]][0]}: parent_id {parent!r} is the message_id of no row",
                hint="a file of OASST holds whole trees; columns: {text: text} trains each message "
                "as a text",
            )
    _check_trees(children, messages)
    seen: set[str] = set()
    for path in _paths(children, messages):
        thread = Thread(messages=[_message(messages[name][1], name in seen) for name in path])
        thread.unused = unused
        seen.update(path)
        yield messages[path[-1]][0], thread


def _check_trees(
    children: Mapping[str, list[str]], messages: Mapping[str, tuple[str, Mapping[str, Any]]]
) -> None:
    """Raise a DataError for messages that answer each other in a circle."""
    reached, waiting = set[str](), list(children.get("", []))
    while waiting:
        name = waiting.pop()
        reached.add(name)
        waiting += children.get(name, [])
    for name, (where, _) in messages.items():
        if name not in reached:
            raise DataError(f"{where}: the message {name!r} answers itself, by way of others")


def _check(content: Any, where: str) -> None:
    if not _is_message(content):
        raise DataError(
            f"{where}: the data start with messages of OASST, and this row has not all of "
            f"{', '.join(_COLUMNS)}"
        )
    for name in ("message_id", "text", "role"):
        if not isinstance(content[name], str):
            raise DataError(f"{where}: {name} must be a string")
    if content["role"] not in _ROLES:
        raise DataError(f"{where}: role is {content['role']!r}; allowed are {', '.join(_ROLES)}")


def _paths(
    children: Mapping[str, list[str]], messages: Mapping[str, tuple[str, Mapping[str, Any]]]
) -> Iterator[list[str]]:
    """Yield the ways to answers that no other answer is behind, in the order of the rows."""
    waiting = [[name] for name in reversed(children.get("", []))]
    while waiting:
        path = waiting.pop()
        following = children.get(path[-1], [])
        waiting += [[*path, name] for name in reversed(following)]
        is_end = not any(_has_answer(name, children, messages) for name in following)
        # A tree without an answer is a row too, which is counted as one with nothing to train on.
        if is_end and (len(path) == 1 or messages[path[-1]][1]["role"] == "assistant"):
            yield path


def _has_answer(
    name: str,
    children: Mapping[str, list[str]],
    messages: Mapping[str, tuple[str, Mapping[str, Any]]],
) -> bool:
    waiting = [name]
    while waiting:
        name = waiting.pop()
        if messages[name][1]["role"] == "assistant":
            return True
        waiting += children.get(name, [])
    return False


def _message(content: Mapping[str, Any], is_seen: bool) -> dict[str, Any]:
    message = {"role": _ROLES[content["role"]], "content": content["text"]}
    if message["role"] == "assistant" and is_seen:
        message["train"] = False
    return message
