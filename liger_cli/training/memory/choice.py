"""The layout of a run: what its keys ask for, else what its memory asks for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list

from liger_cli.common.numbers import format_bytes
from liger_cli.config import RunConfig
from liger_cli.errors import ConfigError
from liger_cli.training.checkpoints.files import read_manifest
from liger_cli.training.inputs import Inputs
from liger_cli.training.memory.limits import RunMemory, device_memory
from liger_cli.training.parallel.mesh import ParallelPlan, explicit_plan, refitted
from liger_cli.training.parallel.refusals import check_inputs, check_sharded

__all__ = ["USABLE", "choose_plan", "with_sizes_of_launch"]

# Of a device's memory what the estimate may fill: the rest is for NCCL, fragments and its error.
USABLE = 0.9


def choose_plan(
    config: RunConfig, inputs: Inputs, accelerator: Any
) -> tuple[ParallelPlan, str | None]:
    """Return the layout of a run, and a line on it where there are several processes.

    Every process calls it and gets the same.

    Raises:
        LigerError: The keys ask for what this launch, or a sharded run, cannot do.
    """
    count = accelerator.num_processes
    plan = explicit_plan(config, count)
    if plan is not None and plan.is_sharded:
        check_inputs(inputs)
    if plan is not None:
        return plan, f"parallel: {plan.name}, as the keys say" if count > 1 else None
    found = [_by_memory(config, inputs, accelerator.device, count)]
    # Devices may differ, and the main process's decides.
    broadcast_object_list(found)
    return found[0]


def with_sizes_of_launch(checkpoint: Path, config: RunConfig, num_processes: int) -> RunConfig:
    """Return the configuration of a resumed run with a layout that this launch has processes for.

    Sizes that nobody has changed since the checkpoint follow the launch; others are an order.
    """
    manifest = read_manifest(checkpoint)
    known = manifest["config"]
    old = known.get("dp_replicate_size", 1), known.get("dp_shard_size")
    if old != (config.dp_replicate_size, config.dp_shard_size):
        return config
    return refitted(config, manifest["num_processes"], num_processes)


def _by_memory(
    config: RunConfig, inputs: Inputs, device: torch.device, count: int
) -> tuple[ParallelPlan, str]:
    copies, shards = ParallelPlan(dp_replicate=count), ParallelPlan(dp_shard=count)
    if device.type == "cpu":
        return copies, f"parallel: {copies.name}; --dp-shard-size -1 would shard the model"
    memory = RunMemory.of(inputs.attention.applied(config), inputs, device)
    needed, has = replace(memory, plan=copies).peak(), device_memory(device)
    if needed is None:
        return copies, f"parallel: {copies.name}: the memory of a step cannot be estimated"
    size = f"a rank would need {format_bytes(needed)} of {format_bytes(has)}"
    if needed <= USABLE * has:
        return copies, f"parallel: {copies.name}: {size}"
    try:
        check_sharded(config, inputs.source, device)
        check_inputs(inputs)
    except ConfigError as error:
        return copies, f"parallel: {copies.name}: {size}, but {error.message}"
    sharded = replace(memory, plan=shards).peak()
    less = "" if sharded is None else f", and with a shard {format_bytes(sharded)}"
    return shards, f"parallel: {shards.name}: with a copy on each {size}{less}"
