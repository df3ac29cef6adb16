"""Training data: rows of token ids with the labels that are trained on.

A label is -100 where nothing is to be learned: in a prompt, in what the user says, in padding, and
at the first token of a row, which nothing predicts. Padding is known by its place alone, since a
padding token may be the token that ends a text.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from liger_cli.errors import ConfigError, DataError
from liger_cli.training.chat import ChatRenderer
from liger_cli.training.encode import IGNORED, Encoder
from liger_cli.training.rows import Row, read_rows
from liger_cli.training.samples import SAMPLE_LICENCE, SAMPLE_NAME, read_sample

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

__all__ = ["SYNTHETIC_NAME", "Collator", "DataStats", "Examples", "load_examples"]

SYNTHETIC_NAME = "synthetic"

# Rows that are tokenised at once: enough to keep a tokenizer's threads busy.
_BATCH = 1000
_SYNTHETIC_ROWS = {"train": 1024, "eval": 64}


@dataclass(frozen=True)
class DataStats:
    """Counts over the rows that are used.

    Args:
        rows: Rows used.
        dropped_rows: Rows left out, since no token of them, within max_length, is trained on.
        tokens: Token ids in the rows used.
        trained_tokens: Those with a label.
        truncated_rows: Rows used that were longer than max_length.
        columns: The columns of the source that were read.
    """

    rows: int
    dropped_rows: int
    tokens: int
    trained_tokens: int
    truncated_rows: int
    columns: tuple[str, ...]


@dataclass(frozen=True)
class Examples:
    """Rows with the columns input_ids and labels, in the order of the source."""

    examples: datasets.Dataset
    stats: DataStats
    name: str
    licence: str | None = None

    def __len__(self) -> int:
        return self.stats.rows


def load_examples(
    name: str,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    split: Literal["train", "eval"] = "train",
    max_length: int,
    vocab_size: int,
    seed: int = 0,
    num_rows: int | None = None,
) -> Examples:
    """Returns tokenised rows with labels.

    Labels: of `text` every token and the end of the text; of `prompt` and `completion` the
    completion and the end of the text; of a conversation what the assistant says and the ends of
    its turns.

    Args:
        name: chitchat (the sample), synthetic (random tokens, each row exactly max_length), or the
            path of a .jsonl or .json file.
        tokenizer: Of the model; synthetic data need none.
        split: The sample and synthetic data have both; a file is the same for both.
        max_length: Longer rows are cut to this many tokens.
        vocab_size: Of the model; a token id beyond it is an error.
        seed: Of synthetic data only.
        num_rows: Use at most this many rows, the first.

    Raises:
        ConfigError: The name is unknown, or an argument is out of range.
        DataError: The data cannot be read, or hold nothing to train on.
        EnvironmentProblem: The sample's package is not installed.
    """
    if max_length < 2:
        raise ConfigError(
            f"max_length is {max_length}; at least 2, since a token predicts the next"
        )
    if num_rows is not None and num_rows < 1:
        raise ConfigError(f"num_rows is {num_rows}; at least 1")
    if name == SYNTHETIC_NAME:
        return _synthetic(split, max_length, vocab_size, seed, num_rows or _SYNTHETIC_ROWS[split])
    if tokenizer is None:
        raise ConfigError(f"dataset {name} needs a tokenizer; only {SYNTHETIC_NAME} needs none")
    rows = _open(name, split)
    licence = SAMPLE_LICENCE if name == SAMPLE_NAME else None
    return _encode_all(name, licence, rows, tokenizer, max_length, vocab_size, num_rows)


def _open(name: str, split: Literal["train", "eval"]) -> Iterator[Row]:
    if name == SAMPLE_NAME:
        return read_sample(split)
    path = Path(name).expanduser()
    if path.suffix or path.exists():
        return read_rows(path)
    known = (SAMPLE_NAME, SYNTHETIC_NAME)
    nearest = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.5)
    raise ConfigError(
        f"dataset {name!r} is neither one of {', '.join(known)} nor a .jsonl or .json file"
        + (f"; did you mean {nearest[0]}?" if nearest else ""),
        hint="datasets of the hub are not fetched; save their rows as a .jsonl file",
    )


def _encode_all(
    name: str,
    licence: str | None,
    rows: Iterator[Row],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    vocab_size: int,
    num_rows: int | None,
) -> Examples:
    encoder, renderer = Encoder(tokenizer), ChatRenderer(tokenizer)
    tables = []
    columns: tuple[str, ...] = ()
    used = dropped = tokens = trained_tokens = truncated = 0
    while used != num_rows and (
        batch := list(islice(rows, min(_BATCH, num_rows - used) if num_rows else _BATCH))
    ):
        columns = batch[0].columns
        kept = []
        for row, encoded in zip(batch, encoder.encode(batch, renderer), strict=True):
            ids, labels = encoded.input_ids[:max_length], encoded.labels[:max_length]
            num_trained = sum(label != IGNORED for label in labels)
            if not num_trained:
                dropped += 1
                continue
            if max(ids) >= vocab_size:
                raise _outside_vocabulary(max(ids), row.where, tokenizer, vocab_size)
            kept.append((ids, labels))
            tokens += len(ids)
            trained_tokens += num_trained
            truncated += len(encoded.input_ids) > max_length
        used += len(kept)
        tables.append(_table([ids for ids, _ in kept], [labels for _, labels in kept]))
    if not used:
        raise DataError(
            f"none of the {dropped} rows of {name} has a token to train on within the first "
            f"{max_length} tokens (max_length)",
            hint="trained are completions, what the assistant says, and text",
        )
    stats = DataStats(used, dropped, tokens, trained_tokens, truncated, columns)
    return Examples(_join(tables), stats, name, licence)


def _outside_vocabulary(
    token: int, where: str, tokenizer: PreTrainedTokenizerBase, vocab_size: int
) -> DataError:
    return DataError(
        f"{where}: token {token} ({tokenizer.convert_ids_to_tokens(token)!r}) is outside the "
        f"model's vocabulary of {vocab_size}",
        hint="the tokenizer is not this model's, or has tokens that were added to it alone",
    )


def _synthetic(
    split: Literal["train", "eval"], max_length: int, vocab_size: int, seed: int, num_rows: int
) -> Examples:
    # Even and odd: no seed gives the rows of one split as those of the other.
    generator = torch.Generator().manual_seed(2 * seed + (split == "eval"))
    ids = torch.randint(vocab_size, (num_rows, max_length), generator=generator)
    labels = ids.clone()
    labels[:, 0] = IGNORED
    stats = DataStats(num_rows, 0, ids.numel(), num_rows * (max_length - 1), 0, ())
    return Examples(_table(ids.tolist(), labels.tolist()), stats, SYNTHETIC_NAME)


def _table(input_ids: list[list[int]], labels: list[list[int]]) -> Any:
    import datasets

    column = datasets.Sequence(datasets.Value("int32"))
    return datasets.Dataset.from_dict(
        {"input_ids": input_ids, "labels": labels},
        features=datasets.Features({"input_ids": column, "labels": column}),
    )


def _join(tables: Sequence[Any]) -> Any:
    import datasets

    return datasets.concatenate_datasets(list(tables))


@dataclass(frozen=True)
class Collator:
    """Makes a batch of rows: input_ids, attention_mask and labels as (B, T) int64, padded right.

    Args:
        pad_token_id: Fills input_ids; whether a place is padding never depends on it.
        pad_to_multiple_of: T is rounded up to a multiple of this.
    """

    pad_token_id: int = 0
    pad_to_multiple_of: int = 1

    @classmethod
    def for_tokenizer(
        cls, tokenizer: PreTrainedTokenizerBase | None, pad_to_multiple_of: int = 1
    ) -> Collator:
        """Returns a collator that pads with the tokenizer's padding token, or its end of text."""
        candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id) if tokenizer else ()
        pad = next((token for token in candidates if token is not None), 0)
        return cls(pad, pad_to_multiple_of)

    def __call__(self, rows: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, torch.Tensor]:
        longest = max(len(row["input_ids"]) for row in rows)
        multiple = self.pad_to_multiple_of
        shape = (len(rows), -(-longest // multiple) * multiple)
        input_ids = torch.full(shape, self.pad_token_id)
        labels = torch.full(shape, IGNORED)
        attention_mask = torch.zeros(shape, dtype=torch.int64)
        for i, row in enumerate(rows):
            length = len(row["input_ids"])
            input_ids[i, :length] = torch.as_tensor(row["input_ids"])
            labels[i, :length] = torch.as_tensor(row["labels"])
            attention_mask[i, :length] = 1
        return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
