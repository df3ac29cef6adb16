"""The time of a step in each layout of so many ranks, by a simple model of computing and sending.

Computing is products at the rate of a card, and bytes at the rate of its memory. A collective takes
the time of its bytes on the slowest link of its ring, and of its hops. Gathers hide behind the
forward, gathers and sums of gradients behind the backward, as far as these last; the first gathers
and the last sums hide behind nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from liger_cli.commands.estimate.machine import Machine
from liger_cli.commands.estimate.work import Work
from liger_cli.training.parallel.mesh import ParallelPlan

__all__ = ["StepTime", "layouts_of", "step_time"]

# DDP sums gradients in buckets of so many bytes; the last hides behind nothing.
_BUCKET = 25 << 20


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step.

    Attributes:
        total: All of it.
        collectives: In which a rank sends and receives.
        exposed: Of these, in which it does nothing else.
    """

    total: float
    collectives: float
    exposed: float


def layouts_of(num_ranks: int, per_host: int) -> list[ParallelPlan]:
    """Return the layouts to compare: copies, shards of a host and of several, and of all ranks."""
    sizes = {1, num_ranks}
    size = per_host
    while size < num_ranks:
        sizes |= {size} if num_ranks % size == 0 else set()
        size *= per_host
    return [ParallelPlan(num_ranks // size, size) for size in sorted(sizes)]


def step_time(work: Work, machine: Machine, plan: ParallelPlan) -> StepTime:
    """Return the time of a step in a layout."""
    forward = work.forward_flops / machine.flops + work.forward_bytes / machine.copy
    backward = work.backward_flops / machine.flops + work.backward_bytes / machine.copy
    optimizer = work.state / plan.dp_shard / machine.copy
    shards, sums = _of_shards(work, machine, plan), _of_copies(work, machine, plan)
    ahead = max(0.0, shards.forward - forward) + max(0.0, shards.backward - backward)
    exposed = work.micro_batches * (shards.alone + ahead)
    # Copies are summed once, behind the last backward.
    room = max(0.0, backward - shards.backward)
    exposed += sums.alone + max(0.0, sums.backward - room)
    sent = work.micro_batches * shards.total + sums.total
    computed = work.micro_batches * (forward + backward) + optimizer
    if plan.num_processes > 1:
        computed = computed * (1 + machine.together) + machine.drag * (sent - exposed)
    return StepTime(computed + exposed, sent, exposed)


@dataclass(frozen=True)
class _Sent:
    """Seconds of collectives that may hide behind forward and backward, and that may not."""

    forward: float = 0.0
    backward: float = 0.0
    alone: float = 0.0

    @property
    def total(self) -> float:
        return self.forward + self.backward + self.alone


def _of_shards(work: Work, machine: Machine, plan: ParallelPlan) -> _Sent:
    """Return the collectives of a micro-batch among the ranks that share a copy."""
    if not plan.is_sharded:
        return _Sent()
    group = machine.neighbours(plan.dp_shard)
    gathers = [machine.gather(size, group) for size in work.groups]
    sums = [machine.gather(size, group) for size in work.reduced if size]
    root = machine.gather(work.root, group)
    last = machine.gather(work.reduced_root, group) if work.reduced_root else 0.0
    again = sum(gathers) if work.is_resharded else 0.0
    # Nothing is computed yet when the root, the embedding and the first layer are gathered.
    return _Sent(
        forward=sum(gathers[2:]),
        backward=again + sum(sums[1:]),
        alone=root + sum(gathers[:2]) + last + sum(sums[:1]),
    )


def _of_copies(work: Work, machine: Machine, plan: ParallelPlan) -> _Sent:
    """Return the sums of a step over the copies."""
    if plan.dp_replicate == 1:
        return _Sent()
    group = machine.spread(plan.dp_replicate, plan.dp_shard)
    if not plan.is_sharded:
        last = machine.all_reduce(min(_BUCKET, work.copied), group)
        num_buckets = max(1.0, work.copied / _BUCKET)
        return _Sent(backward=last * (num_buckets - 1), alone=last)
    sizes = [size / plan.dp_shard for size in (*work.reduced, work.reduced_root) if size]
    sums = [machine.all_reduce(size, group) for size in sizes]
    return _Sent(backward=sum(sums[1:-1]), alone=sum(sums[:1]) + sums[-1])
