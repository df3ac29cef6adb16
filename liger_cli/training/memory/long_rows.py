"""tile_tokens and activation_offloading auto: on where a step does not fit into the device.

Offloading takes of the host what is free, and no more: Linux would end the process without a word.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from accelerate.utils import broadcast_object_list

from liger_cli.common.environment import free_host_memory
from liger_cli.common.numbers import format_bytes
from liger_cli.config import RunConfig
from liger_cli.errors import OutOfMemory
from liger_cli.training.inputs import Inputs
from liger_cli.training.memory.choice import USABLE
from liger_cli.training.memory.limits import AUTO_TILE, RunMemory, device_memory
from liger_cli.training.parallel.mesh import ParallelPlan

__all__ = ["LongRows", "everything_on", "host_line", "settle_long_rows", "with_long_rows"]

_AUTO = "auto"
_OFF = {"activation_offloading": False, "tile_tokens": "none"}
# Of the free memory of the host: batches are made there too.
_USABLE_HOST = 0.9


class LongRows(NamedTuple):
    """A decision about long rows.

    Attributes:
        config: The run, with no key auto.
        host_bytes: What this process may take of the host for inputs of layers.
        line: Why; None where nothing was decided.
    """

    config: RunConfig
    host_bytes: int | None
    line: str | None


def settle_long_rows(
    config: RunConfig, inputs: Inputs, accelerator: Any, plan: ParallelPlan
) -> LongRows:
    """Decide both keys of a run, and how much of the host it takes.

    Every process calls it and gets the same configuration.

    Args:
        config: The run.
        inputs: Its model and data.
        accelerator: Of the run.
        plan: How its processes share the model.

    Raises:
        OutOfMemory: activation_offloading is true, and the host has no room for one input.
    """
    device = accelerator.device
    is_open = config.gradient_checkpointing and any(getattr(config, key) == _AUTO for key in _OFF)
    host_bytes = int(_USABLE_HOST * free_host_memory()) // _local_ranks()
    if device.type == "cpu" or not (is_open or config.activation_offloading is True):
        return LongRows(config.model_copy(update=_closed(config)), host_bytes, None)
    memory = replace(
        RunMemory.of(inputs.attention.applied(config), inputs, device),
        plan=plan,
        host_bytes=host_bytes,
    )
    memory = _beside_shards(memory)
    limit = int(USABLE * device_memory(device))
    found: list[Any] = [with_long_rows(memory, limit) if is_open else (_closed(config), None)]
    # Devices may differ, and the main process's decides.
    broadcast_object_list(found)
    keys, line = found[0]
    if config.activation_offloading is True:
        of_host = host_line(memory.trying(**keys), device_memory(device))
        line = line or of_host
    return LongRows(config.model_copy(update=dict(keys)), memory.host_bytes, line)


def _beside_shards(memory: RunMemory) -> RunMemory:
    """Return a step that leaves room on the host for what cpu_offload keeps there."""
    if not (memory.config.cpu_offload and memory.plan.is_sharded):
        return memory
    found = memory.trying(**{**_closed(memory.config), "activation_offloading": False}).found
    kept = 0 if found is None else sum(found.offloaded.values())
    return replace(memory, host_bytes=max(0, (memory.host_bytes or 0) - kept))


def with_long_rows(memory: RunMemory, num_bytes: int) -> tuple[Mapping[str, Any], str | None]:
    """Return the values of both keys that a step needs to fit into so many bytes, and why.

    What costs least of what fits; where nothing does, what takes least.

    Args:
        memory: A step with gradient checkpointing, each of whose keys may be auto.
        num_bytes: Of the device.
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
        if peak is None or (keys.get("activation_offloading") and not _offloads(tried)):
            continue
        peaks.append((peak, keys, tried))
        if peak <= num_bytes:
            break
    fitting = [one for one in peaks if one[0] <= num_bytes]
    if not peaks:
        return closed, None
    peak, keys, tried = fitting[0] if fitting else min(peaks, key=lambda one: one[0])
    names = ", ".join(f"{key} {str(value).lower()}" for key, value in keys.items())
    host = f", {part}" if (part := _on_host(tried)) else ""
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


def host_line(memory: RunMemory, num_bytes: int) -> str | None:
    """Return a line on inputs of layers that the host has no room for; None where it has for all.

    Args:
        memory: A step with activation_offloading.
        num_bytes: Of the device, where the others stay.

    Raises:
        OutOfMemory: It has room for none.
    """
    name, found = "activation_offloading", memory.found
    if found is None:
        limit = format_bytes(memory.host_bytes or 0)
        return f"{name}: at most {limit} of the host: inputs of further layers stay on the device"
    taken, left = found.inputs_on_host
    if taken:
        size = f"a step takes {format_bytes(found.peak)} of {format_bytes(num_bytes)}"
        return f"{name}: {size}, {_on_host(memory)}" if left else None
    needed = _bytes_on_host(replace(memory, host_bytes=None))
    raise OutOfMemory(
        f"{name} needs {format_bytes(needed)} of host memory for the inputs of layers, of which "
        f"one at least must fit; {format_bytes(free_host_memory())} are free on this machine",
        hint="Shorter rows or smaller micro-batches need less; or set activation_offloading to "
        "false.",
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


def _offloads(memory: RunMemory) -> bool:
    return memory.found is not None and memory.found.inputs_on_host[0] > 0


def _on_host(memory: RunMemory) -> str:
    """Return words for what all ranks of this machine keep in its memory."""
    found, size = memory.found, _bytes_on_host(memory)
    if found is None or not size:
        return ""
    taken, left = found.inputs_on_host
    words = f"{format_bytes(size)} on the host"
    if left:
        words += f", which has room for {taken} of the {taken + left} inputs of layers"
    return words


def _bytes_on_host(memory: RunMemory) -> int:
    found = memory.found
    return 0 if found is None else _local_ranks() * sum(found.offloaded.values())


def _local_ranks() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _closed(config: RunConfig) -> dict[str, Any]:
    """Return the values of both keys, with what is auto off."""
    values = {key: getattr(config, key) for key in _OFF}
    return {key: _OFF[key] if value == _AUTO else value for key, value in values.items()}
