"""Conversations as a chat template renders them, and what of them is trained.

The trained part of an answer runs from the end of the generation prompt to the mark that ends the
turn, which a model has to learn to write. A template that marks the answers with {% generation %}
decides it. Every text of a conversation must be in its rendering: a template that drops or changes
one would have the model learn another conversation.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, NamedTuple

from liger_cli.data.marks import MarkedText
from liger_cli.data.shipped_templates import template_names
from liger_cli.data.shown import THOUGHTS, ShownTexts
from liger_cli.data.template import ChatTemplate, Message, Span
from liger_cli.data.thoughts import REMOVED, Reasoning, choose_thoughts
from liger_cli.data.turns import Turns
from liger_cli.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["ChatRenderer", "Conversation"]


class Conversation(NamedTuple):
    """A rendered conversation.

    Args:
        text: As the template writes it.
        trained: The parts to train on, in their order.
        left_out: What is not trained although it was said, by its name, and how often.
        messages: Those that were rendered.
        weights: The parts with a weight other than 0 and 1, each with it.
    """

    text: str
    trained: tuple[Span, ...]
    left_out: Counter[str]
    messages: tuple[Message, ...]
    weights: tuple[tuple[Span, float], ...] = ()


@dataclass(frozen=True)
class ChatRenderer:
    """Render conversations with a tokenizer's template and finds the assistant's parts.

    Args:
        tokenizer: With a chat template.
        template: Instead of the tokenizer's, where a processor has one that shows images.
        enable_thinking: For the template, where it is not None.
        reasoning: Which thoughts a conversation keeps; None keeps those that the template shows.
    """

    tokenizer: PreTrainedTokenizerBase
    template: str | None = None
    enable_thinking: bool | None = None
    reasoning: Reasoning | None = None

    def conversation(
        self,
        messages: Sequence[Message],
        tools: Sequence[Message],
        where: str,
        *,
        assistant_only: bool = True,
    ) -> Conversation:
        """Return a rendered conversation.

        Args:
            messages: With role and content at least; what else they have is the template's.
            tools: Descriptions of tools, which the template shows to the model.
            where: Names the row in an error.
            assistant_only: Train the answers and not all of the text.

        Raises:
            DataError: The template refuses the conversation, or does not show what is said in it.
        """
        template = self._with_tools if tools else self._plain
        messages, num_removed = choose_thoughts(messages, self.reasoning, where)
        messages, text = _rendered(template, messages, tools, where)
        render = partial(template.render, tools=tools, where=where)
        marked = MarkedText.of(text, messages, render)
        shown = ShownTexts(marked, messages, where)
        left_out = Counter(shown.check())
        if not assistant_only:
            left_out += shown.check_answers(shown.anywhere)
            spans = [(0, len(text))]
        elif template.marks_generation:
            spans = template.generation_blocks(messages, tools, where)
            left_out += shown.check_blocks(spans)
        else:
            answers = Turns(template, marked, messages, tools, where).answers()
            left_out += shown.check_answers(answers)
            spans = [(begin, end) for begin, end in answers.values() if begin < end]
        if left_out[THOUGHTS] and self.reasoning in ("keep", "last"):
            raise _lost_thoughts(self.reasoning, where)
        if num_removed:
            left_out[REMOVED] += num_removed
        return Conversation(text, tuple(spans), left_out, tuple(messages))

    def render(self, messages: Sequence[Message]) -> str:
        """Return the text of a conversation."""
        return self._plain.render(messages)

    @cached_property
    def _plain(self) -> ChatTemplate:
        return ChatTemplate(self.tokenizer, self._source(None), self._variables)

    @cached_property
    def _with_tools(self) -> ChatTemplate:
        # A tokenizer may have a second template for conversations with tools.
        return ChatTemplate(self.tokenizer, self._source([{}]), self._variables)

    @property
    def _variables(self) -> dict[str, Any]:
        given = self.enable_thinking
        return {} if given is None else {"enable_thinking": given}

    def _source(self, tools: list[Any] | None) -> str:
        if self.template is not None:
            return self.template
        if not getattr(self.tokenizer, "chat_template", None):
            raise DataError(
                "the data are conversations, and this model's tokenizer has no chat template",
                hint="--chat-template FILE, or one of the names "
                f"{', '.join(template_names())}; or take a chat model, or rows of prompt and "
                "completion",
            )
        return self.tokenizer.get_chat_template(tools=tools)


def _lost_thoughts(reasoning: str, where: str) -> DataError:
    return DataError(
        f"{where}: the chat template does not show the thoughts of an answer, and reasoning is "
        f"{reasoning}",
        hint="--chat-template with a name that ends in -keep shows all thoughts; --reasoning last "
        "or drop leaves those of earlier answers or all of them out of the data",
    )


def _rendered(
    template: ChatTemplate, messages: Sequence[Message], tools: Sequence[Message], where: str
) -> tuple[Sequence[Message], str]:
    """Return the messages with arguments of calls as the template wants them, and the text.

    Most templates write an object as JSON. One that writes the arguments as they are wants JSON.
    """
    arguments = list(_arguments(messages))
    refusal: DataError | None = None
    try:
        text = template.render(messages, tools, where)
        if not any(str(value) in text and _json(value) not in text for value in arguments):
            return messages, text
    except DataError as error:
        if not arguments:
            raise
        refusal = error
    messages = [_with_json_arguments(message) for message in messages]
    try:
        return messages, template.render(messages, tools, where)
    except DataError as error:
        raise refusal or error from None


def _arguments(messages: Sequence[Message]) -> Iterator[Any]:
    for message in messages:
        for call in message.get("tool_calls") or ():
            if "arguments" in (function := call.get("function") or call):
                yield function["arguments"]


def _with_json_arguments(message: Message) -> Message:
    if not message.get("tool_calls"):
        return message
    return {**message, "tool_calls": [_with_json(call) for call in message["tool_calls"]]}


def _with_json(call: Mapping[str, Any]) -> Mapping[str, Any]:
    if "function" in call:
        return {**call, "function": _with_json(call["function"])}
    return {**call, "arguments": _json(call["arguments"])} if "arguments" in call else call


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
