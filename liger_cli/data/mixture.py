"""Several datasets as one: how often the rows of each are used, and in which order they are read.

A weight is the share of the rows that a dataset gives, relative to the other weights; one without a
weight has 1, and where none has one every row is used once. Every row is used at least once in an
epoch, so the datasets that are too small for their share are repeated and none is cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from liger_cli.data.encode import WEIGHTS
from liger_cli.errors import ConfigError

_MAX_ROWS = 2**26

__all__ = ["Joined", "join_sources", "next_source", "row_counts"]


def row_counts(sizes: Sequence[int], weights: Sequence[float | None]) -> list[int]:
    """Return how many rows of each dataset an epoch has.

    Raises:
        ConfigError: The weights make it longer than an order of rows can be kept.
    """
    if all(weight is None for weight in weights):
        return list(sizes)
    shares = [1.0 if weight is None else weight for weight in weights]
    scale = max(size / share for size, share in zip(sizes, shares, strict=True))
    wanted = [scale * share for share in shares]
    # Of sizes and weights that are alike it is far less; the order of an epoch is kept in memory.
    if not sum(wanted) <= max(_MAX_ROWS, 4 * sum(sizes)):
        raise ConfigError(
            f"dataset: the weights {', '.join(f'{share:g}' for share in shares)} of datasets of "
            f"{', '.join(map(str, sizes))} rows make an epoch of {sum(wanted):.3g} rows, in which "
            f"every row of each is used; at most {_MAX_ROWS} are allowed",
            hint="weights are relative: 3 and 1 are three rows of the first for one of the second",
        )
    return [max(size, round(rows)) for size, rows in zip(sizes, wanted, strict=True)]


def next_source(taken: Sequence[float], weights: Sequence[float]) -> int:
    """Return which source is read next, after so many records of each.

    It is the one that is furthest behind its share, so any stretch of records has the shares.
    """
    waits = [(count + 1) / weight for count, weight in zip(taken, weights, strict=True)]
    return waits.index(min(waits))


def join_sources(
    parts: Sequence[tuple[str, Any, float | None]],
) -> tuple[Any, tuple[str, ...]]:
    """Return the rows of named datasets with weights as one, and a note on each repeated one."""
    if len(parts) == 1:
        return parts[0][1], ()
    import datasets

    sizes = [len(rows) for _, rows, _ in parts]
    counts = row_counts(sizes, [weight for _, _, weight in parts])
    notes = tuple(
        f"{name}: {count} of its {size} rows an epoch"
        for (name, _, _), size, count in zip(parts, sizes, counts, strict=True)
    )
    starts = np.cumsum([0, *sizes[:-1]])
    order = np.concatenate(
        [
            start + np.arange(count) % size
            for start, size, count in zip(starts, sizes, counts, strict=True)
        ]
    )
    all_rows = [rows for _, rows, _ in parts]
    if not all(isinstance(rows, datasets.Dataset) for rows in all_rows):
        return Joined(tuple(all_rows), order), notes
    joined = datasets.concatenate_datasets(all_rows)
    return (joined if counts == sizes else joined.select(order)), notes


@dataclass(frozen=True)
class Joined:
    """Rows of several datasets, which need not be of one kind.

    Args:
        parts: The datasets.
        order: Numbers of rows, counted over all parts.
    """

    parts: tuple[Any, ...]
    order: np.ndarray[Any, Any]

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, number: int) -> dict[str, Any]:
        row = int(self.order[number])
        for part in self.parts:
            if row < len(part):
                return {**self._absent, **part[row]}
            row -= len(part)
        raise IndexError(number)

    @cached_property
    def _absent(self) -> dict[str, None]:
        """The columns of weights of the parts that have none, as they are in a part that has."""
        has_weights = any(WEIGHTS in getattr(part, "column_names", ()) for part in self.parts)
        return {WEIGHTS: None} if has_weights else {}

    def select(self, numbers: Sequence[int]) -> Joined:
        return Joined(self.parts, self.order[np.asarray(numbers, dtype=int)])
