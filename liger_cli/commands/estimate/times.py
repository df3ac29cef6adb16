"""The layouts that the ranks of an estimate can have, with the time of a step in each."""

from __future__ import annotations

from liger_cli.commands.estimate.machine import Machine
from liger_cli.commands.estimate.step_time import layouts_of, step_time
from liger_cli.commands.estimate.work import Work, work_of
from liger_cli.errors import ConfigError
from liger_cli.report.estimate import TimeRow
from liger_cli.training.memory.limits import RunMemory
from liger_cli.training.memory.values import MemoryEstimate
from liger_cli.training.model.adapters import is_quantised
from liger_cli.training.parallel.assumed import check_layout
from liger_cli.training.parallel.mesh import ParallelPlan

__all__ = ["time_rows"]


def time_rows(memory: RunMemory, found: MemoryEstimate, machine: Machine) -> list[TimeRow]:
    """Return a row for each layout; none of a run whose speed the model does not know.

    That is one on a CPU, in 32 bits, or of quantised weights.

    Args:
        memory: The run in its layout.
        found: Its memory.
    """
    config, plan = memory.config, memory.plan
    is_wide = config.dtype == "float32" and not (config.bf16 or config.fp16)
    if is_wide or not memory.on_gpu or is_quantised(config, memory.source):
        return []
    if plan.num_processes == 1:
        return []
    work = work_of(memory, found)
    plans = layouts_of(plan.num_processes, machine.per_host)
    plans += [] if plan in plans else [plan]
    return [_row(work, machine, p, _peak(found, plan, p)) for p in plans if _is_allowed(memory, p)]


def _is_allowed(memory: RunMemory, plan: ParallelPlan) -> bool:
    try:
        check_layout(memory.config, memory.source, plan)
    except ConfigError:
        return False
    return not memory.config.cpu_offload or plan.is_sharded


def _row(work: Work, machine: Machine, plan: ParallelPlan, peak: int) -> TimeRow:
    time, alone = step_time(work, machine, plan), step_time(work, machine, ParallelPlan())
    tokens = work.tokens * work.micro_batches * plan.num_processes
    return TimeRow(
        layout=plan.name,
        dp_replicate_size=plan.dp_replicate,
        dp_shard_size=plan.dp_shard,
        step_ms=time.total * 1e3,
        collectives_ms=time.collectives * 1e3,
        exposed_ms=time.exposed * 1e3,
        tokens_per_s=tokens / time.total,
        efficiency=alone.total / time.total,
        peak=peak,
    )


def _peak(found: MemoryEstimate, plan: ParallelPlan, other: ParallelPlan) -> int:
    """Return about the peak of another layout: the shares of the model are larger or smaller."""
    if other.dp_shard == plan.dp_shard:
        return found.peak
    held = ("weights", "reference", "gradients", "optimizer")
    shared = sum(found.at_peak.get(part, 0) for part in held)
    peak = found.peak - shared + shared * plan.dp_shard // other.dp_shard
    if other.is_sharded:
        return peak
    # Without layers that are gathered, and with buckets as large as the gradients.
    peak -= sum(found.at_peak.get(part, 0) for part in found.of_ranks)
    gradients = found.gradients * plan.dp_shard
    whole = (found.weights + found.reference + found.optimizer) * plan.dp_shard + 2 * gradients
    return max(peak + gradients, whole)
