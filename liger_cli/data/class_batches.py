"""Batches out of rows with targets; the label of a token says that a row is scored there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from liger_cli.data.class_formats import TARGETS
from liger_cli.data.collate import Collator
from liger_cli.data.encode import IGNORED

__all__ = ["ClassCollator", "scored_places"]


@dataclass(frozen=True)
class ClassCollator:
    """Make a batch of rows, or of packed rows: the keys of Collator, and targets, float32.

    Those are (N, 1), the number of a class, or (N, C), where rows have several; in the order of
    the places in the batch (scored_places).

    Args:
        rows: Makes the batch of tokens.
    """

    rows: Collator

    @property
    def flatten(self) -> bool:
        return self.rows.flatten

    def with_layout(self, **layout: bool) -> ClassCollator:
        """Return a collator that lays rows out otherwise."""
        return ClassCollator(self.rows.with_layout(**layout))

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        targets = [target for row in rows for target in _targets(row)]
        tokens = [{key: row[key] for key in row if key != TARGETS} for row in rows]
        return {**self.rows(tokens), TARGETS: torch.tensor(targets, dtype=torch.float32)}


def _targets(row: Mapping[str, Any]) -> list[list[float]]:
    """Return the targets of a packed row, or the one of a row; none of a process without rows."""
    found: list[Any] = row[TARGETS]
    return found if not found or isinstance(found[0], list) else [found]


def scored_places(batch: Mapping[str, Any]) -> torch.Tensor:
    """Return the places in the flattened batch that are scored, (N,) int64, on the host."""
    return (batch["labels"].flatten() != IGNORED).nonzero().flatten()
