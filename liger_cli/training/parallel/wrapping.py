"""Shard a model in place by torch's fully_shard, in the dtypes that a run's keys mean."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)

from liger_cli.config import RunConfig
from liger_cli.training.model.adapters import is_adapted
from liger_cli.training.model.dtypes import compute_dtype
from liger_cli.training.parallel.groups import groups_of
from liger_cli.training.parallel.mesh import Layout

__all__ = ["mixed_precision", "reshard", "shard_model", "sharded_parts"]


def shard_model(model: Any, layout: Layout) -> None:
    """Replace the parameters of a model by shards of them; every process calls it.

    Args:
        model: Patched, compiled if it is to be, whole on a device or on the meta device.
        layout: A sharded one.
    """
    config, device = layout.config, layout.device
    options: dict[str, Any] = {
        "mesh": layout.plan.mesh(device),
        "mp_policy": mixed_precision(config, device, adapts=is_adapted(model)),
        "offload_policy": _offloading(layout),
    }
    for group in groups_of(model):
        fully_shard(group, reshard_after_forward=config.reshard_after_forward, **options)
    # Backward begins with the head: to reshard it would gather it twice.
    fully_shard(model, reshard_after_forward=False, **options)
    for part in sharded_parts(model):
        _keep_quant_states(part)


def _keep_quant_states(part: Any) -> None:
    """Let the gathered weights of 4 bits in a group have the state that unpacks them.

    bitsandbytes has it on the parameter, whose place the gathered one takes, and on the layer.
    """
    layers = [layer for layer in part.modules() if getattr(layer, "quant_state", None) is not None]

    def set_states(*_: Any) -> None:
        for layer in layers:
            layer.weight.quant_state = layer.quant_state

    if layers:
        part.register_forward_pre_hook(set_states)


def _offloading(layout: Layout) -> OffloadPolicy:
    if not layout.config.cpu_offload:
        return OffloadPolicy()
    return CPUOffloadPolicy(pin_memory=layout.device.type != "cpu")


def mixed_precision(
    config: RunConfig, device: torch.device, *, adapts: bool
) -> MixedPrecisionPolicy:
    """Return the dtypes that groups are gathered and their gradients are reduced in.

    bf16 gathers float32 parameters as bfloat16, as autocast computes with them; beside a frozen
    model in half precision so are the float32 matrices of an adapter.
    """
    wanted = config.reduce_dtype
    reduce = None if wanted == "auto" else getattr(torch, wanted)
    if config.bf16 or adapts:
        # The parameters that are trained, and so their gradients, are float32.
        param = compute_dtype(config, device, adapts=adapts)
        return MixedPrecisionPolicy(param_dtype=param, reduce_dtype=reduce or torch.float32)
    return MixedPrecisionPolicy(reduce_dtype=reduce)


def sharded_parts(model: Any) -> list[FSDPModule]:
    """Return the modules of a model that are groups, the model itself included."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def reshard(model: Any) -> None:
    """Free all gathered parameters, which a forward without a backward leaves."""
    for part in sharded_parts(model):
        part.reshard()
