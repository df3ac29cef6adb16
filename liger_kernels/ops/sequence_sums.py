"""Sums of values per token over the answers that the tokens belong to, in fp64.

A log-ratio is a small difference of two sums of thousands of nats, whose last digits fp32 does not
have. Each answer is summed in a fixed order, so that the result is the same in every run.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from liger_kernels.ops.arguments import LABELS, Integer, TensorArgument, check_tensors

__all__ = ["sequence_sums"]

_TENSORS = (
    TensorArgument("values", "(...)"),
    TensorArgument("answer_ids", "(...)", "hold int32 or int64 numbers", LABELS),
)
_NUM = Integer("num", "an int of at least 0")
# Values are summed for as many answers at a time as this many numbers of fp64 allow.
_MAX_ELEMENTS = 1 << 22


def sequence_sums(values: Tensor, answer_ids: Tensor, num: int) -> Tensor:
    """Add the values of each answer in fp64.

    Args:
        values: (...) fp32, bf16, fp16 or fp64, such as the log-probabilities of token_logprobs.
        answer_ids: (...) int32 or int64, of values' shape: the answer of each value, 0 to num - 1,
            or -1 for a value that is left out. One row may hold several answers, one after the
            other or mixed. With token_logprobs these are the collated answer_ids[:, 1:].
        num: How many answers there are.

    Returns:
        (num,) fp64; 0 for an answer without values. Differentiable, with values' dtype for the
        gradient. On a GPU a number out of range makes all sums NaN.

    Raises:
        ValueError: A type, shape or dtype is off, or, on a CPU, a number is out of range.
    """
    check_tensors(_TENSORS, values, answer_ids)
    num = _NUM.of(num)
    if num < 0:
        raise ValueError(f"num must be an int of at least 0, got {num}")
    if values.shape != answer_ids.shape:
        raise ValueError(
            f"answer_ids must have values' shape {tuple(values.shape)}, got "
            f"{tuple(answer_ids.shape)}"
        )
    is_wrong = ((answer_ids < -1) | (answer_ids >= num)).any()
    if answer_ids.device.type == "cpu" and not torch.compiler.is_compiling() and is_wrong:
        first = answer_ids[(answer_ids < -1) | (answer_ids >= num)][0].item()
        raise ValueError(f"answer_ids holds {first}; answers go from 0 to {num - 1}, -1 for none")
    sums: Tensor = _Sums.apply(values.reshape(-1), answer_ids.reshape(-1), num)
    return sums.masked_fill(is_wrong, float("nan"))


class _Sums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, answer_ids: Tensor, num: int) -> Tensor:
        ctx.save_for_backward(answer_ids)
        ctx.dtype = values.dtype
        wide = values.double()
        size = max(1, _MAX_ELEMENTS // max(1, values.numel()))
        numbers = torch.arange(num, device=values.device).split(size)
        # Not index_add, which a GPU adds in any order.
        parts = [torch.where(answer_ids == some[:, None], wide, 0.0).sum(1) for some in numbers]
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (answer_ids,) = ctx.saved_tensors
        # One more, of values that are left out: -1.
        grad = torch.cat([grads[0], grads[0].new_zeros(1)])
        return grad[answer_ids.long()].to(ctx.dtype), None, None
