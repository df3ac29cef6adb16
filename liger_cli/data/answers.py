"""Which answers of a conversation are trained, where its messages say so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from liger_cli.data.rows import Row
from liger_cli.errors import DataError

__all__ = ["EMPTY", "answer_weights", "num_empty_answers"]

# What is noted of a row that is trained, by its name in reports.
EMPTY = "answers without a text, of which the end alone is trained"

# Characters at the end of a content by which its place is recognised.
_TAIL = 20


def answer_weights(shown: Sequence[str], row: Row, *, assistant_only: bool) -> list[float]:
    """Return the weight of each answer as the template shows it, by the row's marks; 0: left out.

    Args:
        shown: The text of each trained part of the rendered conversation, in order.
        row: A conversation.
        assistant_only: Whether what others say is not trained anyway.

    Raises:
        DataError: A mark asks for what is not done, or an answer has no sure place.
    """
    if not any(mark is not None for mark in row.marks):
        return [1.0] * len(shown)
    for i, (message, mark) in enumerate(zip(row.messages, row.marks, strict=True)):
        if message["role"] == "assistant" or mark is None:
            continue
        if (mark > 0) is assistant_only or mark not in (0, 1):
            raise _no_answer(i, message["role"], mark, row.where, assistant_only)
    answers = [
        (message, 1.0 if mark is None else mark)
        for message, mark in zip(row.messages, row.marks, strict=True)
        if message["role"] == "assistant"
    ]
    if len(answers) != len(shown):
        # An answer without a text may show nothing.
        answers = [(message, weight) for message, weight in answers if _says_something(message)]
    is_sure = len(answers) == len(shown) and all(
        _tail(message) in text for (message, _), text in zip(answers, shown, strict=True)
    )
    weights = [float(weight) for _, weight in answers]
    if not is_sure and any(weight != 1 for weight in weights):
        what = "are marked not to be trained" if 0 in weights else "have a weight"
        raise DataError(
            f"{row.where}: some answers {what}, and the chat template does not show each answer as "
            "one text, so their place is not sure",
            hint="leave the row out, or cut it behind the last answer that is trained",
        )
    return weights if is_sure else [1.0] * len(shown)


def num_empty_answers(row: Row) -> int:
    """Return how many answers of a conversation are trained and say nothing."""
    if not row.is_trained:
        return 0
    marks = row.marks or [None] * len(row.messages)
    return sum(
        message["role"] == "assistant"
        and mark != 0
        and isinstance(message["content"], str)
        and not _says_something(message)
        for message, mark in list(zip(row.messages, marks, strict=True))[row.num_prompt :]
    )


def _no_answer(i: int, role: str, mark: float, where: str, assistant_only: bool) -> DataError:
    if mark not in (0, 1):
        return DataError(
            f"{where}: message {i} of {role} has the weight {mark:g}; only answers have one",
            hint="a weight of the row is that of all its tokens",
        )
    if assistant_only:
        return DataError(
            f"{where}: message {i} of {role} is marked to be trained; only answers are",
            hint="--no-assistant-only-loss trains whole conversations",
        )
    return DataError(
        f"{where}: message {i} of {role} is marked not to be trained, and assistant_only_loss: "
        "false trains whole conversations but for marked answers",
        hint="--assistant-only-loss trains only answers",
    )


def _says_something(message: Mapping[str, Any]) -> bool:
    return bool(_tail(message)) or set(message) > {"role", "content"}


def _tail(message: Mapping[str, Any]) -> str:
    content = message["content"]
    return content.strip()[-_TAIL:] if isinstance(content, str) else ""
