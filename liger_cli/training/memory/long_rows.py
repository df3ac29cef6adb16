"""tile_tokens and activation_offloading auto: on where a step does not fit into the device."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from accelerate.utils import broadcast_object_list

from liger_cli.common.environment import host_memory
from liger_cli.common.numbers import format_bytes
from liger_cli.config import RunConfig
from liger_cli.errors import OutOfMemory
from liger_cli.training.inputs import Inputs
from liger_cli.training.memory.choice import USABLE
from liger_cli.training.memory.limits import AUTO_TILE, RunMemory, device_memory
from liger_cli.training.parallel.mesh import ParallelPlan

__all__ = ["check_host", "everything_on", "settle_long_rows", "with_long_rows"]

_AUTO = "auto"
_OFF = {"activation_offloading": False, "tile_tokens": "none"}


def settle_long_rows(
    config: RunConfig, inputs: Inputs, accelerator: Any, plan: ParallelPlan
) -> tuple[RunConfig, str | None]:
    """Return the configuration of a run with both keys decided, and a line on them.

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
    is_open = config.gradient_checkpointing and any(getattr(config, key) == _AUTO for key in _OFF)
    offloads = config.activation_offloading is True
    if device.type == "cpu" or not (is_open or offloads):
        return config.model_copy(update=_closed(config)), None
    memory = replace(RunMemory.of(inputs.attention.applied(config), inputs, device), plan=plan)
    if offloads:
        check_host(memory)
    if not is_open:
        return config, None
    limit = int(USABLE * device_memory(device))
    found = [with_long_rows(memory, limit, host_memory())]
    # Devices may differ, and the main process's decides.
    broadcast_object_list(found)
    keys, line = found[0]
    return config.model_copy(update=dict(keys)), line


def with_long_rows(
    memory: RunMemory, num_bytes: int, host_bytes: int | None = None
) -> tuple[Mapping[str, Any], str | None]:
    """Return the values of both keys that a step needs to fit into so many bytes, and why.

    What costs least of what fits; where nothing does, what takes least.

    Args:
        memory: A step with gradient checkpointing, each of whose keys may be auto.
        num_bytes: Of the device.
        host_bytes: Of the host; None where it is unknown.
    """
    closed = _closed(memory.config)
    without = memory.trying(**closed).peak()
    if without is None or without <= num_bytes:
        why = None if without else "the memory of a step cannot be estimated: both are off"
        return closed, why and f"tile_tokens, activation_offloading: auto: {why}"
    peaks: list[tuple[int, dict[str, Any], RunMemory]] = []
    for keys in _choices(memory.config):
        tried = memory.trying(**{**closed, **keys})
        peak = tried.peak()
        if peak is None or (host_bytes is not None and _on_host(tried) > host_bytes):
            continue
        peaks.append((peak, keys, tried))
        if peak <= num_bytes:
            break
    fitting = [one for one in peaks if one[0] <= num_bytes]
    if not peaks:
        return closed, None
    peak, keys, tried = fitting[0] if fitting else min(peaks, key=lambda one: one[0])
    names = ", ".join(f"{key} {str(value).lower()}" for key, value in keys.items())
    host = f", {format_bytes(size)} on the host" if (size := _on_host(tried)) else ""
    line = f"{names}: auto: a step takes {format_bytes(peak)} of {format_bytes(num_bytes)}"
    return {**closed, **keys}, f"{line}{host}; {format_bytes(without)} without"


def everything_on(memory: RunMemory) -> RunMemory:
    """Return a step that has on whatever auto can turn on, which takes least."""
    choices = list(_choices(memory.config)) if memory.config.gradient_checkpointing else []
    for keys in reversed(choices):
        tried = memory.trying(**{**_closed(memory.config), **keys})
        # A model without a patched MLP has no tiles.
        if tried.found is not None:
            return tried
    return memory


def check_host(memory: RunMemory) -> None:
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


def _choices(config: RunConfig) -> Iterator[dict[str, Any]]:
    """Yield values of what is open, the cheapest in time first."""
    tiles = {"tile_tokens": str(AUTO_TILE)} if config.tile_tokens == _AUTO else {}
    offload = {"activation_offloading": True} if config.activation_offloading == _AUTO else {}
    if config.torch_compile is True:
        return
    for keys in (tiles, offload, {**tiles, **offload}):
        if keys:
            yield keys


def _on_host(memory: RunMemory) -> int:
    """Return the bytes that all ranks of this machine keep in its memory."""
    found = memory.found
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return 0 if found is None else ranks * sum(found.offloaded.values())


def _closed(config: RunConfig) -> dict[str, Any]:
    """Return the values of both keys, with what is auto off."""
    values = {key: getattr(config, key) for key in _OFF}
    return {key: _OFF[key] if value == _AUTO else value for key, value in values.items()}
