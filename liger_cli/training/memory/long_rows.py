"""activation_offloading auto: on where a step does not fit into the device without it."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

from accelerate.utils import broadcast_object_list

from liger_cli.common.environment import host_memory
from liger_cli.common.numbers import format_bytes
from liger_cli.config import RunConfig
from liger_cli.errors import OutOfMemory
from liger_cli.training.inputs import Inputs
from liger_cli.training.memory.choice import USABLE
from liger_cli.training.memory.limits import RunMemory, device_memory
from liger_cli.training.parallel.mesh import ParallelPlan

__all__ = ["settle_offloading"]


def settle_offloading(
    config: RunConfig, inputs: Inputs, accelerator: Any, plan: ParallelPlan
) -> tuple[RunConfig, str | None]:
    """Return the configuration of a run with activation_offloading decided, and a line on it.

    Every process calls it and gets the same.

    Args:
        config: The run.
        inputs: Its model and data.
        accelerator: Of the run.
        plan: How its processes share the model.

    Raises:
        OutOfMemory: The inputs of its layers are more than the host has.
    """
    device = accelerator.device
    can = config.gradient_checkpointing and config.torch_compile is not True
    if device.type == "cpu" or not can or config.activation_offloading is False:
        # Without checkpoints there is nothing to offload, and a CPU has one memory alone.
        is_on = config.activation_offloading is True
        return config.model_copy(update={"activation_offloading": is_on}), None
    memory = replace(RunMemory.of(inputs.attention.applied(config), inputs, device), plan=plan)
    if config.activation_offloading is True:
        _check_host(memory)
        return config, None
    found = [_decide(memory, device_memory(device))]
    # Devices may differ, and the main process's decides.
    broadcast_object_list(found)
    is_on, line = found[0]
    return config.model_copy(update={"activation_offloading": is_on}), line


def _decide(memory: RunMemory, num_bytes: int) -> tuple[bool, str | None]:
    """Return whether inputs of layers are offloaded on a device of so many bytes, and why."""
    without = memory.trying(activation_offloading=False).peak()
    if without is None:
        return False, "activation_offloading: auto: off: the memory of a step cannot be estimated"
    if without <= USABLE * num_bytes:
        return False, None
    offloaded = memory.trying(activation_offloading=True)
    needed, on_host = offloaded.peak() or without, _on_host(offloaded)
    size = f"{format_bytes(without)} of {format_bytes(num_bytes)} without it"
    if on_host > host_memory():
        has = format_bytes(host_memory())
        return False, f"activation_offloading: auto: off: {size}, but the host has only {has}"
    with_it = f"{format_bytes(needed)} with it and {format_bytes(on_host)} on the host"
    return True, f"activation_offloading: auto: on: a step takes {size}, {with_it}"


def _check_host(memory: RunMemory) -> None:
    """Refuse to offload more than the host has, where Linux would end the process without a word.

    Raises:
        OutOfMemory: It is more.
    """
    needed = _on_host(memory)
    if needed > host_memory():
        raise OutOfMemory(
            f"activation_offloading needs {format_bytes(needed)} of host memory for the inputs of "
            f"layers; this machine has {format_bytes(host_memory())}",
            hint="Shorter rows or smaller micro-batches need less.",
        )


def _on_host(memory: RunMemory) -> int:
    """Return the bytes that all ranks of this machine keep in its memory."""
    found = memory.found
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return 0 if found is None else ranks * sum(found.offloaded.values())

