"""Batches out of pairs: both answers as rows, with the number of the answer a token belongs to.

The chosen answer of pair i has the number 2i and the rejected one 2i + 1, whether answers are
padded, laid end to end or packed; so an objective reads all three alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from liger_cli.data.collate import Collator
from liger_cli.data.packing import answers_of
from liger_cli.data.pair_formats import ANSWER_FIGURES

__all__ = ["NO_ANSWER", "PairCollator", "collate_answers"]

# The number of padding, and of the row of a process without any.
NO_ANSWER = -1


@dataclass(frozen=True)
class PairCollator:
    """Make a batch of pairs, or of packed rows of pairs.

    Beside the keys of collate_answers, over 2N answers, it has num_pairs, an int64 without
    dimensions.

    Args:
        answers: Makes the batch of answers.
    """

    answers: Collator

    @property
    def flatten(self) -> bool:
        return self.answers.flatten

    def with_layout(self, **layout: bool) -> PairCollator:
        """Return a collator that lays answers out otherwise."""
        return PairCollator(self.answers.with_layout(**layout))

    def __call__(self, pairs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        batch = collate_answers(self.answers, pairs)
        batch["num_pairs"] = batch["num_answers"] // 2
        return batch


def collate_answers(collator: Collator, sources: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Make a batch of the answers of rows.

    Beside the keys of Collator it has answer_ids, (B, T) int64, num_answers, an int64 without
    dimensions, and of ANSWER_FIGURES those that the rows have, (N,) float64.

    Args:
        collator: Makes the batch of tokens.
        sources: Pairs; or rows, packed ones too, with answer_ids of their tokens.
    """
    rows: list[Mapping[str, Any]] = []
    numbers: list[list[int]] = []
    num_answers = 0
    for source in sources:
        first = num_answers
        for row, ids in _numbered(source):
            rows.append(row)
            numbers.append([first + number for number in ids])
            num_answers = max([num_answers - 1, *numbers[-1]]) + 1
    batch = collator(rows)
    if len(batch["input_ids"]) < len(rows):
        # Laid end to end.
        numbers = [[number for ids in numbers for number in ids]]
    batch["answer_ids"] = torch.full_like(batch["input_ids"], NO_ANSWER)
    for row, ids in zip(batch["answer_ids"], numbers, strict=True):
        row[: len(ids)] = torch.tensor(ids)
    batch["num_answers"] = torch.tensor(num_answers)
    for name in ANSWER_FIGURES:
        if name in sources[0]:
            values = [value for source in sources for value in _as_list(source[name])]
            batch[name] = torch.tensor(values, dtype=torch.float64)
    return batch


def _numbered(pair: Mapping[str, Any]) -> Iterator[tuple[Mapping[str, Any], list[int]]]:
    """Yield the rows of a pair or of a packed row, with the number of the answer of each token."""
    answers = answers_of(pair)
    if len(answers) > 1:
        for number, row in enumerate(answers):
            yield row, [number] * len(row["input_ids"])
    else:
        # The row of a process without answers has none.
        row = {key: pair[key] for key in pair if key not in ("answer_ids", *ANSWER_FIGURES)}
        yield row, pair.get("answer_ids", [])


def _as_list(value: Any) -> list[float]:
    return value if isinstance(value, list) else [value]
