"""The micro-batches of each step, in one order whatever a run was stopped and resumed at."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any, Protocol

import pyarrow.compute
import torch
from datasets import Dataset

from liger_cli.config import RunConfig
from liger_cli.data.batches import BatchPlan, load_windows, placeholder
from liger_cli.data.cache import Counts
from liger_cli.data.packing import PackedRows
from liger_cli.data.pair_formats import FIGURES
from liger_cli.data.pair_maker import PairMaker
from liger_cli.data.stream import Place, Stream
from liger_cli.data.unpaired_batches import MismatchedRows

__all__ = ["Feed", "identity", "make_feed", "pair_figures", "plan_batches", "total_steps"]

Window = list[dict[str, torch.Tensor]]


class Feed(Protocol):
    """Give the micro-batches of steps, and say what a checkpoint must hold to go on."""

    def windows(self, first_step: int, last_step: int) -> Iterator[Window]:
        """Yield the collated micro-batches of steps first_step to last_step, from 1."""

    def state_dict(self) -> dict[str, Any]:
        """Return the place behind the window that was given out last."""

    def load_state_dict(self, values: Mapping[str, Any]) -> None:
        """Goes to that place, before the first window."""


def plan_batches(config: RunConfig, examples: Any, accelerator: Any) -> BatchPlan:
    """Return the order of the training data on this process."""
    return BatchPlan(
        # Nobody knows the rows of a stream.
        num_rows=0 if isinstance(examples, Stream) else len(examples),
        batch_size=config.per_device_train_batch_size,
        accumulation=config.gradient_accumulation_steps,
        seed=config.order_seed,
        rank=accelerator.process_index,
        num_processes=accelerator.num_processes,
    )


def total_steps(config: RunConfig, plan: BatchPlan) -> int:
    """Return the optimizer steps of a whole run."""
    if config.max_steps > 0:
        return config.max_steps
    return math.ceil(config.num_train_epochs * plan.steps_per_epoch)


def identity(examples: Any) -> dict[str, Any]:
    """Return values that differ where the data differ from those of an earlier run.

    That is a hash of all ids and labels, and of the figures of pairs; of a stream and of images,
    which are made as they are asked for, no more than their size.
    """
    if isinstance(examples, Stream):
        return {"bytes": sum(source.num_bytes for source, _ in examples.sources)}
    rows = examples.rows if isinstance(examples, PackedRows) else examples
    # Mismatched answers are a function of the rows.
    rows = rows.rows if isinstance(rows, MismatchedRows) else rows
    found: dict[str, Any] = {"rows": len(rows)}
    if isinstance(rows, Dataset):
        digest = hashlib.sha256()
        for batch in rows.with_format("arrow").iter(10_000):
            for column in batch.columns:
                if pyarrow.types.is_list(column.type):
                    digest.update(pyarrow.compute.list_value_length(column).to_numpy())
                    column = pyarrow.compute.list_flatten(column)
                digest.update(column.to_numpy())
        found["sha256"] = digest.hexdigest()
    return found


def pair_figures(examples: Any) -> frozenset[str]:
    """Return the names of FIGURES that pairs have, of a Stream too; none of no data."""
    if isinstance(examples, Stream):
        makers = [maker for _, maker in examples.sources if isinstance(maker, PairMaker)]
        # All sources have the same ones, see check_figures.
        return frozenset(makers[0].form.figures if makers else ())
    return frozenset(FIGURES).intersection(examples[0] if examples else ())


def make_feed(
    examples: Any, plan: BatchPlan, collator: Any, *, num_workers: int = 0, pin_memory: bool = False
) -> Feed:
    """Return the feed of rows with numbers, or of a Stream."""
    if isinstance(examples, Stream):
        return _StreamFeed(examples, plan, collator)
    return _NumberedFeed(examples, plan, collator, num_workers, pin_memory)


class _NumberedFeed:
    """The number of a step says which rows it has: there is nothing to keep."""

    def __init__(
        self, examples: Any, plan: BatchPlan, collator: Any, num_workers: int, pin_memory: bool
    ) -> None:
        self._examples = examples
        self._plan = plan
        self._collator = collator
        self._options: dict[str, Any] = {"num_workers": num_workers, "pin_memory": pin_memory}

    def windows(self, first_step: int, last_step: int) -> Iterator[Window]:
        numbers = self._plan.windows(first_step, last_step)
        return load_windows(self._examples, numbers, self._collator, **self._options)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, values: Mapping[str, Any]) -> None:
        pass


class _StreamFeed:
    """Every process reads all rows and keeps its share; the last window of an epoch is short."""

    def __init__(self, stream: Stream, plan: BatchPlan, collator: Any) -> None:
        self._stream = stream
        self._plan = plan
        self._collator = collator
        self._place = stream.start()

    def windows(self, first_step: int, last_step: int) -> Iterator[Window]:
        rows = self._windows()
        for _ in range(first_step, last_step + 1):
            window, place = next(rows)
            batches = self._plan.split(window)
            self._place = place
            yield [self._collator(batch or [placeholder(window[0])]) for batch in batches]

    def _windows(self) -> Iterator[tuple[list[dict[str, Any]], Place]]:
        window: list[dict[str, Any]] = []
        epoch, place = self._place.epoch, self._place
        for row, its_epoch, after in self._stream.rows(self._place):
            if window and its_epoch != epoch:
                yield window, place
                window = []
            epoch, place = its_epoch, after
            window.append(row)
            if len(window) == self._plan.rows_per_step:
                yield window, place
                window = []

    def state_dict(self) -> dict[str, Any]:
        return asdict(self._place)

    def load_state_dict(self, values: Mapping[str, Any]) -> None:
        self._place = Place(**{**values, "counts": Counts(**values["counts"])})
