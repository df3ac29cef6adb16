"""Find where each answer of a rendered conversation begins and ends.

An answer runs from the end of the generation prompt to the mark that ends its turn. A template may
write a turn otherwise once others follow it, so what is looked for in the final rendering is what
surrounds a turn: between the last text before it, whose place is known, and the next.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from liger_cli.data.marks import MarkedText, Unit
from liger_cli.data.template import ChatTemplate, Message, Span
from liger_cli.errors import DataError

__all__ = ["Turns"]


@dataclass(frozen=True)
class Turns:
    """The turns of one rendered conversation.

    Args:
        template: That rendered it.
        marked: The rendering and the places of its texts.
        where: Names the row in an error.
    """

    template: ChatTemplate
    marked: MarkedText
    messages: Sequence[Message]
    tools: Sequence[Message]
    where: str

    def answers(self) -> dict[int, Span]:
        """Return the place of each assistant message by its number.

        Raises:
            DataError: One has no sure place.
        """
        spans: dict[int, Span] = {}
        position = 0
        for i, message in enumerate(self.messages):
            if message["role"] != "assistant":
                continue
            begin = self._begin(i)
            end = None if begin is None else self._end(i, begin)
            if (
                begin is None
                or end is None
                or not position <= begin <= end
                or not self.marked.is_apart(i, (begin, end))
            ):
                raise DataError(
                    f"{self.where}: the chat template changes assistant message {i} or what is "
                    "around it, so the text to train on has no sure place",
                    hint="use a template with {% generation %}, or rows of prompt and completion",
                )
            spans[i] = (begin, end)
            position = end
        return spans

    def _begin(self, i: int) -> int | None:
        first = self.marked.first_of(i)
        if first and (usual := self._after_usual_prompt(*first)) is not None:
            return usual
        try:
            return self._after_prompt(i, first) if i else self._of_content(i, first)
        except DataError:
            return self._of_content(i, first)

    def _after_usual_prompt(self, unit: Unit, place: int) -> int | None:
        """Return the end of the generation prompt if a text begins there."""
        prompt = self.template.generation_prompt
        leads = dict.fromkeys((unit.lead, "")) if unit.kind == "content" else ("",)
        for lead in leads:
            if prompt and self.marked.text.endswith(prompt + lead, 0, place):
                return place - len(lead)
        return None

    def _after_prompt(self, i: int, first: tuple[Unit, int] | None) -> int | None:
        """Return the end of the prompt that is rendered for the messages before."""
        before = self.messages[:i]
        if not self.template.has_generation_prompt(before, self.tools, self.where):
            return self._of_content(i, first)
        prompt, places = self._render(i, prompt=True)
        there, here = self.marked.anchor(places, i)
        prompt, rest = prompt[there:], self.marked.text[here:]
        if rest.startswith(prompt):
            return here + len(prompt)
        # A prompt may end with the opening of a thought, which the template does not keep.
        common = len(os.path.commonprefix([prompt, rest]))
        if first:
            common = min(common, first[1] - here)
        is_at_text = first is not None and first[1] == here + common
        if is_at_text or not prompt[common:].strip():
            return here + common
        return self._of_content(i, first)

    def _of_content(self, i: int, first: tuple[Unit, int] | None) -> int | None:
        """Return where the first text of an answer begins, or a content would."""
        text = self.marked.text
        if first and first[0].kind == "content":
            unit, place = first
            return place - len(unit.lead) if text.endswith(unit.lead, 0, place) else place
        # Calls and thoughts have marks before them that belong to the answer. What follows the
        # answer may change what is before it, and may not go with a content alone.
        for later in (self.messages[i + 1 :], ()):
            if (begin := self._of_spare_content(i, later)) is not None:
                return begin
        return None

    def _of_spare_content(self, i: int, later: Sequence[Message]) -> int | None:
        """Return where a content in place of an answer would begin, before other messages."""
        mark, text = self.marked.spare, self.marked.text
        try:
            rendered, places = self._render(i, [{"role": "assistant", "content": mark}, *later])
        except DataError:
            return None
        there, here = self.marked.anchor(places, i)
        header, shown, _ = rendered[there:].partition(mark)
        common = len(os.path.commonprefix([header, text[here:]]))
        return here + common if shown and not header[common:].strip() else None

    def _end(self, i: int, begin: int) -> int | None:
        last = self.marked.last_of(i)
        place = max(begin, last[1]) if last else begin
        is_content = last is not None and last[0].kind == "content"
        has_calls = bool(self.messages[i].get("tool_calls"))
        text = last[0].text if last and is_content else ""
        trail = text[len(text.rstrip()) :] if text.strip() else ""
        if (is_content or not has_calls) and (end := self._mark_at(place, trail)):
            return end
        if end := self._last_mark(i, place):
            return end
        if has_calls or not self.template.has_no_end(is_last=i + 1 == len(self.messages)):
            return None
        return place + (len(trail) if self.marked.text.startswith(trail, place) else 0)

    def _mark_at(self, place: int, trail: str) -> int | None:
        """Return where the mark that ends a turn has ended, if the mark is next in the text."""
        text = self.marked.text
        start = len(text) - len(text[place:].lstrip())
        special = self.template.special.match(text, start)
        if special and special.group() in self.template.special_ends:
            return special.end()
        plain = self.template.plain_end
        for space in dict.fromkeys((trail, "")):
            if plain and text.startswith(space + plain, place):
                return place + len(space + plain)
        return None

    def _last_mark(self, i: int, place: int) -> int | None:
        """Return the end of the last mark that a turn has, whatever follows it."""
        text = self.marked.text
        is_last = i + 1 == len(self.messages)
        more = [{"role": "user", "content": "?"}] if is_last else []
        try:
            other, places = self._render(i + 1, more)
        except DataError:
            if not is_last:
                return None
            common = text[place:]
        else:
            there, here = self.marked.anchor(places, i + 1)
            agreed = here + len(os.path.commonprefix([other[there:], text[here:]]))
            common = text[place:agreed]
        if marks := list(self.template.special.finditer(common)):
            return place + marks[-1].end()
        plain = self.template.plain_end
        return place + common.rindex(plain) + len(plain) if plain and plain in common else None

    def _render(
        self, num_messages: int, more: Sequence[Message] = (), *, prompt: bool = False
    ) -> tuple[str, dict[int, list[int]]]:
        """Return the text of the first messages and more, and the places of the first's marks."""
        messages = self.marked.mark([*self.messages[:num_messages], *more], num_messages)
        rendered = self.template.render(messages, self.tools, self.where, prompt=prompt)
        return self.marked.read(rendered)
