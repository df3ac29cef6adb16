"""The report of `liger train --dry-run`: a run that is prepared and not started."""

from __future__ import annotations

import statistics
from typing import Any

from pydantic import BaseModel, ConfigDict

from liger_cli.common.numbers import format_bytes
from liger_cli.data.batches import BatchPlan, count_labels, count_tokens
from liger_cli.data.feed import make_feed
from liger_cli.data.packing import answer_lengths
from liger_cli.report import RunReport, notify
from liger_cli.report.build import report_of
from liger_cli.training.inputs import Inputs
from liger_cli.training.memory.limits import device_memory, parts_line
from liger_cli.training.prepared import PreparedRun

__all__ = ["DryRunReport", "describe_dry_run"]

# Enough for quantiles; more would be read for nothing.
_ROWS_LOOKED_AT = 10_000


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


class RowLengths(_Part):
    """Tokens of a row, over the first rows of the data."""

    rows: int
    median: int
    p90: int
    p99: int
    longest: int


class FirstBatch(_Part):
    """The micro-batches of the first step; padding is the share of what is fed."""

    shapes: list[list[int]]
    tokens: int
    trained_tokens: int
    padding: float


class MemoryPart(_Part):
    """Estimated bytes of a step by part, not all there at once, and the bytes of the device."""

    weights: int
    optimizer: int
    gradients: int
    activations: dict[str, int]
    logits: int
    head_buffers: int
    peak: int
    device: int


class DryRunReport(RunReport):
    """The report of a run before it starts.

    Attributes:
        memory: None of a model whose step cannot be followed without data.
        row_lengths: None of a stream.
    """

    first_batch: FirstBatch
    memory: MemoryPart | None = None
    row_lengths: RowLengths | None = None


def describe_dry_run(run: PreparedRun) -> DryRunReport:
    """Return the report with the first batch, row lengths and memory, and print them."""
    found = run.memory.found
    part = None
    if found is not None:
        sizes = {name: getattr(found, name) for name in MemoryPart.model_fields if name != "device"}
        part = MemoryPart(**sizes, device=device_memory(run.device))
    first, lengths = _first_batch(run.inputs, run.batches), _row_lengths(run.inputs)
    if lengths is not None:
        are_answers = run.config.trains_pairs and not run.config.packing
        notify(
            f"{'answers' if are_answers else 'rows'}: {lengths.median} tokens in the median, "
            f"{lengths.p90} in 90 % or less, {lengths.p99} in 99 %, the longest {lengths.longest}"
        )
    for line in run.inputs.attention.lines():
        notify(line)
    shapes = ", ".join("x".join(map(str, shape)) for shape in first.shapes)
    notify(
        f"first step: {shapes}; {first.tokens} tokens, {first.trained_tokens} trained on, "
        f"{first.padding:.0%} padding"
    )
    if found is not None and part is not None:
        notify(f"memory of a step, estimated: {parts_line(found)}, of {format_bytes(part.device)}")
    report = report_of("train", run.config, run.inputs, run.patch_plan)
    return DryRunReport(
        **{name: getattr(report, name) for name in RunReport.model_fields},
        first_batch=first,
        memory=part,
        row_lengths=lengths,
    )


def _row_lengths(inputs: Inputs) -> RowLengths | None:
    if not hasattr(inputs.train, "__len__") or inputs.data.has_images:
        return None
    count = min(_ROWS_LOOKED_AT, len(inputs.train))
    lengths = [length for i in range(count) for length in answer_lengths(inputs.train[i])]
    cuts = (
        statistics.quantiles(lengths, n=100, method="inclusive")
        if len(lengths) > 1
        else lengths * 99
    )
    return RowLengths(
        rows=count,
        median=round(cuts[49]),
        p90=round(cuts[89]),
        p99=round(cuts[98]),
        longest=max(lengths),
    )


def _first_batch(inputs: Inputs, batches: BatchPlan) -> FirstBatch:
    [window] = make_feed(inputs.train, batches, inputs.collator).windows(1, 1)
    shapes: list[Any] = [list(batch["input_ids"].shape) for batch in window]
    num_tokens = sum(map(count_tokens, window))
    num_places = sum(batch["input_ids"].numel() for batch in window)
    return FirstBatch(
        shapes=shapes,
        tokens=num_tokens,
        trained_tokens=sum(map(count_labels, window)),
        padding=1 - num_tokens / num_places,
    )
