"""The body of `liger generate`: a prompt or the turns of a chat, shown as they come."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from accelerate import PartialState

from liger_cli.commands.generate.text import Answer, Generator, Sampling
from liger_cli.common.text import printable
from liger_cli.data.shipped_templates import read_template, template_names
from liger_cli.errors import ConfigError
from liger_cli.report import notify, show_json
from liger_cli.training.model.classifiers import check_writes_text
from liger_cli.training.model.source import load_model, load_tokenizer, resolve_model
from liger_cli.training.runtime.launch import quiet_libraries

__all__ = ["Request", "generate"]


@dataclass(frozen=True)
class Request:
    """A prompt to continue, or a chat.

    Args:
        prompt: The text to continue; of a chat the user's only turn.
        is_chat: Whether the chat template is used; without a prompt the lines of stdin are turns.
        system: The first message of a chat.
        chat_template: A file or a name, in place of the model's template.
        enable_thinking: For the template, where it is not None.

    Raises:
        ConfigError: The prompt is missing, empty or not UTF-8, or what is for a chat is set
            without one.
    """

    prompt: str | None = None
    is_chat: bool = False
    system: str | None = None
    chat_template: str | None = None
    enable_thinking: bool | None = None

    def __post_init__(self) -> None:
        if self.prompt is None and not self.is_chat:
            raise ConfigError("give --prompt TEXT, or --chat to talk")
        if self.system is not None and not self.is_chat:
            raise ConfigError("--system is the first message of a chat: add --chat")
        if self.chat_template is not None and not self.is_chat:
            raise ConfigError("--chat-template writes the turns of a chat: add --chat")
        if self.enable_thinking is not None and not self.is_chat:
            raise ConfigError("--enable-thinking is for the template of a chat: add --chat")
        if self.prompt is not None and not self.prompt.strip():
            raise ConfigError("--prompt is empty: there is nothing to continue")
        for text in (self.prompt, self.system):
            _check(text or "")


def generate(
    model: str,
    request: Request,
    sampling: Sampling,
    *,
    dtype: Literal["auto", "float32", "bfloat16", "float16"],
    use_cpu: bool,
    as_json: bool,
) -> None:
    """Generate, and show the text as it comes or one JSON document at the end.

    Args:
        model: As --model takes it, or the directory of a run.

    Raises:
        LigerError: The model cannot be loaded, or has no chat template for a chat.
    """
    prompt, is_chat, system = request.prompt, request.is_chat, request.system
    loaded, tokenizer = _load(model, request, sampling.seed, dtype, use_cpu)
    generator = Generator(loaded, tokenizer, sampling, _ignore if as_json else _write)
    messages = [] if system is None else [{"role": "system", "content": system}]
    answers: list[dict[str, Any]] = []
    for turn in _lines() if prompt is None else [prompt]:
        messages.append({"role": "user", "content": turn})
        try:
            answer = (
                generator.answer(messages, request.enable_thinking)
                if is_chat
                else generator.complete(turn)
            )
        except KeyboardInterrupt:
            # What follows is not a part of the text.
            generator.on_text("\n")
            raise
        generator.on_text("\n")
        messages.append({"role": "assistant", "content": answer.text})
        answers.append({"prompt": turn, **asdict(answer)})
        if not as_json:
            notify(_summary(answer))
    if as_json:
        values = {"model": model, "sampling": asdict(sampling), "answers": answers}
        show_json({"command": "generate", **values})


def _load(model: str, request: Request, seed: int, dtype: str, use_cpu: bool) -> tuple[Any, Any]:
    """Return the stock model on the device that train takes, and its tokenizer."""
    quiet_libraries()
    source = resolve_model(model, notify)
    check_writes_text(source, model)
    template = None if request.chat_template is None else read_template(request.chat_template)
    tokenizer = load_tokenizer(source)
    if template is not None:
        tokenizer.chat_template = template
    if request.is_chat and not tokenizer.chat_template:
        raise ConfigError(
            f"the tokenizer of {model} has no chat template",
            hint=f"--chat-template FILE, or one of the names {', '.join(template_names())}; "
            "--prompt without --chat continues the text as it is.",
        )
    if source.kind in ("random", "config") and source.adapter is None:
        notify(f"{model} has random weights: its text means nothing")
    loaded = load_model(
        source,
        dtype="auto" if dtype == "auto" else getattr(torch, dtype),
        device=PartialState(cpu=use_cpu).device,
        seed=seed,
        notify=notify,
    )
    return loaded, tokenizer


def _lines() -> Iterator[str]:
    """Yield the lines of stdin that are not empty, one turn of a chat each."""
    while True:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        try:
            line = sys.stdin.readline()
        except UnicodeDecodeError as error:
            raise ConfigError(f"stdin is not text in UTF-8: {error}") from error
        if not line:
            return
        _check(line)
        if line.strip():
            yield line.strip()


def _check(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        # Python keeps bytes that are no text as half characters.
        raise ConfigError(f"the prompt is not text in UTF-8: {error}") from error


def _summary(answer: Answer) -> str:
    end = "ended by the model" if answer.stop == "end" else "cut at --max-new-tokens"
    return f"{answer.new_tokens} tokens, {answer.tokens_per_s:.1f} tokens/s, {end}"


def _write(text: str) -> None:
    # A model may write what a terminal obeys; a file or a pipe gets its text as it is.
    sys.stdout.write(printable(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def _ignore(text: str) -> None:
    """Show nothing."""
