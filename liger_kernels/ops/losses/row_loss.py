"""Losses and gradients of rows of logits: the launcher of row_loss_kernel.py."""

from __future__ import annotations

from typing import NamedTuple

import torch

from liger_kernels.ops.backend import runs_triton
from liger_kernels.ops.launcher import Launch, cache_by_shape, cdiv, lookup, next_power_of_2
from liger_kernels.ops.losses.options import LossOptions
from liger_kernels.ops.losses.row_loss_kernel import loss_rows_kernel
from liger_kernels.ops.losses.row_loss_torch import Coefs, RowCall, loss_rows_torch


class _Shape(NamedTuple):
    """How a program reads a row: the end stays in registers, the rest is read again, from L2."""

    # Elements of the end, and elements read at a time before it.
    keep: int
    block: int
    num_warps: int


# By vocabulary. H100, share of one read and one write at the rate of a copy, gradient in a
# separate buffer (docs/results/tune-losses-h100.jsonl):
#                            16384 x 32000   8192 x 128256   4096 x 262144
#   8192, 8192, 8 warps               0.98            0.73            0.69
#   32768, 16384, 16 warps            0.79            0.92            0.79
#   32768, 16384, 32 warps            0.78            0.95            0.79
# What wins on long rows has one program a multiprocessor: 132 rows wait in L2 for their second
# reading. Loads pipelined through shared memory reached 0.77 and 0.70 there.
_SHAPES = (
    (1024, _Shape(1024, 1024, 4)),
    (32768, _Shape(8192, 8192, 8)),
    (1 << 62, _Shape(32768, 16384, 32)),
)
# fp32 logits, the statistics and a cap spill the registers that 32 warps have; these shapes spill
# where every option is given at once.
_WIDE_SHAPES = (
    (1024, _Shape(1024, 1024, 4)),
    (32768, _Shape(8192, 8192, 8)),
    (1 << 62, _Shape(16384, 8192, 16)),
)
# A thread reads 16 bytes of bf16 at a time: a warp's width in elements.
_WARP_LANES = 256
# In the kernel's order.
OUTPUTS = ("loss", "nll", "entropy", "best", "peak", "log_total", "mean")


def _shape_of(vocab: int, is_wide: bool) -> _Shape:
    shape = lookup(_WIDE_SHAPES if is_wide else _SHAPES, vocab)
    width = next_power_of_2(vocab)
    return shape._replace(keep=min(shape.keep, width), block=min(shape.block, width))


def loss_rows(
    x: torch.Tensor,
    label: torch.Tensor,
    options: LossOptions,
    *,
    class_weight: torch.Tensor | None = None,
    coef: torch.Tensor | None = None,
    dx: torch.Tensor | None = None,
    overwrite: bool = False,
    **outputs: torch.Tensor,
) -> None:
    """Fill the outputs that are given, some of OUTPUTS, from logits x (M, V) and labels (M,).

    Rows of x and dx are packed, at any stride; label and coef (M,), the gradient that comes in for
    the loss, may have any stride, 0 too; class_weight (V,) is wide. With overwrite x is scratch
    memory and dx, if given, is x itself; else x is left as it is.
    """
    num_rows, vocab = x.shape
    if num_rows == 0:
        return
    if not runs_triton(x):
        call = RowCall(options, class_weight, overwrite)
        loss_rows_torch(call, x, label, None if coef is None else Coefs(coef), dx, outputs)
        return
    is_wide = (
        # Read once, and with whatever outputs in the same order: the values are the same bits.
        dx is None
        or x.element_size() > 2
        or options.softcap is not None
        or options.label_smoothing != 0.0
        or bool({"entropy", "best"} & outputs.keys())
    )
    launch = _launch_of(
        _shape_of(vocab, is_wide),
        num_rows,
        vocab,
        tuple(None if t is None else t.stride(0) for t in (x, dx, coef)),
        class_weight is not None,
        frozenset(outputs),
        options,
    )
    # The kernel reads these two at their first address and every one after it.
    label = label.contiguous()
    class_weight = None if class_weight is None else class_weight.contiguous()
    launch(x, label, class_weight, coef, dx, *map(outputs.get, OUTPUTS))


@cache_by_shape
def _launch_of(
    shape: _Shape,
    num_rows: int,
    vocab: int,
    strides: tuple[int | None, ...],
    has_class_weight: bool,
    outputs: frozenset[str],
    options: LossOptions,
) -> Launch:
    stride_x, stride_dx, stride_coef = strides
    return Launch(
        loss_rows_kernel,
        (num_rows,),
        stride_xm=stride_x,
        stride_dxm=stride_dx or 0,
        stride_coefm=stride_coef or 0,
        V=vocab,
        split=cdiv(max(vocab - shape.keep, 0), shape.block) * shape.block,
        HAS_CLASS_WEIGHT=has_class_weight,
        **options.kernel_arguments(),
        HAS_DX=stride_dx is not None,
        **{f"HAS_{name.upper()}": name in outputs for name in OUTPUTS},
        LANES=min(shape.block, shape.keep, _WARP_LANES * shape.num_warps),
        BLOCK_V=shape.block,
        KEEP_V=shape.keep,
        num_warps=shape.num_warps,
    )
