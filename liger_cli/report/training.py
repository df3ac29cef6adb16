"""Results of training, as lines."""

from __future__ import annotations

from liger_cli.common.numbers import format_count
from liger_cli.report.bench import loss_text
from liger_cli.report.values import BatchPart, RunReport

__all__ = ["batch_note", "batch_text", "train_lines"]


def train_lines(report: RunReport) -> list[str]:
    """Return the change of the loss in training, and the batches that made it."""
    train = report.train
    if train is None:
        return []
    losses = f"loss {loss_text([train.first_loss])} to {loss_text([train.final_loss])}"
    tokens = f"{format_count(train.tokens)} tokens, {format_count(train.trained_tokens)} trained on"
    lines = [f"trained {format_count(train.steps)} steps: {losses}; {tokens}"]
    if train.batch is not None:
        lines.append(f"batch of a step: {batch_text(train.batch)}; {batch_note(train.batch)}")
    return lines


def batch_text(batch: BatchPart) -> str:
    """Return the rows and tokens of a step, in the mean."""
    rows = "" if batch.rows is None else f"{_number(batch.rows)} rows, "
    return f"{rows}{_number(batch.tokens)} tokens, {_number(batch.trained_tokens)} trained on"


def batch_note(batch: BatchPart) -> str:
    """Return the size that the configuration asks for: rows, micro-batches, processes."""
    parts = [f"{batch.micro_batch_rows} rows"]
    if batch.micro_batches > 1:
        parts.append(f"{batch.micro_batches} micro-batches")
    if batch.processes > 1:
        parts.append(f"{batch.processes} processes")
    return f"at most {' x '.join(parts)}"


def _number(value: float) -> str:
    """Return a mean: whole, or with one digit where it is small."""
    return format_count(round(value)) if value >= 100 else f"{value:.1f}".removesuffix(".0")
