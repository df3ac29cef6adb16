"""Sums over processes and the norm of gradients of which each process has a shard."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from liger_cli.training.parallel.mesh import SHARD

__all__ = ["clip_grad_norm", "local_part"]


def local_part(x: Tensor) -> Tensor:
    """Return this process's shard of a tensor; the tensor itself where it is whole."""
    return x.to_local() if isinstance(x, DTensor) else x


@torch.no_grad()
def clip_grad_norm(parameters: Iterable[Tensor], max_norm: float, device: torch.device) -> Tensor:
    """Scale the gradients of sharded parameters to a norm of at most max_norm.

    One collective for all parameters, of a float32 on the device of the run: it works where the
    shards are on the host, too.

    Args:
        parameters: DTensors of one mesh.
        max_norm: math.inf only measures.
        device: Where collectives run.

    Returns:
        The norm before, a float32 scalar on the device, the same on all processes.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    parts = [part for g in gradients if (part := local_part(g)).numel() > 0]
    norms = [n.float() for n in torch._foreach_norm(parts, 2.0, dtype=torch.float32)]
    squares = torch.stack(norms).square().sum() if norms else torch.zeros(())
    total = squares.to(device)
    meshes = {g.device_mesh for g in gradients if isinstance(g, DTensor)}
    for mesh in meshes:
        dist.all_reduce(total, group=mesh.get_group(SHARD))
    norm = total.sqrt()
    if math.isfinite(max_norm) and parts:
        scale = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
        torch._foreach_mul_(parts, scale.to(parts[0].device))
    return norm
