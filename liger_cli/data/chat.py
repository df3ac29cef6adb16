"""Finds what the assistant says in a conversation that a chat template has rendered.

A template may trim contents, move the system message or write between a header and a content, so a
place is never computed from the messages. Three ways, the first that applies:

1. The template marks what the assistant generates with {% generation %}: those parts.
2. The conversation is rendered again with a mark in place of each assistant content. What surrounds
   the marks is the template's own, and the contents are what the real rendering has between.
3. For an assistant message that is more than its content (tool calls, thoughts that the template
   lays out): from the end of the generation prompt to the end of the turn.

Where none gives a sure answer the conversation is refused. The trained parts are each content and
the mark that ends its turn, which a model has to learn to write, and nothing else.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from liger_cli.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["ChatRenderer", "Segment"]

Message = Mapping[str, Any]
Span = tuple[int, int]

# A private character: in no text, and no template trims or splits at it.
_MARK = "\ue000"


class Segment(NamedTuple):
    """A piece of text, and whether it is trained on."""

    text: str
    is_trained: bool


@dataclass(frozen=True)
class ChatRenderer:
    """Renders conversations with a tokenizer's template and finds the assistant's parts.

    Args:
        tokenizer: With a chat template.
        template: Instead of the tokenizer's, where a processor has one that shows images.
        tools: Descriptions of the tools that the template tells the model of.
    """

    tokenizer: PreTrainedTokenizerBase
    template: str | None = None
    tools: tuple[Message, ...] = ()

    def with_tools(self, tools: tuple[Message, ...]) -> ChatRenderer:
        """Returns a renderer of conversations that have these tools."""
        return replace(self, tools=tools) if tools != self.tools else self

    def segments(self, messages: Sequence[Message], where: str) -> list[Segment]:
        """Returns the rendered conversation cut at the borders of the trained parts.

        Args:
            messages: With role and content at least; what else they have is the template's.
            where: Names the row in an error.

        Raises:
            DataError: The template refuses the conversation, or changes what the assistant says.
        """
        self._check_tool_calls(messages, where)
        if self._marks_generation:
            text, spans = self._marked_by_template(messages, where)
        else:
            text = self._render(messages, where)
            between = self._between_marks(text, messages, where)
            spans = self._after_prompts(text, messages, where) if between is None else between
        return [segment for segment in _cut(text, spans) if segment.text]

    def _check_tool_calls(self, messages: Sequence[Message], where: str) -> None:
        """Refuses calls that the template leaves out: the turn would be trained without them."""
        if not any(message.get("tool_calls") for message in messages):
            return
        without = [
            {key: value for key, value in message.items() if key != "tool_calls"}
            for message in messages
        ]
        try:
            is_shown = self._render(without, where) != self._render(messages, where)
        except DataError:
            # A turn that has neither content nor calls: it is the calls that the template wants.
            return
        if not is_shown:
            raise DataError(
                f"{where}: the chat template does not show tool_calls",
                hint="take a model whose template does, or write the calls into the content",
            )

    def render(self, messages: Sequence[Message]) -> str:
        """Returns the text of a conversation."""
        return self._render(messages, "")

    @cached_property
    def _template(self) -> str:
        if self.template is not None:
            return self.template
        if not getattr(self.tokenizer, "chat_template", None):
            raise DataError(
                "the data are conversations, and this model's tokenizer has no chat template",
                hint="take a chat model, or rows of prompt and completion",
            )
        return self.tokenizer.get_chat_template(tools=self._given_tools)

    @property
    def _given_tools(self) -> list[dict[str, Any]] | None:
        return [dict(tool) for tool in self.tools] or None

    @cached_property
    def _marks_generation(self) -> bool:
        return re.search(r"\{%[-+]?\s*generation\b", self._template) is not None

    @cached_property
    def _special(self) -> re.Pattern[str]:
        """Matches any special token, and the longest where one is the start of another."""
        added = self.tokenizer.added_tokens_decoder.values()
        words = {token.content for token in added if token.special}
        words |= set(self.tokenizer.all_special_tokens)
        return re.compile("|".join(map(re.escape, sorted(words, key=len, reverse=True))) or "(?!)")

    @cached_property
    def _usual_end_of_turn(self) -> str:
        """What follows every assistant content; empty where that cannot be found out."""
        roles = ("user", "assistant", "user", "assistant")
        messages = [{"role": role, "content": f"{_MARK}{i}"} for i, role in enumerate(roles)]
        try:
            text = self._render(messages, "")
        except DataError:
            return ""
        tails = [text.partition(f"{_MARK}{i}")[2] for i in (1, 3)]
        special = self._special.match(tails[0])
        return special.group() if special else os.path.commonprefix(tails).rstrip()

    def _render(self, messages: Sequence[Message], where: str, prompt: bool = False) -> str:
        with _template_errors(where):
            return self.tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                chat_template=self._template,
                tools=self._given_tools,
                tokenize=False,
                add_generation_prompt=prompt,
            )

    def _marked_by_template(
        self, messages: Sequence[Message], where: str
    ) -> tuple[str, list[Span]]:
        # The tokenizer's own mask also takes a token that begins before the marked part.
        from transformers.utils.chat_template_utils import render_jinja_template

        with _template_errors(where):
            texts, spans = render_jinja_template(
                conversations=[[dict(message) for message in messages]],
                tools=self._given_tools,
                chat_template=self._template,
                return_assistant_tokens_mask=True,
                **self.tokenizer.special_tokens_map,
            )
        return texts[0], [(start, end) for start, end in spans[0] if start < end]

    def _between_marks(
        self, text: str, messages: Sequence[Message], where: str
    ) -> list[Span] | None:
        spoken = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if _MARK in text or self._shows_more_than_contents(text, messages, where):
            return None
        marked = [
            {**message, "content": f"{_MARK}{i}{_MARK}"} if i in spoken else message
            for i, message in enumerate(messages)
        ]
        parts = re.split(f"{_MARK}(\\d+){_MARK}", self._render(marked, where))
        surroundings, order = parts[::2], [int(number) for number in parts[1::2]]
        if order != spoken or not text.startswith(surroundings[0]):
            return None
        spans = []
        position = len(surroundings[0])
        for i, after in zip(spoken, surroundings[1:], strict=True):
            for shown in _trimmings(messages[i]["content"]):
                if text.startswith(shown + after, position):
                    break
            else:
                return None
            end = position + len(shown)
            if shown:
                spans.append((position, end + self._end_of_turn(after)))
            position = end + len(after)
        return spans if position == len(text) else None

    def _shows_more_than_contents(self, text: str, messages: Sequence[Message], where: str) -> bool:
        """Says whether the rendering has tool calls or thoughts out of other keys of a message."""
        bare = [
            _without_extras(message) if message["role"] == "assistant" else message
            for message in messages
        ]
        return bare != list(messages) and self._render(bare, where) != text

    def _end_of_turn(self, after: str) -> int:
        """Returns the length of the mark that ends a turn, in the text that follows a content."""
        start = len(after) - len(after.lstrip())
        if special := self._special.match(after, start):
            return special.end()
        # A mark that is ordinary text to the tokenizer.
        usual = self._usual_end_of_turn
        return len(usual) if after.startswith(usual) else 0

    def _after_prompts(self, text: str, messages: Sequence[Message], where: str) -> list[Span]:
        spans: list[Span] = []
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            span = self._after_prompt(text, messages, i, where)
            if span is None or (spans and span[0] < spans[-1][1]):
                raise DataError(
                    f"{where}: the chat template changes assistant message {i} or what comes "
                    "before it, so the text to train on has no sure place",
                    hint="use a template with {% generation %}, or rows of prompt and completion",
                )
            spans.append(span)
        return spans

    def _after_prompt(
        self, text: str, messages: Sequence[Message], i: int, where: str
    ) -> Span | None:
        """Returns the place of assistant message i, whose turn begins where its prompt ends."""
        prompt = self._render(messages[:i], where, prompt=True) if i else ""
        if not prompt or not text.startswith(prompt):
            return None
        start = len(prompt)
        return (
            self._bare_content(text, messages, i, start, where)
            or self._last_turn(text, messages, i, start, where)
            or self._before_next(text, messages, i, start, where)
        )

    def _bare_content(
        self, text: str, messages: Sequence[Message], i: int, start: int, where: str
    ) -> Span | None:
        """Returns the place of a turn that shows the content as it is and nothing else."""
        if messages[i] != _without_extras(messages[i]):
            return None
        marked = self._render([*messages[:i], {**messages[i], "content": _MARK}], where)
        for lead in ("", marked[start:].partition(_MARK)[0]):
            for shown in _trimmings(messages[i]["content"]):
                if not shown or not text.startswith(lead + shown, start):
                    continue
                end = start + len(lead) + len(shown)
                if mark := self._end_of_turn(text[end:]):
                    return end - len(shown), end + mark
        return None

    def _last_turn(
        self, text: str, messages: Sequence[Message], i: int, start: int, where: str
    ) -> Span | None:
        """Returns the place of a turn that is the same when the conversation ends with it."""
        turns = self._render(messages[: i + 1], where)
        # A template may close the last turn in a way of its own: the text agrees up to there.
        end = len(os.path.commonprefix([text, turns]))
        if marks := list(self._special.finditer(text, start, max(start, end))):
            last = marks[-1].end()
            if not self._special.sub("", turns[last:]).strip():
                return start, last
        return (start, end) if start < end == len(turns) else None

    def _before_next(
        self, text: str, messages: Sequence[Message], i: int, start: int, where: str
    ) -> Span | None:
        """Returns the place of a turn that the template writes otherwise when it is the last."""
        if i + 1 == len(messages):
            return None
        through = [*messages[: i + 1], {**messages[i + 1], "content": _MARK}]
        end = len(os.path.commonprefix([text, self._render(through, where)]))
        mark = self._usual_end_of_turn
        if not mark or text.count(mark, start, end) != 1:
            return None
        return start, text.index(mark, start) + len(mark)


def _without_extras(message: Message) -> Message:
    return {"role": message["role"], "content": message["content"]}


def _trimmings(content: str) -> tuple[str, ...]:
    """Returns a content as templates write it."""
    return content, content.strip(), content.rstrip(), content.lstrip()


def _cut(text: str, spans: Sequence[Span]) -> Iterator[Segment]:
    position = 0
    for start, end in spans:
        yield Segment(text[position:start], False)
        yield Segment(text[start:end], True)
        position = end
    yield Segment(text[position:], False)


@contextmanager
def _template_errors(where: str) -> Iterator[None]:
    """Turns what a template raises into a DataError; it is a program that sees the user's rows."""
    try:
        yield
    except Exception as error:
        raise DataError(
            f"{where}: the chat template refuses this conversation: {error or repr(error)}"
        ) from error
