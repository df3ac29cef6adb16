"""A tokenizer's chat template, and the parts of it that are the same in every conversation."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from liger_cli.data.rendering import render_chat, render_marked
from liger_cli.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["ChatTemplate", "Message", "Span"]

Message = Mapping[str, Any]
# Where a piece of text begins, and where it has ended.
Span = tuple[int, int]

# Private characters: in no text, and no template trims or splits at them.
_MARKS = "\ue000\ue001\ue002\ue003"


@dataclass(frozen=True)
class ChatTemplate:
    """Render conversations.

    Args:
        tokenizer: Gives the template its special tokens.
        source: The template, in Jinja.
        variables: What it may read beside the conversation, such as enable_thinking.
    """

    tokenizer: PreTrainedTokenizerBase
    source: str
    variables: Mapping[str, Any] = field(default_factory=dict)

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Message] = (),
        where: str = "",
        *,
        prompt: bool = False,
    ) -> str:
        """Return the text of a conversation.

        Args:
            messages: With role and content at least; the template decides what else it shows.
            tools: Descriptions of tools.
            where: Names the row in an error.
            prompt: Whether the generation prompt follows.

        Raises:
            DataError: The template refuses the conversation.
        """
        with _template_errors(where):
            return render_chat(
                self.tokenizer,
                messages,
                self.source,
                tools,
                prompt=prompt,
                variables=self.variables,
            )

    @cached_property
    def marks_generation(self) -> bool:
        """Whether the template marks the answers with {% generation %}."""
        return re.search(r"\{%[-+]?\s*generation\b", self.source) is not None

    def generation_blocks(
        self, messages: Sequence[Message], tools: Sequence[Message], where: str
    ) -> list[Span]:
        """Return where the {% generation %} blocks are in the rendered conversation."""
        with _template_errors(where):
            _, spans = render_marked(
                self.tokenizer, messages, self.source, tools, variables=self.variables
            )
        return [(start, end) for start, end in spans if start < end]

    @cached_property
    def special(self) -> re.Pattern[str]:
        """Match any special token, and the longest where one is the start of another."""
        added = self.tokenizer.added_tokens_decoder.values()
        words = {token.content for token in added if token.special}
        words |= set(self.tokenizer.all_special_tokens)
        return re.compile("|".join(map(re.escape, sorted(words, key=len, reverse=True))) or "(?!)")

    @cached_property
    def generation_prompt(self) -> str | None:
        """The text of add_generation_prompt; None where a message of the user alone is refused."""
        question = [{"role": "user", "content": _MARKS[0]}]
        try:
            asked, plain = self.render(question, prompt=True), self.render(question)
        except DataError:
            return None
        return asked[len(os.path.commonprefix([asked, plain])) :]

    def has_generation_prompt(
        self, messages: Sequence[Message], tools: Sequence[Message], where: str
    ) -> bool:
        """Return whether the template asks for the answer to these messages."""
        if self.generation_prompt is not None:
            return bool(self.generation_prompt)
        asked = self.render(messages, tools, where, prompt=True)
        return asked != self.render(messages, tools, where)

    @cached_property
    def _pieces(self) -> list[str] | None:
        """The marks around the texts of two questions and answers; None where they are refused."""
        roles = ("user", "assistant", "user", "assistant")
        messages = [
            {"role": role, "content": mark} for role, mark in zip(roles, _MARKS, strict=True)
        ]
        try:
            pieces = re.split(f"[{_MARKS}]", self.render(messages))
        except DataError:
            return None
        return pieces if len(pieces) == len(messages) + 1 else None

    @property
    def _ends(self) -> tuple[str, str]:
        """The text after an answer in the middle of a conversation, and at its end."""
        return (self._pieces[2], self._pieces[4]) if self._pieces else ("", "")

    @cached_property
    def special_ends(self) -> frozenset[str]:
        """The special tokens that end an answer."""
        middle, last = (self.special.match(tail.lstrip()) for tail in self._ends)
        found = {match.group() for match in (middle, last) if match}
        if middle and self._pieces and not (last and middle.group() == last.group()):
            # It may begin the next message, as it does the first.
            opening, follows = self._pieces[0], self._pieces[2]
            if opening.endswith(follows) and middle.group() != self.tokenizer.eos_token:
                found.remove(middle.group())
        return frozenset(found)

    @cached_property
    def plain_end(self) -> str:
        """The mark that ends an answer where it is ordinary text to the tokenizer."""
        if self.special_ends:
            return ""
        common = os.path.commonprefix(self._ends)
        if common not in self._ends and common[-1:].strip():
            # Two words that follow the mark begin alike.
            common = common[: max(map(common.rfind, " \n")) + 1] or common
        return common.rstrip()

    def has_no_end(self, *, is_last: bool) -> bool:
        """Return whether the template is known to write no mark behind an answer.

        Args:
            is_last: Whether the conversation ends with the answer.
        """
        special = self.special.match(self._ends[is_last].lstrip())
        is_end = special is not None and special.group() in self.special_ends
        return self._pieces is not None and not is_end and not self.plain_end


@contextmanager
def _template_errors(where: str) -> Iterator[None]:
    """Turn what a template raises into a DataError; it is a program that sees the user's rows."""
    try:
        yield
    except Exception as error:
        raise DataError(
            f"{where}: the chat template refuses this conversation: {error or repr(error)}"
        ) from error
