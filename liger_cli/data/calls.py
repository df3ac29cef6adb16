"""Check the roles of messages and the tool calls in them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from liger_cli.errors import DataError

__all__ = ["check_calls", "check_role"]

_ROLES = ("system", "user", "assistant", "tool")
# Other names of the assistant and the user: a template that writes any role would show them, and
# nothing of them would be trained.
_OTHER_NAMES = {"gpt": "assistant", "bot": "assistant", "model": "assistant", "human": "user"}


def check_role(role: str, name: str, where: str) -> str:
    """Return a role that is not another spelling of one that chat templates know.

    Raises:
        DataError: It is one in other letters, or another name of the assistant or the user.
    """
    plain = role.strip().lower()
    known = _OTHER_NAMES.get(plain, plain)
    if known in _ROLES and role != known:
        raise DataError(f"{where}: {name}.role is {role!r}; write {known!r}")
    return role


def check_calls(calls: Any, name: str, where: str) -> list[Mapping[str, Any]]:
    """Return tool calls whose arguments are objects, as chat templates take them.

    Args:
        calls: A list of objects, or its JSON; each with function (name and arguments), or with name
            and arguments. The arguments are an object or, as OpenAI writes them, its JSON.
        name: Of the calls, for errors.
        where: Names the row in an error.

    Raises:
        DataError: They are something else.
    """
    if isinstance(calls, str):
        calls = _decoded(calls, name, where)
    if not isinstance(calls, list):
        raise DataError(f"{where}: {name} must be a list, found {_kind(calls)}")
    return [_check_call(call, f"{name}[{i}]", where) for i, call in enumerate(calls)]


def _check_call(call: Any, name: str, where: str) -> Mapping[str, Any]:
    if not isinstance(call, dict):
        raise DataError(f"{where}: {name} must be an object, found {_kind(call)}")
    # What is null is absent, as in a message.
    call = {key: value for key, value in call.items() if value is not None}
    if "function" in call:
        return {**call, "function": _check_function(call["function"], f"{name}.function", where)}
    return _check_function(call, name, where)


def _check_function(function: Any, name: str, where: str) -> Mapping[str, Any]:
    if not isinstance(function, dict):
        raise DataError(f"{where}: {name} must be an object, found {_kind(function)}")
    function = {key: value for key, value in function.items() if value is not None}
    if not isinstance(function.get("name"), str) or not function["name"].strip():
        found = _kind(function["name"]) if "name" in function else "nothing"
        raise DataError(f"{where}: {name}.name must be the name of a tool, found {found}")
    if "arguments" not in function:
        return function
    path, arguments = f"{name}.arguments", function["arguments"]
    if isinstance(arguments, str):
        arguments = _decoded(arguments, path, where)
        if not isinstance(arguments, dict):
            raise DataError(
                f"{where}: {path} must be the JSON of an object, not {_kind(arguments)}"
            )
    if not isinstance(arguments, dict):
        raise DataError(f"{where}: {path} must be an object or its JSON, found {_kind(arguments)}")
    try:
        json.dumps(arguments, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: {path} holds half of a surrogate pair, not text") from error
    return {**function, "arguments": arguments}


def _decoded(text: str, name: str, where: str) -> Any:
    try:
        return json.loads(text, parse_constant=_no_constant, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", None) or str(error)
        raise DataError(f"{where}: {name} is not JSON: {reason}: {text[:80]!r}") from error


def _no_constant(word: str) -> Any:
    raise ValueError(f"{word} is no number of JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} is there twice")
    return content


def _kind(value: Any) -> str:
    return json.dumps(value, default=str)[:60]
