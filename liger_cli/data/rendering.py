"""Chat templates rendered under a limit of time and of size.

A template is a program that comes with a model. transformers runs it in Jinja's sandbox, which
keeps it from the machine, and not from running for hours or filling the memory. Here the same
sandbox counts: the processor time of a rendering, and the length of every text and list that the
template builds. Nothing of it needs a signal, a thread or a process, so it works in any of them.
"""

from __future__ import annotations

import contextlib
import functools
import re
import string
import time
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import jinja2
import jinja2.meta
from jinja2.compiler import CodeGenerator

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["RenderLimit", "free_names", "render_chat", "render_marked"]

Message = Mapping[str, Any]

MAX_SECONDS = 10.0
# Characters, or eight entries of a list each, that a template may make out of nothing, and out of
# each character that it is given.
_FREE_SIZE, _SIZE_FACTOR = 4_000_000, 8
# How many times the largest text a rendering may build in all.
_TOTAL_FACTOR = 50
_MAX_TEMPLATE = 1_000_000
# Widths, counts and indents of what pads; also the width in a format such as %100d.
_MAX_NUMBER = 100_000
_PADDING = frozenset(
    [
        "batch",
        "center",
        "expandtabs",
        "indent",
        "ljust",
        "rjust",
        "round",
        "slice",
        "to_bytes",
        "tojson",
        "wordwrap",
        "zfill",
    ]
)
# A width of six digits, or one that comes from the values.
_WIDE_PERCENT = re.compile(r"%[^a-zA-Z%]*(\*|\d{6})")
_WIDE_SPEC = re.compile(r"\{|\d{6}")
# What makes longer texts than it is given, so that it has to be looked at before it runs.
_BUILDERS = frozenset(["format", "indent", "join", "list", "pprint", "replace", "string", "tojson"])
_PER_LINE = frozenset({"indent", "tojson", "expandtabs"})


class RenderLimit(Exception):
    """A template ran too long, or built something too large."""


class _Budget:
    def __init__(self, given: object) -> None:
        self.end = time.thread_time() + MAX_SECONDS
        self.max_size = _FREE_SIZE
        self.max_size = max(_FREE_SIZE, _SIZE_FACTOR * _size(given, 2**40))
        self.rest = _TOTAL_FACTOR * self.max_size

    def check_time(self) -> None:
        if time.thread_time() > self.end:
            raise RenderLimit(f"it ran for more than {MAX_SECONDS:g} s")

    def check_size(self, size: int) -> None:
        if size > self.max_size:
            raise RenderLimit(f"it builds more than {self.max_size} characters")

    def spend(self, size: int) -> None:
        self.check_size(size)
        self.rest -= size
        if self.rest < 0:
            raise RenderLimit("it builds too many texts")
        self.check_time()


_budget: ContextVar[_Budget] = ContextVar("budget")


def render_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    template: str | None = None,
    tools: Sequence[Message] = (),
    *,
    prompt: bool = False,
    variables: Mapping[str, Any] = MappingProxyType({}),
) -> str:
    """Render a conversation as tokenizer.apply_chat_template does, with limits.

    Args:
        tokenizer: Whose special tokens the template knows.
        messages: With role and content at least.
        template: Another one than the tokenizer's.
        tools: Descriptions of tools.
        prompt: Whether the start of the assistant's next turn follows.
        variables: More that the template may read, such as enable_thinking.

    Raises:
        RenderLimit: The template ran too long, or built too much.
        Exception: What the template raises.
    """
    options = {**variables, "add_generation_prompt": prompt}
    return _render(tokenizer, messages, template, tools, **options)[0][0]


def render_marked(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    template: str | None = None,
    tools: Sequence[Message] = (),
    *,
    variables: Mapping[str, Any] = MappingProxyType({}),
) -> tuple[str, list[tuple[int, int]]]:
    """Render as render_chat; return the text and where its {% generation %} parts start and end."""
    options = {**variables, "return_assistant_tokens_mask": True}
    texts, spans = _render(tokenizer, messages, template, tools, **options)
    return texts[0], spans[0]


def free_names(template: str) -> set[str]:
    """Return the variables that a template reads and does not set.

    Raises:
        jinja2.TemplateSyntaxError: It is not valid Jinja.
    """
    return jinja2.meta.find_undeclared_variables(_environment().parse(template))


def _render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    template: str | None,
    tools: Sequence[Message],
    **options: Any,
) -> tuple[list[str], list[list[tuple[int, int]]]]:
    given_tools = [dict(tool) for tool in tools] or None
    template = template or tokenizer.get_chat_template(tools=given_tools)
    if len(template) > _MAX_TEMPLATE:
        raise RenderLimit(f"it has {len(template)} characters, more than {_MAX_TEMPLATE}")
    token = _budget.set(_Budget((messages, given_tools, template)))
    try:
        return _renderer()(
            conversations=[[dict(message) for message in messages]],
            tools=given_tools,
            chat_template=template,
            **tokenizer.special_tokens_map,
            **options,
        )
    finally:
        _budget.reset(token)


@functools.cache
def _renderer() -> Callable[..., Any]:
    """Return transformers' function, compiling in our environment instead of transformers'."""
    from transformers.utils import chat_template_utils

    original = chat_template_utils.render_jinja_template
    names = {**original.__globals__, "_compile_jinja_template": _compile}
    renderer = types.FunctionType(original.__code__, names, original.__name__, None)
    renderer.__defaults__, renderer.__kwdefaults__ = original.__defaults__, original.__kwdefaults__
    return renderer


@functools.lru_cache(maxsize=64)
def _compile(template: str) -> _CountedTemplate:
    return _CountedTemplate(_environment().from_string(template))


class _CountedTemplate:
    """A compiled template, whose pieces are counted as they come."""

    def __init__(self, template: jinja2.Template) -> None:
        # Jinja joins the operands of ~ by a separate function.
        names = template.root_render_func.__globals__
        names.update(str_join=_join, markup_join=_join)
        self._template = template
        self.environment = template.environment

    def render(self, **values: Any) -> str:
        return self._template.render(**values)

    def generate(self, **values: Any) -> Iterator[str]:
        size = 0
        for piece in self._template.generate(**values):
            size += len(piece)
            _budget.get().check_size(size)
            yield piece


class _CountingGenerator(CodeGenerator):
    """Write a look at the clock at the start of every block, such as the body of a loop."""

    def blockvisit(self, nodes: Iterable[jinja2.nodes.Node], frame: Any) -> None:
        self.writeline("environment.check_time()")
        super().blockvisit(nodes, frame)


@functools.cache
def _environment() -> Any:
    """Return transformers' environment, with operators, calls and filters that count."""
    from transformers.utils.chat_template_utils import _compile_jinja_template

    # Every template has a separate environment; only this one uses its.
    environment: Any = _compile_jinja_template("{# liger #}").environment
    environment.__class__ = type("_Counting", (_Counting, type(environment)), {})
    environment.code_generator_class = _CountingGenerator
    environment.finalize = _shown
    # Writes texts of any length by itself.
    del environment.globals["lipsum"]
    for name, function in environment.filters.items():
        environment.filters[name] = _counted(name, function)
    return environment


class _Counting:
    """The differences of the environment from jinja2's."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def check_time(self) -> None:
        _budget.get().check_time()

    def concat(self, pieces: Iterable[str]) -> str:
        kept, size = [], 0
        for piece in pieces:
            kept.append(piece)
            size += len(piece)
            _budget.get().check_size(size)
        _budget.get().spend(size)
        return "".join(kept)

    def call_binop(self, context: Any, sign: str, left: Any, right: Any) -> Any:
        _check_operator(sign, left, right)
        result = super().call_binop(context, sign, left, right)  # type: ignore[misc]
        _budget.get().spend(_length(result))
        return result

    def call(self, context: Any, function: Any, *values: Any, **options: Any) -> Any:
        # A method has what it is called on; format is wrapped by the sandbox.
        method = getattr(function, "__wrapped__", function)
        owner = getattr(method, "__self__", None)
        _check_call(getattr(method, "__name__", ""), owner, (*values, *options.values()))
        result = super().call(context, function, *values, **options)  # type: ignore[misc]
        _budget.get().spend(_length(result))
        return result


def _counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a filter that is checked before and counted after; it is given what it was."""

    @functools.wraps(function)
    def counted(*values: Any, **options: Any) -> Any:
        start = hasattr(function, "jinja_pass_arg")
        _check_call(name, values[start], (*values[start + 1 :], *options.values()))
        result = function(*values, **options)
        _budget.get().spend(_length(result))
        return result

    return counted


def _shown(value: Any) -> Any:
    """Check what is about to be written as text: lists that share their entries grow with it."""
    if not isinstance(value, str):
        _size(value, _budget.get().max_size)
    return value


def _join(pieces: Iterable[Any]) -> str:
    return _environment().concat(str(_shown(piece)) for piece in pieces)


def _check_operator(sign: str, left: Any, right: Any) -> None:
    budget = _budget.get()
    if sign == "*":
        for many, times in ((left, right), (right, left)):
            if isinstance(times, int) and not isinstance(many, int | float):
                budget.check_size(_length(many) * times)
    elif sign == "+":
        budget.check_size(_length(left) + _length(right))
    elif sign == "%" and isinstance(left, str):
        _check_call("format", left, (right,))
    if sign in ("*", "**") and isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() * right if sign == "**" else left.bit_length() + right.bit_length()
        if bits > _MAX_NUMBER:
            raise RenderLimit(f"it computes a number of {bits} bits")


def _check_call(name: str, owner: Any, values: Sequence[Any]) -> None:
    """Check what a filter is given, or a method and what it is called on."""
    numbers = [value for value in values if isinstance(value, int)]
    if name in _PADDING and any(abs(number) > _MAX_NUMBER for number in numbers):
        raise RenderLimit(f"it calls {name} with the number {max(numbers, key=abs)}")
    if name not in _BUILDERS | _PER_LINE:
        return
    budget = _budget.get()
    size = _size([owner, *values], budget.max_size)
    if name == "format" and isinstance(owner, str) and _is_wide_format(owner):
        raise RenderLimit("it formats a text to a width that is too large")
    texts = [value for value in (owner, *values) if isinstance(value, str)]
    if name == "replace" and len(texts) == 3:
        size += texts[0].count(texts[1]) * len(texts[2])
    if name == "join":
        size *= 1 + max(map(len, texts), default=0)
    if name in _PER_LINE:
        size *= 1 + max(numbers, default=0)
    budget.check_size(size)


def _is_wide_format(text: str) -> bool:
    if _WIDE_PERCENT.search(text):
        return True
    with contextlib.suppress(ValueError):
        fields = string.Formatter().parse(text)
        return any(_WIDE_SPEC.search(spec or "") for _, _, spec, _ in fields)
    return False


def _length(value: Any) -> int:
    if isinstance(value, str | bytes):
        return len(value)
    return 8 * len(value) if isinstance(value, list | tuple | dict) else 0


def _size(value: Any, limit: int) -> int:
    """Return about how many characters a value is as text.

    Raises:
        RenderLimit: More than the limit.
    """
    size, rest = 0, [value]
    while rest:
        part = rest.pop()
        size += len(part) if isinstance(part, str) else 8
        if size > limit:
            raise RenderLimit(f"it builds more than {limit} characters")
        if isinstance(part, Mapping):
            rest += [*part.keys(), *part.values()]
        elif isinstance(part, list | tuple):
            rest += part
    return size
