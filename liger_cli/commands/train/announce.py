"""Messages of a run before its first step: its data, length, model and kernels."""

from __future__ import annotations

from liger_cli.common.numbers import format_count
from liger_cli.config import RunConfig
from liger_cli.data.packing import PackedRows, packing_problem
from liger_cli.data.padding import WORTH_PACKING, packed_share, padding_share
from liger_cli.report import RunReport, notify, show_patched
from liger_cli.training.inputs import Inputs
from liger_cli.training.model.adapters import trained_line
from liger_cli.training.model.template_facts import template_facts
from liger_cli.training.objectives.table import describe_objective
from liger_cli.training.prepared import PreparedRun
from liger_kernels.transformers.patching.engine import PatchRecord

__all__ = ["announce_data", "announce_kernels", "padding_lines"]

# A share of padding that is not worth a line.
_LITTLE = 0.02
# Why rows are left out.
_NOTHING = {"rows": "nothing to train on", "pairs": "an answer has no token to train on"}


def announce_kernels(report: RunReport, record: PatchRecord) -> None:
    """Print the table of ops of a patched model, and warn of an op asked for that is on none."""
    show_patched(report)
    counts = record.coverage
    for op in record.plan.ops:
        if op in counts and not counts[op]["patched"]:
            reason = next(skip.reason for skip in record.skipped if skip.op == op)
            notify(f"warning: {op} is on none of {counts[op]['candidates']} modules: {reason}")


def announce_template(config: RunConfig, inputs: Inputs) -> None:
    """Print the chat template that a run sets, and what is amiss with it."""
    if config.chat_template is None:
        return
    facts = template_facts(
        inputs.preprocessing.tokenizer, inputs.source, config.chat_template, config.enable_thinking
    )
    if facts is not None:
        notify(facts.line)
        for warning in facts.warnings:
            notify(f"warning: {warning}")


def padding_lines(config: RunConfig, inputs: Inputs) -> list[str]:
    """Return a line on the padding of batches and what packing brings, if it brings anything."""
    lengths = inputs.lengths
    if lengths is None:
        return []
    padded = padding_share(lengths, config.per_device_train_batch_size, config.order_seed)
    num_rows, packed = packed_share(lengths, config.max_length, config.packing_strategy)
    share = f"{padded:.0%} of the tokens of a batch"
    if config.packing:
        return [f"padding: {packed:.0%} in packed rows; padded one by one it would be {share}"]
    if padded < _LITTLE:
        return []
    if inputs.attention.padding_free:
        return [f"padding: none, rows are laid end to end; padded it would be {share}"]
    line = f"padding: {share}"
    length = config.max_length * config.answers_per_row
    if packing_problem(inputs.meta_model, length) is None:
        times = (1 - packed) / (1 - padded)
        if times >= WORTH_PACKING:
            line += (
                f"; --packing would feed {times:.1f} times fewer, in {num_rows} rows instead of "
            )
            line += f"{len(lengths)}"
        line += "; --padding-free would feed none"
    return [line]


def announce_data(run: PreparedRun) -> None:
    """Print the data and the length of a run, and how much of the model it trains."""
    inputs, batches = run.inputs, run.batches
    data, stats = inputs.data, inputs.data.stats
    what = "pairs" if run.config.trains_pairs else "rows"
    if batches.num_rows:
        notes = [
            f"{format_count(stats.rows)} {what}",
            f"{format_count(stats.tokens)} tokens, {format_count(stats.trained_tokens)} trained on",
            *data.notes,
        ]
        if isinstance(inputs.train, PackedRows):
            notes.append(f"packed into {format_count(len(inputs.train))} rows")
    else:
        notes = ["streamed; the report counts what was read"]
    if stats.dropped_rows:
        notes.append(f"{format_count(stats.dropped_rows)} {what} left out: {_NOTHING[what]}")
    if stats.truncated_rows:
        notes.append(f"{format_count(stats.truncated_rows)} {what} cut to max_length")
    notes += [f"{format_count(number)} {name}" for name, number in stats.left_out.items()]
    if stats.unused_columns:
        notes.append(f"not used: {', '.join(stats.unused_columns)}")
    for name, rows in inputs.eval.items():
        where = f"evaluation of {name}" if name else "evaluation"
        notes.append(f"{format_count(len(rows))} {what} for {where}")
    licence = f" ({data.licence})" if data.licence else ""
    announce_template(run.config, inputs)
    notify(f"data: {data.name}{licence}: " + "; ".join(notes))
    for line in padding_lines(run.config, inputs):
        notify(line)
    epoch = f", {batches.steps_per_epoch} an epoch" if batches.num_rows else ""
    notify(f"plan: {run.num_steps} steps{epoch}")
    notify(f"model: {trained_line(inputs.meta_model)}")
    if (objective := describe_objective(run.config, inputs.meta_model)) is not None:
        notify(objective)
    if alpha := run.config.neftune_noise_alpha:
        notify(f"neftune: noise of alpha {alpha:g} on the embeddings in training steps")
