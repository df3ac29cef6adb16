"""What a run says of itself before its first step."""

from __future__ import annotations

from liger_cli.common.numbers import format_count
from liger_cli.data.batches import BatchPlan
from liger_cli.data.packing import PackedRows
from liger_cli.report import notify
from liger_cli.training.inputs import Inputs
from liger_kernels.transformers.patching.engine import PatchRecord

__all__ = ["announce_data", "announce_kernels"]


def announce_kernels(record: PatchRecord) -> None:
    """Tells on how many modules each op is, and warns of an op asked for that is on none."""
    counts = record.coverage
    shown = [f"{op} {n['patched']}/{n['candidates']}" for op, n in counts.items()]
    notify(f"kernels: {'  '.join(shown) or 'none'}")
    for op in record.plan.ops:
        if op in counts and not counts[op]["patched"]:
            reason = next(skip.reason for skip in record.skipped if skip.op == op)
            notify(f"warning: {op} is on none of {counts[op]['candidates']} modules: {reason}")


def announce_data(inputs: Inputs, batches: BatchPlan, num_steps: int) -> None:
    """Tells what data are trained on, and in how many steps."""
    data, stats = inputs.data, inputs.data.stats
    if batches.num_rows:
        notes = [
            f"{format_count(stats.rows)} rows",
            f"{format_count(stats.tokens)} tokens, {format_count(stats.trained_tokens)} trained on",
            *data.notes,
        ]
        if isinstance(inputs.train, PackedRows):
            notes.append(f"packed into {format_count(len(inputs.train))} rows")
    else:
        notes = ["streamed; the report counts what was read"]
    if stats.dropped_rows:
        notes.append(f"{format_count(stats.dropped_rows)} rows left out: nothing to train on")
    if stats.truncated_rows:
        notes.append(f"{format_count(stats.truncated_rows)} rows cut to max_length")
    notes += [f"{format_count(number)} {name}" for name, number in stats.left_out.items()]
    if stats.unused_columns:
        notes.append(f"not used: {', '.join(stats.unused_columns)}")
    for name, rows in inputs.eval.items():
        what = f"evaluation of {name}" if name else "evaluation"
        notes.append(f"{format_count(len(rows))} rows for {what}")
    licence = f" ({data.licence})" if data.licence else ""
    notify(f"data: {data.name}{licence}: " + "; ".join(notes))
    epoch = f", {batches.steps_per_epoch} an epoch" if batches.num_rows else ""
    notify(f"plan: {num_steps} steps{epoch}")
