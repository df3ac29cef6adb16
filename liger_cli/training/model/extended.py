"""The tokenizer and the model of a run with what its configuration adds to them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from liger_cli.config import RunConfig
from liger_cli.training.model.new_tokens import add_tokens
from liger_cli.training.model.presets import ModelSource
from liger_cli.training.model.source import vocabulary_size
from liger_cli.training.model.tokenizers import Preprocessing

__all__ = ["extend_source", "load_preprocessing"]


def load_preprocessing(
    config: RunConfig,
    source: ModelSource,
    *,
    trains: bool = True,
    notify: Callable[[str], None] | None = None,
) -> tuple[Preprocessing, ModelSource]:
    """Load the tokenizer and processor of a run, with its chat template and new tokens.

    Args:
        source: The model as it was found.
        trains: False takes new tokens that the model has already.
        notify: Called with the lines on new tokens.

    Returns:
        Both, and the source whose model has the rows of the new tokens when it is loaded.

    Raises:
        LigerError: They cannot be read, or a token cannot be added.
    """
    preprocessing = Preprocessing.of(source, config.chat_template)
    if not _changes_tokens(config):
        return preprocessing, source
    num_rows = vocabulary_size(source)
    tokenizer = preprocessing.tokenizer
    if hasattr(preprocessing.processor, "tokenizer"):
        # It loads another one, which would not know the tokens.
        preprocessing.processor.tokenizer = tokenizer
    tokens = add_tokens(config, tokenizer, source, num_rows, trains=trains, notify=notify)
    if source.tokens is not None:
        # Those of an adapter, to which nothing is added but the parts that tokens play.
        roles = {"eos_token_id": tokens.eos_token_id, "pad_token_id": tokens.pad_token_id}
        given: dict[str, Any] = {
            role: number for role, number in roles.items() if number is not None
        }
        tokens = replace(source.tokens, **given)
    return preprocessing, replace(source, tokens=tokens)


def extend_source(config: RunConfig, source: ModelSource) -> ModelSource:
    """Return the source whose model has the rows of a configuration's new tokens.

    Raises:
        LigerError: As load_preprocessing.
    """
    return load_preprocessing(config, source)[1] if _changes_tokens(config) else source


def _changes_tokens(config: RunConfig) -> bool:
    keys = (config.add_tokens, config.add_special_tokens, config.eos_token, config.pad_token)
    return any(key is not None for key in (*keys, config.resize_to_multiple_of))
