"""The layout of several ranks that a card's memory asks for."""

from __future__ import annotations

from dataclasses import replace

from liger_cli.commands.estimate.cards import Card
from liger_cli.errors import ConfigError, OutOfMemory
from liger_cli.training.memory.choice import USABLE
from liger_cli.training.memory.limits import RunMemory
from liger_cli.training.parallel.assumed import check_layout
from liger_cli.training.parallel.mesh import ParallelPlan

__all__ = ["chosen_layout", "fewest_shards"]

# The most ranks that are tried where their number is open.
_MAX_SHARDS = 1024


def chosen_layout(memory: RunMemory, card: Card | None) -> tuple[RunMemory, str]:
    """Return the run in the layout that `liger train` chooses without dp keys, and why.

    Without a card its ranks share the model, as they do where a copy does not fit.

    Args:
        memory: With a copy of the model on each rank.
    """
    peak = None if card is None else memory.peak()
    if card is not None and peak is not None and peak <= USABLE * card.usable:
        return memory, f"a copy on each fits into {card.name}"
    shards = ParallelPlan(dp_shard=memory.plan.num_processes)
    try:
        check_layout(memory.config, memory.source, shards)
    except ConfigError as error:
        return memory, f"the model cannot be shared: {error.message}"
    if card is None:
        why = "without --gpu and dp keys the ranks are taken to share the model"
    else:
        why = f"a copy on each does not fit into {card.name}"
    return replace(memory, plan=shards), why


def fewest_shards(memory: RunMemory, card: Card, nproc: int | None) -> RunMemory:
    """Return the run with a batch of one, or its own, in the layout of the fewest shards that fits.

    Args:
        memory: Its batch is what must fit first: one row.
        nproc: Ranks that copies and shards make up; None for shards alone, a power of two.

    Raises:
        ConfigError: Sizes are given that leave nothing to be found, or it cannot be sharded.
        OutOfMemory: Not even the most shards fit.
    """
    config = memory.config
    if config.dp_shard_size is not None or config.dp_replicate_size != 1:
        raise ConfigError(
            "--fit shards finds dp_shard_size and dp_replicate_size, and one of them is given",
            hint="Leave them out, or --fit batch.",
        )
    most = nproc or _MAX_SHARDS
    sizes = [n for n in range(1, most + 1) if (most % n == 0 if nproc else n & (n - 1) == 0)]
    one_row = config.model_copy(update={"per_device_train_batch_size": 1})
    least = replace(memory, config=one_row, batch=replace(memory.batch, size=1))
    for size in sizes:
        plan = ParallelPlan(nproc // size if nproc else 1, size)
        check_layout(config, memory.source, plan)
        if replace(least, plan=plan).estimate().peak <= card.usable:
            return replace(memory, plan=plan)
    raise OutOfMemory(
        f"{memory.source.name} does not fit into {card.name}, shared among {most} ranks",
        hint="A shorter --seq-len, --gradient-checkpointing, or --cpu-offload.",
    )
