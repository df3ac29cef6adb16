"""Optimizer steps that wrote the weights of lazy heads, which versions of tensors do not all show.

torch's fused optimizers (transformers' Trainer takes one by default), bitsandbytes and others write
weights in kernels that autograd does not see, and FSDP2 gathers new tensors after a step. Logits
made after such a step would silently be those of the new weights. A hook of torch.optim, one for
the process from the first lazy forward on, counts the steps; it changes no tensor.
"""

from __future__ import annotations

import functools
import weakref
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

# How logits stay readable, for code whose reads cannot be moved.
SWITCH = (
    "call the model with skip_logits=False, or patch it with ops='auto,-flce,ce' (in Trainer's "
    "liger_kernel_config cross_entropy in place of fused_linear_cross_entropy), which keeps them"
)

# Of heads whose logits were deferred: how many optimizer steps wrote their weights since.
_counts: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()


def num_steps(head: nn.Module) -> int:
    """Return how many optimizer steps wrote a head's weights since this was first called."""
    if torch.compiler.is_compiling():
        return 0
    _register()
    return _counts.setdefault(head, 0)


@functools.cache
def _register() -> None:
    register_optimizer_step_post_hook(_count)


def _count(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if torch.compiler.is_compiling():
        return
    groups = optimizer.param_groups
    written = {id(p) for group in groups for p in group["params"] if p.grad is not None}
    for head in list(_counts):
        if any(id(p) in written for p in head.parameters()):
            _counts[head] += 1
