"""Check that a rendered conversation has every text of its messages."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from liger_cli.data.marks import MarkedText, Unit
from liger_cli.data.template import Message, Span
from liger_cli.errors import DataError

__all__ = ["OUTSIDE", "SYSTEM", "THOUGHTS", "ShownTexts"]

# What is left out of a row that is trained, by its name in reports.
SYSTEM = "system messages that the chat template drops or changes"
THOUGHTS = "answers without their thoughts, which the chat template does not show"
OUTSIDE = "answers outside of the {% generation %} blocks of the chat template"

_THOUGHT = re.compile(r"<think>(.*?)</think>", re.DOTALL)


@dataclass(frozen=True)
class ShownTexts:
    """The texts of a conversation, compared with its rendering.

    Args:
        marked: The rendering and the places of its texts.
        where: Names the row in an error.
    """

    marked: MarkedText
    messages: Sequence[Message]
    where: str

    def check(self) -> dict[str, int]:
        """Return how many system messages are not shown as they are.

        Raises:
            DataError: Another message or a call is not shown, or one is changed.
        """
        changed = set[int]()
        for unit in self._units:
            role = self.messages[unit.message]["role"]
            if unit.kind == "thought" or (state := self._state(unit)) == "shown":
                continue
            if unit.kind == "call":
                raise DataError(
                    f"{self.where}: the chat template does not show tool_calls",
                    hint="--chat-template chatml, or that of another model family or a file of "
                    "yours, shows them; or write the calls into the content",
                )
            if role == "system":
                changed.add(unit.message)
            elif role != "assistant" or "</think>" not in unit.text:
                raise self._refused(unit, "does not show" if state == "missing" else "changes")
        return {SYSTEM: len(changed)} if changed else {}

    def check_answers(self, answers: Mapping[int, Span]) -> dict[str, int]:
        """Return how many answers have thoughts that are not shown.

        Args:
            answers: The places of the assistant messages by their numbers.

        Raises:
            DataError: An answer is not at its place as it was written.
        """
        without = 0
        for i, (begin, end) in answers.items():
            text = self.marked.text[begin:end]
            is_lost = [self._loses_thought(unit, text) for unit in self._units if unit.message == i]
            without += any(is_lost)
            self._check_arguments(i, text)
        return {THOUGHTS: without} if without else {}

    def check_blocks(self, blocks: Sequence[Span]) -> dict[str, int]:
        """Return how many answers have thoughts that are not shown, and how many no block.

        Args:
            blocks: What the template marks with {% generation %}.

        Raises:
            DataError: An answer is not shown as it was written, or is partly in a block.
        """
        left_out = Counter(self.check_answers(self.anywhere))
        for unit in self._units:
            if unit.message not in self.anywhere or unit.kind != "content" or not unit.core:
                continue
            spans = self.marked.spans(unit) if self.marked.is_marked(unit) else []
            for begin, end in spans:
                held = sum(max(0, min(end, b) - max(begin, a)) for a, b in blocks)
                if not held:
                    left_out[OUTSIDE] += 1
                elif held < end - begin:
                    raise DataError(
                        f"{self.where}: a {{% generation %}} block of the chat template holds a "
                        f"part of assistant message {unit.message} and not all of it",
                        hint="a block within a macro or a set has no sure place",
                    )
        return left_out

    @cached_property
    def anywhere(self) -> dict[int, Span]:
        """The whole text as the place of each assistant message."""
        roles = [message["role"] for message in self.messages]
        whole = (0, len(self.marked.text))
        return {i: whole for i, role in enumerate(roles) if role == "assistant"}

    @cached_property
    def _units(self) -> list[Unit]:
        return Unit.all_of(self.messages)

    def _state(self, unit: Unit) -> Literal["shown", "changed", "missing"]:
        text, marked = self.marked.text, self.marked
        forms = {unit.core}
        if self.messages[unit.message]["role"] != "assistant":
            # Results of tools may be laid out as JSON.
            forms |= _as_json(unit.core)
        is_found = any(form in text for form in forms)
        if not unit.core:
            return "shown"
        if not marked.is_marked(unit):
            # The rendering depends on it: one that does not can be marked.
            return "shown" if is_found else "changed"
        if not marked.is_shown(unit):
            return "missing"
        spans = marked.spans(unit)
        is_same = any(text[begin:end] in forms for begin, end in spans) if spans else is_found
        return "shown" if is_same else "changed"

    def _loses_thought(self, unit: Unit, answer: str) -> bool:
        """Return whether a text of an answer has a thought that the answer has not."""
        if unit.kind == "thought":
            return bool(unit.core) and unit.core not in answer
        if unit.kind == "call" or unit.core in answer:
            return False
        said, thoughts = _without_thoughts(unit.text)
        if not thoughts or any(text not in answer for text in said):
            raise self._refused(unit, "changes")
        return any(thought not in answer for thought in thoughts)

    def _check_arguments(self, i: int, answer: str) -> None:
        """Refuse a call whose arguments the answer has not."""
        for call in self.messages[i].get("tool_calls") or ():
            arguments = (call.get("function") or call).get("arguments")
            if isinstance(arguments, str):
                arguments = json.loads(arguments)
            for text in _leaves(arguments):
                if text not in answer and not any(form in answer for form in _as_json(text)):
                    raise DataError(
                        f"{self.where}: the chat template does not show all arguments of "
                        f"tool_calls in assistant message {i}: {text[:60]!r} is missing"
                    )

    def _refused(self, unit: Unit, does: str) -> DataError:
        role = self.messages[unit.message]["role"]
        name = f"{role} message {unit.message}"
        return DataError(
            f"{self.where}: the chat template {does} {name}: {unit.core[:60]!r}",
            hint="the roles and texts of a row must be those that the model's template knows",
        )


def _without_thoughts(content: str) -> tuple[list[str], list[str]]:
    """Return the text of a content, and its thoughts; the mark that opens the first may lack."""
    before, close, _ = content.partition("</think>")
    if close and "<think>" not in before:
        content = f"<think>{content}"
    pieces = [piece.strip() for piece in _THOUGHT.split(content)]
    return [text for text in pieces[::2] if text], [text for text in pieces[1::2] if text]


def _leaves(value: Any) -> Iterator[str]:
    """Yield the keys and texts of nested objects and lists."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from value
        for part in value.values():
            yield from _leaves(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _leaves(part)


def _as_json(text: str) -> set[str]:
    return {json.dumps(text, ensure_ascii=is_ascii)[1:-1] for is_ascii in (True, False)}
