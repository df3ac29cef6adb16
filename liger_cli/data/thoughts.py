"""The thoughts of answers: which of them a row keeps before a template renders it.

A thought is in a key of its message, or in its content between <think> and </think>; the mark that
opens it may lack, where the prompt has it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from liger_cli.data.marks import THOUGHT_KEYS
from liger_cli.data.template import Message
from liger_cli.errors import DataError

__all__ = ["REMOVED", "Reasoning", "choose_thoughts"]

Reasoning = Literal["keep", "last", "drop"]

# What is left out of a row on purpose, by its name in reports.
REMOVED = "answers whose thoughts are left out (reasoning)"

_THOUGHT = re.compile(r"\A(?:(?!<think>).)*?</think>\s*|<think>.*?</think>\s*", re.DOTALL)


def choose_thoughts(
    messages: Sequence[Message], reasoning: Reasoning | None, where: str
) -> tuple[Sequence[Message], int]:
    """Return messages with the thoughts to keep, and how many answers have lost some.

    Args:
        messages: With role and content at least.
        reasoning: drop leaves out all, last those before the last message of the user, keep and
            None none.
        where: Names the row in an error.

    Raises:
        DataError: A thought that is to be left out has no end.
    """
    if reasoning in (None, "keep"):
        return messages, 0
    is_asked = [i for i, message in enumerate(messages) if message["role"] == "user"]
    first_kept = is_asked[-1] if is_asked and reasoning == "last" else len(messages)
    if reasoning == "last" and not is_asked:
        first_kept = 0
    chosen = [
        _without(message, f"{where}: assistant message {i}")
        if i < first_kept and message["role"] == "assistant"
        else message
        for i, message in enumerate(messages)
    ]
    return chosen, sum(a != b for a, b in zip(chosen, messages, strict=True))


def _without(message: Message, name: str) -> Message:
    kept: dict[str, Any] = {
        key: value
        for key, value in message.items()
        if key not in THOUGHT_KEYS or not isinstance(value, str)
    }
    content = message["content"]
    if isinstance(content, str):
        kept["content"] = _plain(content, name)
    else:
        kept["content"] = [_plain_part(part, name) for part in content]
    return kept


def _plain_part(part: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    return {**part, "text": _plain(part["text"], name)} if part["type"] == "text" else part


def _plain(content: str, name: str) -> str:
    plain = _THOUGHT.sub("", content)
    if "<think>" in plain:
        raise DataError(
            f"{name} opens a <think> that it does not close, and reasoning leaves thoughts out",
            hint="close it with </think>, or set reasoning to keep",
        )
    return plain
