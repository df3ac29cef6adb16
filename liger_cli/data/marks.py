"""Find the texts of a conversation in its rendering.

A template may trim a text, move it or write it twice, so its place is never computed. The
conversation is rendered a second time with private characters around each text. If the rendering
without these characters is the first one, their places are those of the texts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

from liger_cli.data.template import Message, Span
from liger_cli.errors import DataError

__all__ = ["THOUGHT_KEYS", "MarkedText", "Unit"]

# The keys in which a message may have thoughts apart from its content.
THOUGHT_KEYS = ("reasoning_content", "reasoning", "thinking")

_PRIVATE = range(0xF0000, 0xFFFFE)


class Unit(NamedTuple):
    """A text of a message: its content, a part of it, a thought or the name of a called tool.

    Args:
        message: The number of the message.
        path: The keys that lead to the text in the message.
    """

    message: int
    kind: Literal["content", "thought", "call"]
    path: tuple[Any, ...]
    text: str

    @property
    def core(self) -> str:
        return self.text.strip()

    @property
    def lead(self) -> str:
        """The white space before the text."""
        return self.text[: len(self.text) - len(self.text.lstrip())]

    @classmethod
    def all_of(cls, messages: Sequence[Message]) -> list[Unit]:
        """Return the texts of a conversation, in its order."""
        return [
            cls(number, *found)
            for number, message in enumerate(messages)
            for found in _texts(message)
        ]


def _texts(message: Message) -> Iterator[tuple[Any, tuple[Any, ...], str]]:
    for key in THOUGHT_KEYS:
        if isinstance(message.get(key), str):
            yield "thought", (key,), message[key]
    content = message["content"]
    if isinstance(content, str):
        yield "content", ("content",), content
    else:
        for number, part in enumerate(content):
            if part["type"] == "text":
                yield "content", ("content", number, "text"), part["text"]
    for number, call in enumerate(message.get("tool_calls") or ()):
        path = ("function", "name") if "function" in call else ("name",)
        name = (call.get("function") or call)["name"]
        yield "call", ("tool_calls", number, *path), name


@dataclass(frozen=True)
class MarkedText:
    """A rendered conversation, and where its texts are in it.

    Args:
        text: The rendering.
        units: The texts that could be marked.
        places: Of each mark, every place in the text; units[i] is between marks 2i and 2i + 1.
        first: The number of the first private character that is used.
    """

    text: str
    units: tuple[Unit, ...]
    places: dict[int, list[int]]
    first: int

    @classmethod
    def of(
        cls, text: str, messages: Sequence[Message], render: Callable[[Sequence[Message]], str]
    ) -> MarkedText:
        """Return the text with as many of its units marked as leave it as it is.

        Args:
            text: The rendered messages.
            render: Renders messages.
        """
        units = Unit.all_of(messages)
        used = [ord(char) for char in text if ord(char) in _PRIVATE]
        found = cls(text, (), {}, max(used, default=_PRIVATE.start - 1) + 1)
        if 2 * len(units) + 2 > _PRIVATE.stop - found.first:
            return found
        # A template may ask whether a text is empty, or how it begins: then fewer are marked.
        for chosen in (units, [unit for unit in units if unit.core]):
            if marked := found._with(chosen, messages, render):
                return marked
        for unit in units:
            found = found._with([*found.units, unit], messages, render) or found
        return found

    def _with(
        self,
        units: Sequence[Unit],
        messages: Sequence[Message],
        render: Callable[[Sequence[Message]], str],
    ) -> MarkedText | None:
        marked = MarkedText(self.text, tuple(units), {}, self.first)
        try:
            text, places = marked.read(render(marked.mark(messages, len(messages))))
        except DataError:
            return None
        return MarkedText(text, tuple(units), places, self.first) if text == self.text else None

    def mark(self, messages: Sequence[Message], num_marked: int) -> list[Message]:
        """Return messages with marks in so many, the first, which are the conversation's."""
        marked = list(messages)
        for number, unit in enumerate(self.units):
            if unit.message < num_marked:
                begin, end = (chr(self.first + 2 * number + i) for i in (0, 1))
                lead, rest = unit.lead, unit.text[len(unit.lead) + len(unit.core) :]
                text = lead + begin + unit.core + end + rest
                marked[unit.message] = _replaced(marked[unit.message], unit.path, text)
        return marked

    def read(self, marked: str) -> tuple[str, dict[int, list[int]]]:
        """Return a marked text without its marks, and the places of each."""
        pieces = self._pattern.split(marked)
        places: dict[int, list[int]] = {}
        position = 0
        for piece, mark in zip(pieces[::2], [*pieces[1::2], ""], strict=True):
            position += len(piece)
            if mark:
                places.setdefault(ord(mark) - self.first, []).append(position)
        return "".join(pieces[::2]), places

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        last = self.first + max(2 * len(self.units) - 1, 0)
        return re.compile(f"([{chr(self.first)}-{chr(last)}])")

    @property
    def spare(self) -> str:
        """A private character that is in no text and marks nothing."""
        return chr(self.first + 2 * len(self.units) + 1)

    @cached_property
    def _numbers(self) -> dict[Unit, int]:
        return {unit: number for number, unit in enumerate(self.units)}

    def is_marked(self, unit: Unit) -> bool:
        return unit in self._numbers

    def is_shown(self, unit: Unit) -> bool:
        """Return whether a mark of the unit, which is marked, is in the text."""
        number = 2 * self._numbers[unit]
        return number in self.places or number + 1 in self.places

    def spans(self, unit: Unit) -> list[Span]:
        """Return the places of a unit of which both marks are shown."""
        number = 2 * self._numbers[unit]
        begins, ends = (self.places.get(number + i, []) for i in (0, 1))
        return list(zip(begins, ends, strict=True)) if len(begins) == len(ends) else []

    def first_of(self, message: int) -> tuple[Unit, int] | None:
        """Return the first text of a message that is shown, and where it begins."""
        shown = self._of(message, 0)
        return min(shown, key=lambda pair: pair[1]) if shown else None

    def last_of(self, message: int) -> tuple[Unit, int] | None:
        """Return the last text of a message that is shown, and where it has ended."""
        shown = self._of(message, 1)
        return max(shown, key=lambda pair: pair[1]) if shown else None

    def _of(self, message: int, side: int) -> list[tuple[Unit, int]]:
        pick = (min, max)[side]
        return [
            (unit, pick(self.places[2 * number + side]))
            for number, unit in enumerate(self.units)
            if unit.message == message and 2 * number + side in self.places
        ]

    def is_apart(self, message: int, span: Span) -> bool:
        """Return whether no text of another message begins or ends within a span."""
        begin, end = span
        return not any(
            begin < place < end
            for mark, places in self.places.items()
            if self.units[mark // 2].message != message
            for place in places
        )

    def anchor(self, places: dict[int, list[int]], end: int) -> Span:
        """Return the last common place of another rendering and this one.

        Args:
            places: Of the marks in the other rendering.
            end: Marks of messages from this number on do not count.

        Returns:
            The place in the other rendering and in this one; the beginnings if none is common.
        """
        common = [
            (places[mark][0], self.places[mark][0])
            for mark in places
            if len(places[mark]) == len(self.places.get(mark, ())) == 1
            and self.units[mark // 2].message < end
        ]
        return max(common, default=(0, 0))


def _replaced(value: Any, path: tuple[Any, ...], text: str) -> Any:
    """Return a copy of nested lists and objects with another text at a path."""
    if not path:
        return text
    copy = list(value) if isinstance(value, list | tuple) else dict(value)
    copy[path[0]] = _replaced(copy[path[0]], path[1:], text)
    return copy
