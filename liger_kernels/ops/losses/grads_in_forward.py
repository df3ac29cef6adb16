"""Gradients that a loss computes in forward: their scale there, and in backward."""

import torch

from liger_kernels.ops.backend import runs_triton, tl, triton
from liger_kernels.ops.launcher import Launch, cache_by_shape, cdiv, num_sms

# Elements a program takes at a time.
_BLOCK = 4096


@triton.jit
def _scale_kernel(
    x_ptr,  # (N,)
    out_ptr,  # (N,), may be x_ptr
    factor_ptr,  # () fp32
    N,
    IN_PLACE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    factor = tl.load(factor_ptr)
    stop = tl.cast(N, tl.int64)
    if IN_PLACE:
        # The usual gradient of a loss is 1: nothing to read or write.
        stop = tl.where(factor == 1.0, 0, stop)
    first = tl.program_id(0).to(tl.int64) * BLOCK_N
    for start in tl.range(first, stop, tl.num_programs(0) * BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        mask = cols < N
        x = tl.load(x_ptr + cols, mask=mask, other=0.0).to(tl.float32)
        tl.store(out_ptr + cols, (x * factor).to(out_ptr.dtype.element_ty), mask=mask)


def scaled(x: torch.Tensor, factor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Scale contiguous x in-place where its dtype is dtype; a factor of 1 reads and writes nothing.

    factor is a 0-dim tensor on x's device, which the host reads on a CPU only.
    """
    if not runs_triton(x) or x.numel() == 0:
        if x.device.type == "cpu" and factor.item() == 1.0:
            return x.to(dtype)
        return x.to(torch.promote_types(x.dtype, dtype)).mul_(factor).to(dtype)
    out = x if x.dtype == dtype else torch.empty_like(x, dtype=dtype)
    _scale_launch(x.numel(), out is x, x.device)(x, out, factor)
    return out


@cache_by_shape
def _scale_launch(size: int, in_place: bool, device: torch.device) -> Launch:
    return Launch(
        _scale_kernel,
        (min(cdiv(size, _BLOCK), 8 * num_sms(device)),),
        N=size,
        IN_PLACE=in_place,
        BLOCK_N=_BLOCK,
        num_warps=8,
    )


def forward_grad_scale(inverse: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the scale of gradients computed in forward, of a sum of losses times inverse.

    fp16 would lose a gradient divided by many labels; it is divided in backward, where the loss
    scale of mixed precision multiplies it again.
    """
    return torch.ones_like(inverse) if dtype == torch.float16 else inverse


def backward_grad_scale(
    dy: torch.Tensor, inverse: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Return the scale that backward applies to gradients computed in forward."""
    return dy * inverse if dtype == torch.float16 else dy


def second_backward_error(name: str) -> RuntimeError:
    """Return the error of a second backward: the first one used up the gradients."""
    return RuntimeError(
        f"{name} makes its gradients in forward and gave them away in the first backward; a second "
        "backward over the retained graph needs another forward, reduction='none', or in a "
        "patched model skip_logits=False"
    )
