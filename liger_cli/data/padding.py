"""The share of padding in batches, and what packing makes of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from liger_cli.data.packing import Strategy, pack_lengths, row_lengths

__all__ = ["WORTH_PACKING", "Lengths", "packed_share", "padding_share", "sampled_lengths"]

# So many times fewer tokens are worth the advice to pack.
WORTH_PACKING = 1.05

# Enough for a share; more would be read for nothing.
_ROWS_LOOKED_AT = 10_000

Lengths = np.ndarray[Any, Any]


def sampled_lengths(rows: Any) -> Lengths | None:
    """Return the tokens of the first rows of a datasets.Dataset; None of other rows."""
    if not hasattr(rows, "select_columns") or not len(rows):
        return None
    return row_lengths(rows.select(range(min(_ROWS_LOOKED_AT, len(rows)))))


def padding_share(lengths: Lengths, batch_size: int, seed: int | None) -> float:
    """Return the share of padding in batches of rows, in the order of a run's first epoch.

    Args:
        lengths: Tokens of each row, (N,), or of each answer of a pair, (N, 2).
        batch_size: Rows, or pairs, of a micro-batch.
        seed: Of the order; None is that of the rows.
    """
    ordered = lengths
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        ordered = lengths[torch.randperm(len(lengths), generator=generator).numpy()]
    if ordered.ndim > 1:
        batch_size *= ordered.shape[1]
        ordered = ordered.reshape(-1)
    starts = np.arange(0, len(ordered), batch_size)
    sizes = np.diff([*starts, len(ordered)])
    fed = int((np.maximum.reduceat(ordered, starts) * sizes).sum())
    return 1 - float(lengths.sum()) / fed


def packed_share(lengths: Lengths, max_length: int, strategy: Strategy) -> tuple[int, float]:
    """Return the number of packed rows, and the share of their tokens that is padding."""
    packs, size = pack_lengths(lengths, max_length, strategy)
    return len(packs), 1 - float(lengths.sum()) / (len(packs) * size)
