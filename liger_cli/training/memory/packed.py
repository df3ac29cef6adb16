"""Memory of what bitsandbytes holds in few bits, without bitsandbytes."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from liger_cli.training.memory.parts import table_of
from liger_kernels.transformers.wrappers import inner_model

__all__ = ["EIGHT_BIT", "PACKED_BYTES", "allocate_moments", "pack_layers", "packed_layers"]

EIGHT_BIT = "adamw_8bit"
# 4 bits, and for every 64 values a scale of 8 bits and a little.
PACKED_BYTES = 0.516
# An optimizer of 8 bits has a scale of 4 bytes for as many values, and fewer values as they are.
_BLOCK, _LEAST = 256, 4096


def packed_layers(model: Any) -> list[nn.Linear]:
    """Return the linear layers that are frozen, the head apart: those that load_in_4bit packs."""
    head = table_of(inner_model(model), "get_output_embeddings")
    return [
        module
        for module in model.modules()
        if isinstance(module, nn.Linear) and module is not head
        if not module.weight.requires_grad
    ]


def pack_layers(model: Any) -> None:
    """Give packed layers a weight of 4 bits, and a forward that unpacks it for each product."""
    for layer in packed_layers(model):
        weight = layer.weight
        num_bytes = round(weight.numel() * PACKED_BYTES)
        packed = torch.empty(num_bytes, dtype=torch.uint8)
        layer.weight = nn.Parameter(packed, requires_grad=False)
        forward = functools.partial(_product, layer, shape=weight.shape, dtype=weight.dtype)
        layer.forward = forward  # type: ignore[method-assign]


def _product(layer: nn.Linear, x: Tensor, *, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    y: Tensor = _PackedLinear.apply(x.to(dtype), layer.weight, shape)
    return y if layer.bias is None else y + layer.bias


class _PackedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, shape: torch.Size) -> Tensor:
        ctx.shape = shape
        return x @ x.new_empty(shape).t()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad @ grad.new_empty(ctx.shape), None, None


def allocate_moments(parameters: list[Tensor]) -> list[Tensor]:
    """Return tensors as large as the two moments of 8 bits of these parameters."""
    moments = []
    for x in parameters:
        size = x.numel()
        num_bytes = size + 4 * (size // _BLOCK) if size >= _LEAST else 4 * size
        moments += [torch.empty(num_bytes, dtype=torch.uint8) for _ in range(2)]
    return moments
