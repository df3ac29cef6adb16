"""Tokens that a run adds: their ids in the tokenizer, and their rows in the embeddings.

A row of a new token starts as the mean of the rows of the tokens before it, in the input embedding
and in the head, so that its logit is neither large nor small. A whole model has the rows in its
checkpoints. An adapter has the trained rows of its tokens, and a file beside them says how the
embeddings of its base model are extended before the adapter is put on.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from liger_cli.common.readers import read_json
from liger_cli.config import RunConfig
from liger_cli.errors import ConfigError
from liger_cli.training.model.presets import ModelSource, NewTokens

__all__ = ["add_tokens", "extend_embeddings", "read_tokens", "write_tokens"]

_FILE = "new_tokens.json"


def add_tokens(
    config: RunConfig,
    tokenizer: Any,
    source: ModelSource,
    num_rows: int,
    *,
    trains: bool = True,
    notify: Callable[[str], None] | None = None,
) -> NewTokens:
    """Add the tokens of a configuration to a tokenizer; return the change of the vocabulary.

    Args:
        tokenizer: Of the model; it is changed.
        num_rows: Rows of the model's embeddings.
        trains: False takes tokens that are there already: those of a model that was trained so.
        notify: Called with a line on the tokens and one on the rows.

    Raises:
        ConfigError: A token is there already, is not one token, or cannot be added.
    """
    new = [(word, False) for word in config.new_tokens]
    new += [(word, True) for word in config.new_special_tokens]
    roles = {"eos_token": config.eos_token, "pad_token": config.pad_token}
    multiple = config.resize_to_multiple_of
    if not trains:
        new = [pair for pair in new if pair[0] not in tokenizer.get_vocab()]
    num_known = len(tokenizer)
    _check_new(tokenizer, [word for word, _ in new])
    added = {word: _add(tokenizer, word, is_special) for word, is_special in new}
    lines = [_added_line(added)] if added else []
    for role, word in roles.items():
        if word is not None:
            lines.append(_set_role(tokenizer, role, word))
    rows = max(num_rows, *(number + 1 for number in added.values()), 1)
    rows = -(-rows // (multiple or 1)) * (multiple or 1)
    if source.adapter is not None and (added or rows != num_rows):
        raise ConfigError(
            f"{source.name} is an adapter, which has the rows of the tokens that it was made with",
            hint="liger merge makes a model of it, to which tokens can be added.",
        )
    tokens = NewTokens(
        num_rows=rows,
        num_rows_before=num_rows,
        num_known=min(num_known, num_rows),
        added=added,
        eos_token_id=tokenizer.eos_token_id if config.eos_token else None,
        pad_token_id=tokenizer.pad_token_id if config.pad_token else None,
    )
    if notify is not None:
        for line in (*lines, *_row_lines(tokens)):
            notify(line)
    return tokens


def _check_new(tokenizer: Any, words: list[str]) -> None:
    vocabulary = tokenizer.get_vocab()
    there = {word: vocabulary[word] for word in words if word in vocabulary}
    if there:
        found = ", ".join(f"{word!r} is token {number}" for word, number in there.items())
        raise ConfigError(
            f"add_tokens, add_special_tokens: {found} of this model already",
            hint="Leave out what it has; eos_token and pad_token may name tokens that are there.",
        )
    for word in words:
        if words.count(word) > 1:
            raise ConfigError(f"add_tokens, add_special_tokens: {word!r} is named twice")


def _add(tokenizer: Any, word: str, is_special: bool) -> int:
    from tokenizers import AddedToken

    # Not normalized: a tokenizer that changes case or spaces would look for another text.
    token = AddedToken(word, normalized=False, special=is_special)
    tokenizer.add_tokens([token], special_tokens=is_special)
    number = int(tokenizer.convert_tokens_to_ids(word))
    if list(tokenizer(word, add_special_tokens=False)["input_ids"]).count(number) != 1:
        raise ConfigError(
            f"the token {word!r} was added, and the tokenizer does not find it in a text",
            hint="Another token is the beginning of it, or it is no text to this tokenizer.",
        )
    return number


def _set_role(tokenizer: Any, role: str, word: str) -> str:
    """Make a token the eos_token or pad_token of a tokenizer; return the line that says so."""
    from tokenizers import AddedToken

    if word not in tokenizer.get_vocab():
        num_pieces = len(tokenizer(word, add_special_tokens=False)["input_ids"])
        raise ConfigError(
            f"{role} {word!r} is not one token of this model but {num_pieces}",
            hint=f"--add-special-tokens '{word}' adds it.",
        )
    before = getattr(tokenizer, role)
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    if word in special:
        # Added again it would lose what it does with the spaces around it.
        setattr(tokenizer, role, word)
    else:
        tokenizer.add_special_tokens({role: AddedToken(word, normalized=False, special=True)})
    number = getattr(tokenizer, f"{role}_id")
    return f"{role}: {word!r}, token {number}; before: {'none' if before is None else repr(before)}"


def _added_line(added: dict[str, int]) -> str:
    shown = [f"{word!r} {number}" for word, number in added.items()]
    more = f" and {len(shown) - 8} more" if len(shown) > 8 else ""
    return f"tokens: {len(added)} added: {', '.join(shown[:8])}{more}"


def _row_lines(tokens: NewTokens) -> list[str]:
    before, after = tokens.num_rows_before, tokens.num_rows
    if after == before and not tokens.added:
        return []
    size = f"from {before} to {after} rows; new ones"
    if after == before:
        size = f"{after} rows, as before; those of new tokens"
    return [
        f"embeddings: {size} start as the mean of the first {tokens.num_known}, in the input "
        "embedding and in the head"
    ]


@torch.no_grad()
def extend_embeddings(model: Any, tokens: NewTokens, name: str) -> None:
    """Give a model the rows of new tokens, and its configuration their ids.

    Args:
        model: With its weights and without an adapter; or on the meta device.
        name: Of the model, for errors.

    Raises:
        ConfigError: Its embeddings cannot be resized.
    """
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    for part in (table, head):
        _check_resizable(part, name)
    if tokens.num_rows != table.weight.shape[0]:
        try:
            model.resize_token_embeddings(tokens.num_rows, mean_resizing=False)
        # Models refuse in their own ways.
        except Exception as error:
            raise ConfigError(
                f"the embeddings of {name} cannot be resized: {' '.join(str(error).split())}"
            ) from error
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    new = sorted({*tokens.ids, *range(tokens.num_rows_before, tokens.num_rows)})
    for weight in _row_weights(table, head):
        if len(weight) != tokens.num_rows:
            raise ConfigError(
                f"the embeddings of {name} cannot be resized: one has {len(weight)} rows and not "
                f"{tokens.num_rows}"
            )
        if new and weight.device.type != "meta":
            weight[new] = weight[: tokens.num_known].float().mean(0).to(weight.dtype)
    _set_ids(model, tokens)


def _check_resizable(part: Any, name: str) -> None:
    weight: Any = getattr(part, "weight", None)
    is_plain = isinstance(weight, torch.Tensor) and weight.dim() == 2
    if part is not None and not (is_plain and weight.is_floating_point()):
        raise ConfigError(
            f"the embeddings of {name} cannot be resized: one is a {type(part).__name__} whose "
            "weight is quantized",
            hint="Add the tokens to the model as it was before it was quantized.",
        )


def _row_weights(table: Any, head: Any) -> list[torch.Tensor]:
    """Return the different tensors that have a row for each token."""
    weights = [table.weight]
    if head is not None and head.weight is not table.weight:
        weights.append(head.weight)
    if getattr(head, "bias", None) is not None:
        weights.append(head.bias)
    return weights


def _set_ids(model: Any, tokens: NewTokens) -> None:
    """Write the ids of eos_token and pad_token into the configurations that generation reads."""
    parts = {id(part): part for part in (model.config, model.config.get_text_config())}.values()
    generation = getattr(model, "generation_config", None)
    if (eos := tokens.eos_token_id) is not None:
        for part in parts:
            part.eos_token_id = eos
        if generation is not None:
            before = generation.eos_token_id
            others = before if isinstance(before, list) else [before]
            ids = [eos, *(number for number in others if number not in (eos, None))]
            generation.eos_token_id = ids if len(ids) > 1 else eos
    # Not in the model's own configuration: the embedding that is built from it gives the row of
    # that token no gradient, also where the token ends a text.
    if tokens.pad_token_id is not None and generation is not None:
        generation.pad_token_id = tokens.pad_token_id


def write_tokens(directory: Path, tokens: NewTokens) -> None:
    """Write a change of the vocabulary beside an adapter."""
    text = json.dumps(asdict(tokens), indent=2, ensure_ascii=False)
    (directory / _FILE).write_text(f"{text}\n", encoding="utf-8")


def read_tokens(directory: Path) -> NewTokens | None:
    """Return the change that an adapter's directory has; None where there is none.

    Raises:
        ConfigError: The file cannot be read, or holds something else.
    """
    file = directory / _FILE
    if not file.is_file():
        return None
    try:
        tokens = NewTokens(**read_json(file))
        numbers = [tokens.num_rows, tokens.num_rows_before, tokens.num_known, *tokens.ids]
        if not all(
            isinstance(number, int) and 0 <= number <= tokens.num_rows for number in numbers
        ):
            raise ValueError("its numbers are no rows of an embedding")
        return tokens
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"{file} is not a file that liger wrote: {error}") from error
