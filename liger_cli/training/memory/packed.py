"""Memory of what bitsandbytes holds in few bits, without bitsandbytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from liger_cli.config import RunConfig
from liger_cli.training.memory.parts import table_of
from liger_cli.training.model.classifiers import HEAD, is_classifier
from liger_kernels.ops.packed_weight import PackedFormat
from liger_kernels.transformers.wrappers import inner_model

__all__ = ["allocate_moments", "pack_layers", "packed_layers"]

# Bytes of a value in 4 bits: for every 64 values a scale of 32 bits, or, nested, of 8 bits and a
# little. In 8 bits the scales, one a row, are next to nothing.
_FOUR_BITS, _NESTED_FOUR_BITS, _EIGHT_BITS = 0.5625, 0.516, 1.0
# An optimizer of 8 bits has a scale of 4 bytes for as many values, and fewer values as they are.
_BLOCK, _LEAST = 256, 4096


def packed_layers(model: Any) -> list[nn.Linear]:
    """Return the linear layers that are frozen, heads apart: those that bitsandbytes packs."""
    inner = inner_model(model)
    head = table_of(inner, "get_output_embeddings")
    # Around it peft keeps the head as it was.
    heads = {head, *(getattr(inner, HEAD).modules() if is_classifier(model) else ())}
    return [
        module
        for module in model.modules()
        if isinstance(module, nn.Linear) and module not in heads
        if not module.weight.requires_grad
    ]


def pack_layers(model: Any, config: RunConfig) -> None:
    """Give layers the weight that the run holds in few bits, and the forward that unpacks it.

    Of 4 bits it is unpacked for each product; of 8 bits for that of backward, while forward
    multiplies integers.
    """
    if not (config.load_in_4bit or config.load_in_8bit):
        return
    value_bytes = _NESTED_FOUR_BITS if config.use_bnb_nested_quant else _FOUR_BITS
    value_bytes = _EIGHT_BITS if config.load_in_8bit else value_bytes
    for layer in packed_layers(model):
        weight = layer.weight
        layer.__class__ = _EightBitLayer if config.load_in_8bit else _Layer
        make_state = _Form if config.load_in_8bit else _FourBitForm
        packed = torch.empty(round(weight.numel() * value_bytes), dtype=torch.uint8)
        layer.weight = nn.Parameter(packed, requires_grad=False)
        packed_weight: Any = layer.weight
        packed_weight.quant_state = make_state(weight.shape, weight.dtype)
        layer.compute_dtype = weight.dtype  # type: ignore[assignment]


@dataclass(frozen=True)
class _Form:
    """The form of a weight before it was packed."""

    shape: torch.Size
    dtype: torch.dtype


class _FourBitForm(_Form, PackedFormat):
    """Of 4 bits, which patched LoRA layers unpack for each product."""

    def unpack(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        return weight.new_empty(self.shape, dtype=dtype)


class _Dequantised:
    """A layer that peft asks for its weight, as DoRA does for its norms: W_q says that it may."""

    W_q = None
    # None: that of the weight before it was packed.
    unpacked_dtype: torch.dtype | None = None

    def dequantize(self: Any) -> Tensor:
        state = self.weight.quant_state
        weight: Tensor = self.weight
        return weight.new_empty(state.shape, dtype=self.unpacked_dtype or state.dtype)


class _Layer(_Dequantised, nn.Linear):
    """A layer with a weight of 4 bits."""

    def forward(self, x: Tensor) -> Tensor:
        return _product(_PackedLinear, self, x)


class _EightBitLayer(_Dequantised, nn.Linear):
    """A layer with a weight of 8 bits."""

    # Its scales are of fp32.
    unpacked_dtype = torch.float32

    def forward(self, x: Tensor) -> Tensor:
        return _product(_Int8Linear, self, x)


def _product(product: type[torch.autograd.Function], layer: nn.Linear, x: Tensor) -> Tensor:
    weight: Any = layer.weight
    state = weight.quant_state
    y: Tensor = product.apply(x.to(state.dtype), weight, state.shape)
    return y if layer.bias is None else y + layer.bias


class _PackedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, shape: torch.Size) -> Tensor:
        ctx.shape = shape
        return x @ x.new_empty(shape).t()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad @ grad.new_empty(ctx.shape), None, None


class _Int8Linear(_PackedLinear):
    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, shape: torch.Size) -> Tensor:
        ctx.shape = shape
        quantised = x.to(torch.int8)
        sums = torch.empty((*x.shape[:-1], shape[0]), dtype=torch.int32)
        del quantised
        return sums.to(x.dtype)


def allocate_moments(parameters: list[Tensor]) -> list[Tensor]:
    """Return tensors as large as the two moments of 8 bits of these parameters."""
    moments = []
    for x in parameters:
        size = x.numel()
        num_bytes = size + 4 * (size // _BLOCK) if size >= _LEAST else 4 * size
        moments += [torch.empty(num_bytes, dtype=torch.uint8) for _ in range(2)]
    return moments
