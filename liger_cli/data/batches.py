"""Which rows an optimizer step sees: a function of the seed and the step, so runs start anywhere.

An epoch is a permutation of the rows, cut into windows: the rows of one optimizer step over all
processes and micro-batches. The last window of an epoch is as long as what is left; no row is
dropped and none is repeated.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader

from liger_cli.data.class_formats import TARGETS
from liger_cli.data.encode import IGNORED, WEIGHTS
from liger_cli.data.packing import answers_of
from liger_cli.data.pair_formats import ANSWER_FIGURES

__all__ = [
    "PLACEHOLDER",
    "BatchPlan",
    "count_labels",
    "count_tokens",
    "count_weight",
    "load_windows",
    "placeholder",
    "without_nulls",
]

_Row = TypeVar("_Row")

# A process without a row in the last micro-batch still takes part in its collectives.
PLACEHOLDER = -1


@dataclass(frozen=True)
class BatchPlan:
    """The order of the data for one process.

    Args:
        num_rows: Rows of the dataset; 0 where it is unknown, of a stream.
        batch_size: Rows of a micro-batch on one process.
        accumulation: Micro-batches of an optimizer step.
        seed: Seed of the permutations.
        rank: This process, of `num_processes`.
    """

    num_rows: int
    batch_size: int
    accumulation: int
    seed: int
    rank: int = 0
    num_processes: int = 1

    @property
    def rows_per_step(self) -> int:
        return self.batch_size * self.accumulation * self.num_processes

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.num_rows / self.rows_per_step)

    def num_rows_of(self, num_steps: int) -> int | None:
        """Return the rows that so many steps see, from the first; None of a stream."""
        if not self.num_rows:
            return None
        epochs, rest = divmod(num_steps, self.steps_per_epoch)
        return epochs * self.num_rows + rest * self.rows_per_step

    def windows(self, first_step: int, last_step: int) -> Iterator[list[list[int]]]:
        """Yield the micro-batches of steps first_step to last_step (from 1), as row numbers."""
        epoch, order = -1, torch.empty(0)
        for step in range(first_step, last_step + 1):
            wanted, position = divmod(step - 1, self.steps_per_epoch)
            if wanted != epoch:
                epoch = wanted
                generator = torch.Generator().manual_seed(self.seed + epoch)
                order = torch.randperm(self.num_rows, generator=generator)
            start = position * self.rows_per_step
            rows: list[int] = order[start : start + self.rows_per_step].tolist()
            yield [batch or [PLACEHOLDER] for batch in self.split(rows)]

    def split(self, rows: list[_Row]) -> list[list[_Row]]:
        """Return this process's micro-batches of the rows of a step; the last may be empty."""
        size, processes = self.batch_size, self.num_processes
        num_batches = math.ceil(len(rows) / (size * processes))
        mine = rows[self.rank :: processes]
        return [mine[i * size : (i + 1) * size] for i in range(num_batches)]


class _Rows:
    """The examples by row number, and for the placeholder a row without labels."""

    def __init__(self, examples: Any) -> None:
        self._examples = examples

    def __getitem__(self, row: int) -> dict[str, Any]:
        if row != PLACEHOLDER:
            return dict(self._examples[row])
        return placeholder(self._examples[0])


def without_nulls(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row of a table without the columns that other rows have alone."""
    return {name: value for name, value in row.items() if value is not None}


def placeholder(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a short row without labels, which is computed and counts nothing."""
    ids = answers_of(row)[0]["input_ids"][:2]
    # A batch has the figures of its answers or the targets of its rows: there are none here.
    names = [name for name in (*ANSWER_FIGURES, TARGETS) if name in row]
    figures: dict[str, list[float]] = {name: [] for name in names}
    # Every batch of data with weights has them, so that all processes compute alike.
    weights = {WEIGHTS: None} if WEIGHTS in row else {}
    labels = [IGNORED] * len(ids)
    return {"input_ids": ids, "labels": labels, "num_tokens": 0, **figures, **weights}


def load_windows(
    examples: Any,
    windows: Iterator[list[list[int]]],
    collator: Any,
    *,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> Iterator[list[dict[str, torch.Tensor]]]:
    """Yield the collated micro-batches of each window.

    Args:
        examples: Rows with input_ids and labels, by number.
        windows: What BatchPlan.windows gives.
        collator: Makes tensors of a list of rows.
    """
    ahead, windows = itertools.tee(windows)
    loader: DataLoader[dict[str, torch.Tensor]] = DataLoader(
        _Rows(examples),  # type: ignore[arg-type]
        batch_sampler=itertools.chain.from_iterable(ahead),
        collate_fn=collator,
        num_workers=num_workers,
        pin_memory=pin_memory,
        # Its own generator: starting a loader draws a number, and a resumed run starts one more.
        generator=torch.Generator(),
    )
    batches = iter(loader)
    for window in windows:
        yield [next(batches) for _ in window]


def count_labels(batch: Mapping[str, torch.Tensor]) -> int:
    """Return how many tokens of a batch are trained on: labels that something is before of."""
    return int((batch["labels"][:, 1:] != IGNORED).sum())


def count_weight(batch: Mapping[str, torch.Tensor]) -> float:
    """Return the sum of the weights of the tokens that are trained on, in float64."""
    if WEIGHTS not in batch:
        return count_labels(batch)
    is_trained = batch["labels"][:, 1:] != IGNORED
    return float(batch[WEIGHTS][:, 1:][is_trained].sum(dtype=torch.float64))


def count_tokens(batch: Mapping[str, torch.Tensor]) -> int:
    """Return how many tokens of a batch are not padding."""
    if "num_tokens" in batch:
        return int(batch["num_tokens"])
    return int(batch["attention_mask"].sum())
