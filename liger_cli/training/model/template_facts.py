"""Facts of a chat template: its name, where answers begin and end, and what is amiss."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from liger_cli.common.readers import read_json
from liger_cli.data.shipped_templates import template_names
from liger_cli.data.template import ChatTemplate
from liger_cli.training.model.presets import ModelSource

__all__ = ["TemplateFacts", "template_facts"]

# What looks like a special token.
_MARK = re.compile(r"<\|[^|<>\s]{1,60}\|>|<｜[^｜<>\s]{1,60}｜>|</?[a-z_]{1,60}>")


@dataclass(frozen=True)
class TemplateFacts:
    """A chat template in words.

    Args:
        name: Where it comes from.
        text: The template, in Jinja.
        generation_prompt: What an answer follows; None where the template refuses a question alone.
        answer_end: The mark that ends an answer; empty where there is none.
        warnings: What makes a model hard to use that is trained with it.
    """

    name: str
    text: str
    generation_prompt: str | None
    answer_end: str
    warnings: tuple[str, ...]

    @property
    def line(self) -> str:
        """The facts in one line."""
        prompt, end = self.generation_prompt, self.answer_end
        parts = [f"chat template: {self.name}"]
        parts += [f"answers begin after {prompt!r}"] if prompt else []
        parts += [f"answers end with {end!r}" if end else "no mark ends an answer"]
        return "; ".join(parts)


def template_facts(
    tokenizer: Any, source: ModelSource, name: str | None, enable_thinking: bool | None = None
) -> TemplateFacts | None:
    """Return the facts of a tokenizer's template; None where it has none.

    Args:
        tokenizer: With the template in place.
        source: The model.
        name: The value of chat_template, if it is set.
        enable_thinking: As the template gets it.
    """
    if not getattr(tokenizer, "chat_template", None):
        return None
    text = tokenizer.get_chat_template()
    variables = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
    template = ChatTemplate(tokenizer, text, variables)
    end = min(template.special_ends, default="") or template.plain_end.strip()
    if name is None:
        name = f"that of {source.name}"
    elif name in template_names():
        name = f"{name}, which comes with liger"
    prompt = template.generation_prompt
    warnings = tuple(_warnings(tokenizer, source, prompt or "", end))
    return TemplateFacts(name, text, prompt, end, warnings)


def _warnings(tokenizer: Any, source: ModelSource, prompt: str, end: str) -> Iterator[str]:
    marks = dict.fromkeys(_MARK.findall(prompt + end))
    split = [mark for mark in marks if len(_ids(tokenizer, mark)) > 1]
    if split:
        yield (
            f"{', '.join(split)}: several tokens each in this tokenizer; "
            f"--add-special-tokens '{','.join(split)}' makes them one each"
        )
    ids = _ids(tokenizer, end)
    if end and (len(ids) > 1 or ids[0] not in _end_ids(tokenizer, source)):
        has = repr(tokenizer.eos_token) if tokenizer.eos_token else "none"
        yield (
            f"answers end with {end!r}, and generation ends at the eos_token, which is {has}: the "
            f"model would not stop; --eos-token '{end}' makes it the eos_token"
        )
    if not end:
        yield "no mark ends an answer, so that the model does not learn to stop"


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _end_ids(tokenizer: Any, source: ModelSource) -> set[int]:
    """Return the tokens at which a model stops: the tokenizer's and those of its files."""
    found = [tokenizer.eos_token_id, (source.config or {}).get("eos_token_id")]
    if source.kind == "directory" and source.path is not None:
        # It need not be there; one that cannot be read ends the loading of the model.
        with contextlib.suppress(OSError, ValueError, AttributeError):
            found.append(read_json(source.path / "generation_config.json").get("eos_token_id"))
    ids = (entry if isinstance(entry, list) else [entry] for entry in found)
    return {number for entry in ids for number in entry if isinstance(number, int)}
