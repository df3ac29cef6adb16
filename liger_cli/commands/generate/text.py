"""Text from a model: the continuation of a prompt, or the next turn of a chat."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import TextStreamer

from liger_cli.data.rendering import render_chat
from liger_cli.errors import ConfigError, ExtensionPanic, LigerError, panics_raised
from liger_kernels.transformers.wrappers import inner_model

__all__ = ["Answer", "Generator", "Sampling"]


@dataclass(frozen=True)
class Sampling:
    """Settings for drawing the next token; a temperature of 0 takes the likeliest."""

    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int

    def __post_init__(self) -> None:
        # A flag's limits do not catch NaN in every version of typer.
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ConfigError(f"--temperature is {self.temperature}; allowed: 0 and above")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"--top-p is {self.top_p}; allowed: above 0, at most 1")


@dataclass(frozen=True)
class Answer:
    """Generated text; stop is "end" where the model ended it, else "length"."""

    text: str
    prompt_tokens: int
    new_tokens: int
    stop: Literal["end", "length"]
    tokens_per_s: float


class Generator:
    """Generate with one model; the same seed and the same texts give the same answers.

    Args:
        model: With its weights, in evaluation mode.
        tokenizer: That goes with it.
        sampling: How tokens are drawn. What else the model's generation_config says, such as a
            penalty of repetitions, holds too.
        on_text: Called with every piece of text as soon as it is known.
    """

    def __init__(
        self, model: Any, tokenizer: Any, sampling: Sampling, on_text: Callable[[str], None]
    ) -> None:
        self._model = inner_model(model)
        self._tokenizer = tokenizer
        self.on_text = on_text
        self._sampling = sampling
        self._ends = _end_tokens(self._model, tokenizer)
        # The model's own, changed: in another, transformers would put the model's values in place
        # of those that happen to be defaults.
        self._config = self._model.generation_config
        self._config.update(
            do_sample=sampling.temperature > 0,
            # The defaults, where nothing is drawn: others would be warned of.
            temperature=sampling.temperature or 1.0,
            top_p=sampling.top_p if sampling.temperature > 0 else 1.0,
            top_k=0 if sampling.temperature > 0 else 50,
            max_new_tokens=sampling.max_new_tokens,
            max_length=None,
            eos_token_id=self._ends or None,
            pad_token_id=next(
                (i for i in (tokenizer.pad_token_id, *self._ends) if i is not None), 0
            ),
            use_cache=True,
        )
        torch.manual_seed(sampling.seed)

    def complete(self, prompt: str) -> Answer:
        """Generate the continuation of a text.

        Raises:
            ConfigError: The text is empty, or too long for the model.
        """
        return self._generate(self._ids(prompt))

    def answer(
        self, messages: Sequence[dict[str, str]], enable_thinking: bool | None = None
    ) -> Answer:
        """Return the assistant's answer to a conversation; the tokenizer has a chat template.

        Args:
            enable_thinking: For the template, where it is not None.

        Raises:
            ConfigError: The template refuses the conversation, or it is too long.
        """
        given = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
        try:
            text = render_chat(self._tokenizer, messages, prompt=True, variables=given)
        # A template is a program, which may refuse a system message.
        except Exception as error:
            raise ConfigError(f"the model's chat template: {error}") from error
        return self._generate(self._ids(text, add_special_tokens=False))

    def _ids(self, text: str, **options: Any) -> list[int]:
        try:
            with panics_raised():
                return list(self._tokenizer(text, **options)["input_ids"])
        except ExtensionPanic as error:
            raise ConfigError(f"the model's tokenizer fails on the prompt: {error}") from error

    def _generate(self, prompt: list[int]) -> Answer:
        self._check(prompt)
        ids = torch.tensor([prompt], device=self._model.device)
        start = time.perf_counter()
        try:
            output = self._model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                generation_config=self._config,
                streamer=_Streamer(self._tokenizer, self.on_text),
            )
        except RuntimeError as error:
            if "probability tensor" in str(error):
                raise LigerError(
                    "nothing can be drawn: the model's logits over the temperature are not finite"
                ) from error
            raise
        new = output[0, len(prompt) :].tolist()
        return Answer(
            text=self._tokenizer.decode(new, skip_special_tokens=True),
            prompt_tokens=len(prompt),
            new_tokens=len(new),
            stop="end" if new[-1] in self._ends else "length",
            tokens_per_s=len(new) / (time.perf_counter() - start),
        )

    def _check(self, prompt: list[int]) -> None:
        """Raise a ConfigError for tokens that the model has no place for."""
        if not prompt:
            raise ConfigError("the prompt has no tokens: there is nothing to continue")
        config = self._model.config.get_text_config()
        vocabulary = config.vocab_size
        if max(prompt) >= vocabulary:
            raise ConfigError(
                f"token {max(prompt)} is outside the model's vocabulary of {vocabulary}: "
                "the tokenizer is not this model's"
            )
        most = getattr(config, "max_position_embeddings", None)
        if most is not None and len(prompt) + self._sampling.max_new_tokens > most:
            raise ConfigError(
                f"the prompt has {len(prompt)} tokens and max_new_tokens is "
                f"{self._sampling.max_new_tokens}; the model takes {most} in all"
            )


class _Streamer(TextStreamer):
    """Stream the new text by whole words."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.on_text = on_text

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self.on_text(text)


def _end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Return the tokens that end an answer: the model's and the tokenizer's."""
    ends = model.generation_config.eos_token_id
    ends = [ends] if isinstance(ends, int) else list(ends or [])
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in ends:
        ends.append(tokenizer.eos_token_id)
    return ends
