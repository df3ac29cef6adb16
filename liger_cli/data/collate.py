"""Batches out of rows, padded right. Padding is known by its place and never by its token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from liger_cli.data.encode import IGNORED, WEIGHTS
from liger_cli.data.packing import document_lengths, join_rows, weights_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["TOKEN_KEYS", "Collator"]

# Columns of a processor beside the ids: which tokens belong to an image.
TOKEN_KEYS = ("token_type_ids", "mm_token_type_ids")
_OWN_KEYS = ("input_ids", "labels", "position_ids", "num_tokens", WEIGHTS)


@dataclass(frozen=True)
class Collator:
    """Make a batch of rows: input_ids and labels as (B, T) int64, and either attention_mask or,
    of rows of documents, position_ids and num_tokens. num_tokens is also there where a row says it.

    What else rows have goes along: values a token are padded with 0, images are joined.

    Args:
        pad_token_id: Fills input_ids; whether a place is padding never depends on it.
        pad_to_multiple_of: T is rounded up to a multiple of this.
        flatten: Packed rows become one of (1, T) without padding.
        padding_free: So do rows that are not packed, each as a document.
        has_lengths: One row also says where documents begin in the arguments of transformers:
            cu_seq_lens_q and _k, (N + 1,) int32, max_length_q and _k, int.
    """

    pad_token_id: int = 0
    pad_to_multiple_of: int = 1
    flatten: bool = False
    padding_free: bool = False
    has_lengths: bool = False

    @classmethod
    def for_tokenizer(
        cls,
        tokenizer: PreTrainedTokenizerBase | None,
        pad_to_multiple_of: int = 1,
        **layout: bool,
    ) -> Collator:
        """Return a collator that pads with the tokenizer's padding token, or its end of text."""
        candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id) if tokenizer else ()
        pad = next((token for token in candidates if token is not None), 0)
        return cls(pad, pad_to_multiple_of, **layout)

    def with_layout(self, **layout: bool) -> Collator:
        """Return a collator that pads alike and lays rows out otherwise."""
        return replace(self, **layout)

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        is_packed = any("position_ids" in row for row in rows)
        lengths = [len(row["input_ids"]) for row in rows]
        is_flat = self.padding_free or (is_packed and self.flatten)
        if is_flat:
            is_packed, rows = True, [_flat(rows)]
        longest = max(len(row["input_ids"]) for row in rows)
        multiple = self.pad_to_multiple_of
        length = -(-longest // multiple) * multiple
        batch: dict[str, Any] = {
            "input_ids": _pad(rows, "input_ids", length, self.pad_token_id),
            "labels": _pad(rows, "labels", length, IGNORED),
        }
        if any(WEIGHTS in row for row in rows):
            weights = [{WEIGHTS: weights_of(row)} for row in rows]
            batch[WEIGHTS] = _pad(weights, WEIGHTS, length, 0.0)
        if is_packed:
            # The padding of a row is one more document, so that no document sees it.
            batch["position_ids"] = torch.stack([_positions(row, length) for row in rows])
            batch["num_tokens"] = torch.tensor(sum(lengths))
            if is_flat and self.has_lengths:
                batch |= document_lengths(batch["position_ids"])
        else:
            batch["attention_mask"] = (
                torch.arange(length) < torch.tensor(lengths).unsqueeze(1)
            ).long()
        if "num_tokens" in rows[0]:
            # A row in place of none.
            batch["num_tokens"] = torch.tensor(rows[0]["num_tokens"])
        for key in sorted({key for row in rows for key in row} - set(_OWN_KEYS)):
            if key in TOKEN_KEYS:
                batch[key] = _pad(rows, key, length, 0)
            else:
                batch[key] = torch.cat([row[key] for row in rows if key in row])
        return batch


def _pad(rows: Sequence[Mapping[str, Any]], key: str, length: int, value: float) -> torch.Tensor:
    padded = torch.full((len(rows), length), value)
    for i, row in enumerate(rows):
        if key in row:
            padded[i, : len(row[key])] = torch.as_tensor(row[key])
    return padded


def _positions(row: Mapping[str, Any], length: int) -> torch.Tensor:
    own = row.get("position_ids", range(len(row["input_ids"])))
    return torch.tensor([*own, *range(length - len(own))])


def _flat(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    flat = join_rows([dict(row) for row in rows])
    flat["position_ids"] = [
        i for row in rows for i in row.get("position_ids", range(len(row["input_ids"])))
    ]
    if "num_tokens" in rows[0]:
        flat["num_tokens"] = rows[0]["num_tokens"]
    return flat
