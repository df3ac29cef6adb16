"""Heads whose weights FSDP2 shards: whether they are sharded now, and how they are gathered.

FSDP2 gathers a group of modules before their forward, may reshard it after, and gathers it again in
backward by a hook on the group's output. The loss of deferred logits reads the head's weights after
the head's forward, and its backward brings the logits no gradient. So the
loss gathers the group itself, once, leaves it gathered for backward, and takes over the hook
(DeferredLogits.backward_hooks).
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn


def is_part(x: Tensor) -> bool:
    """Return whether this process has only a shard of a parameter."""
    return type(x).__name__ == "DTensor"


def is_sharded(head: nn.Module) -> bool:
    """Return whether this process has only a shard of the head's weights."""
    return any(map(is_part, head.parameters()))


def can_gather(head: nn.Module) -> bool:
    """Return whether fully_shard was applied to the head, alone or in a list of modules."""
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(head, fsdp.FSDPModule)


def gather(head: Any) -> bool:
    """Gather the weights of a head that can_gather() is true of, where they are sharded now.

    They stay gathered until backward reshards them, or reshard_if_left().

    Returns:
        Whether they were gathered here.
    """
    if torch.compiler.is_compiling() or not is_sharded(head) or not can_gather(head):
        return False
    head.unshard()
    head._is_left_gathered = True
    return True


def reshard_if_left(head: Any) -> None:
    """Reshard a head that gather() gathered and no backward has resharded since.

    The next forward would read the gathered weights, which the optimizer's step does not change.
    """
    if not head._is_left_gathered:
        return
    head._is_left_gathered = False
    if not is_sharded(head):
        head.reshard()
