"""The layout of a run: what its keys ask for, else what its memory asks for."""

from __future__ import annotations

from typing import Any

import torch
from accelerate.utils import broadcast_object_list

from liger_cli.common.numbers import format_bytes
from liger_cli.config import RunConfig
from liger_cli.errors import ConfigError
from liger_cli.training.inputs import Inputs
from liger_cli.training.memory.limits import RunMemory, device_memory
from liger_cli.training.model.adapters import is_quantised
from liger_cli.training.model.source import ModelSource
from liger_cli.training.optim.optimizers import EIGHT_BIT
from liger_cli.training.parallel.mesh import ParallelPlan, explicit_plan

__all__ = ["check_sharded", "choose_plan"]

# Of a device's memory what the estimate may fill: the rest is for NCCL, fragments and its error.
_USABLE = 0.9


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
    if plan is not None:
        return plan, f"parallel: {plan.name}, as the keys say" if count > 1 else None
    found = [_by_memory(config, inputs, accelerator.device, count)]
    # Devices may differ, and the main process's decides.
    broadcast_object_list(found)
    return found[0]


def _by_memory(
    config: RunConfig, inputs: Inputs, device: torch.device, count: int
) -> tuple[ParallelPlan, str]:
    copies, shards = ParallelPlan(dp_replicate=count), ParallelPlan(dp_shard=count)
    if device.type == "cpu":
        return copies, f"parallel: {copies.name}; --dp-shard-size -1 would shard the model"
    found = RunMemory.of(config, inputs, device).found
    if found is None:
        return copies, f"parallel: {copies.name}: the memory of a step cannot be estimated"
    # DDP copies gradients into buckets.
    needed, has = found.peak + found.gradients, device_memory(device)
    size = f"a rank would need {format_bytes(needed)} of {format_bytes(has)}"
    if needed <= _USABLE * has:
        return copies, f"parallel: {copies.name}: {size}"
    try:
        check_sharded(config, inputs.source, has_images=inputs.data.has_images)
    except ConfigError as error:
        return copies, f"parallel: {copies.name}: {size}, but {error.message}"
    return shards, f"parallel: {shards.name}: with a copy on each {size}"


def check_sharded(config: RunConfig, source: ModelSource, *, has_images: bool = False) -> None:
    """Refuse what a sharded run does not do.

    Args:
        has_images: Whether rows of the data have images.

    Raises:
        ConfigError: With the nearest that works.
    """
    without = "--dp-replicate-size with the number of ranks (DDP)"
    refused = {
        "fp16 scales the loss, and shards have no scaler that all ranks agree on": (
            config.fp16,
            "--bf16 needs none.",
        ),
        f"optim {config.optim} does not take shards of parameters": (
            config.optim in EIGHT_BIT,
            "--optim adamw_torch_fused: its moments are shared by the ranks.",
        ),
        "weights of 4 or 8 bits are not sharded yet": (
            is_quantised(config, source),
            f"--adapter lora without load_in_4bit, or {without}.",
        ),
        "ranks whose rows have no images would not take part in the vision model": (
            has_images,
            f"{without}.",
        ),
        "lora_target_parameters replaces parameters that are sharded": (
            config.lora_target_parameters is not None,
            f"--lora-target-modules, or {without}.",
        ),
        "auto_fit is for one process: the others would wait for the one that ran out": (
            config.auto_fit,
            "A smaller --per-device-train-batch-size.",
        ),
    }
    for reason, (applies, hint) in refused.items():
        if applies:
            raise ConfigError(f"a sharded run: {reason}", hint=hint)
