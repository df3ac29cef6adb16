"""Losses and gradients of rows of logits: the launcher of row_loss_kernel.py, and its torch code.

The torch code serves devices without Triton, and fp64.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from liger_kernels.ops.backend import runs_triton
from liger_kernels.ops.launcher import Launch, cache_by_shape, cdiv, lookup, next_power_of_2
from liger_kernels.ops.losses.options import LossOptions, wide_dtype, without_autocast
from liger_kernels.ops.losses.row_loss_kernel import loss_rows_kernel


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
# It widens at most this many logits at a time where it needs a copy.
_COPY_BYTES = 32 << 20
# A logarithm whose exponential is 0 in fp64 too.
_NO_EXP = -1e3


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
    entropy_coef: torch.Tensor | None = None,
    dx: torch.Tensor | None = None,
    loss: torch.Tensor | None = None,
    nll: torch.Tensor | None = None,
    entropy: torch.Tensor | None = None,
    best: torch.Tensor | None = None,
    overwrite: bool = False,
) -> None:
    """Fill the outputs that are given from logits x (M, V) and labels (M,).

    Rows of x and dx are packed, at any stride; label, coef and entropy_coef (M,) may have any
    stride, 0 too; class_weight (V,) is wide. With overwrite x is scratch memory and dx, if given,
    is x itself; else x is left as it is.
    """
    num_rows, vocab = x.shape
    if num_rows == 0:
        return
    if not runs_triton(x):
        tensors = (x, label, coef, entropy_coef, dx, loss, nll, entropy, best)
        _loss_rows_torch(options, class_weight, overwrite, *tensors)
        return
    is_wide = (
        x.element_size() > 2
        or options.softcap is not None
        or options.label_smoothing != 0.0
        or not (entropy is entropy_coef is best is None)
    )
    launch = _launch_of(
        _shape_of(vocab, is_wide),
        num_rows,
        vocab,
        tuple(None if t is None else t.stride(0) for t in (x, dx, coef, entropy_coef)),
        tuple(t is not None for t in (class_weight, loss, nll, entropy, best)),
        options,
    )
    # The kernel reads these two at their first address and every one after it.
    label = label.contiguous()
    class_weight = None if class_weight is None else class_weight.contiguous()
    launch(x, label, class_weight, coef, entropy_coef, dx, loss, nll, entropy, best)


@cache_by_shape
def _launch_of(
    shape: _Shape,
    num_rows: int,
    vocab: int,
    strides: tuple[int | None, ...],
    are_there: tuple[bool, ...],
    options: LossOptions,
) -> Launch:
    stride_x, stride_dx, stride_coef, stride_entropy_coef = strides
    has_class_weight, has_loss, has_nll, has_entropy, has_best = are_there
    return Launch(
        loss_rows_kernel,
        (num_rows,),
        stride_xm=stride_x,
        stride_dxm=stride_dx or 0,
        stride_coefm=stride_coef or 0,
        stride_entropy_coefm=stride_entropy_coef or 0,
        V=vocab,
        split=cdiv(max(vocab - shape.keep, 0), shape.block) * shape.block,
        label_smoothing=options.label_smoothing,
        z_loss=options.z_loss,
        softcap=options.softcap or 1.0,
        scale=options.scale,
        IGNORE_INDEX=options.ignore_index,
        HAS_CLASS_WEIGHT=has_class_weight,
        HAS_SMOOTHING=options.label_smoothing != 0.0,
        HAS_Z_LOSS=options.z_loss != 0.0,
        HAS_SOFTCAP=options.softcap is not None,
        HAS_SCALE=options.scale != 1.0,
        HAS_DX=stride_dx is not None,
        HAS_ENTROPY_COEF=stride_entropy_coef is not None,
        HAS_LOSS=has_loss,
        HAS_NLL=has_nll,
        HAS_ENTROPY=has_entropy,
        HAS_BEST=has_best,
        LANES=min(shape.block, shape.keep, _WARP_LANES * shape.num_warps),
        BLOCK_V=shape.block,
        KEEP_V=shape.keep,
        num_warps=shape.num_warps,
    )


def _loss_rows_torch(options, class_weight, overwrite, x, *tensors) -> None:
    """Fill what loss_rows fills: label, coef, entropy_coef, dx, loss, nll, entropy and best."""
    num_rows, vocab = x.shape
    in_place = overwrite and x.dtype == wide_dtype(x.dtype)
    step = num_rows if in_place else max(1, _COPY_BYTES // (4 * vocab))
    for start in range(0, num_rows, step):
        part = [None if t is None else t[start : start + step] for t in (x, *tensors)]
        with without_autocast(x.device):
            _some_rows(options, class_weight, in_place, *part)


def _some_rows(
    options, class_weight, in_place, x, label, coef, entropy_coef, dx, loss, nll, entropy, best
):
    vocab = x.shape[1]
    # The names follow the values: one buffer is logits, shifted logits, exponentials, gradient.
    z = x if in_place else x.to(wide_dtype(x.dtype), copy=True)
    if options.scale != 1.0:
        z.mul_(options.scale)
    slope = None
    if options.softcap is not None:
        slope = z.div_(options.softcap).tanh_()
        z = slope * options.softcap
    is_ignored = label == (vocab if options.ignore_index is None else options.ignore_index)
    is_wrong = ((label < 0) | (label >= vocab)) & ~is_ignored
    column = label.masked_fill(is_ignored | is_wrong, 0).long()[:, None]
    z_label = z.gather(1, column)[:, 0].masked_fill(is_wrong, float("nan"))
    if best is not None:
        best.copy_(z.argmax(1).masked_fill(is_ignored, -1))
    w_label, weight_sum = 1.0, float(vocab)
    if class_weight is not None:
        class_weight = class_weight.to(z.dtype)
        w_label, weight_sum = class_weight[column[:, 0]], class_weight.sum()

    peak = z.amax(1)
    z.sub_(peak[:, None])
    if options.label_smoothing:
        # Of distances from the peak: of large logits the sum would overflow, or lose its digits.
        weighted = z.sum(1) if class_weight is None else z @ class_weight
    if entropy is not None or entropy_coef is not None:
        # Below it, exp is 0 and the logit adds nothing; 0 * -inf would be NaN.
        shifted = z.clamp_min(_NO_EXP)
    e = z.exp_()
    total = e.sum(1)
    log_total = total.log()
    lse = peak + log_total
    row_nll = log_total + (peak - z_label)
    if nll is not None:
        nll.copy_(row_nll.masked_fill(is_ignored, 0.0))
    if entropy is not None or entropy_coef is not None:
        row_entropy = log_total - (e * shifted).sum(1) / total
    if entropy is not None:
        entropy.copy_(row_entropy.masked_fill(is_ignored, 0.0))
    if loss is not None:
        row_loss = w_label * row_nll
        if options.label_smoothing:
            smooth = (weight_sum * log_total - weighted) / vocab
            # Not lerp, which takes the difference of two infinite losses.
            row_loss = (1.0 - options.label_smoothing) * row_loss + options.label_smoothing * smooth
        if options.z_loss:
            # From the left: lse^2 may overflow where its product with z_loss does not.
            row_loss = row_loss + options.z_loss * lse * lse
        loss.copy_(row_loss.masked_fill(is_ignored, 0.0))
    if dx is None:
        return

    coef = coef.to(z.dtype).masked_fill(is_wrong, float("nan")).masked_fill(is_ignored, 0.0)
    at_all = at_label = coef * w_label
    if options.label_smoothing:
        spread = coef * (options.label_smoothing / vocab)
        at_label = at_label * (1.0 - options.label_smoothing)
        at_all = at_label + spread * weight_sum
    if options.z_loss:
        at_all = at_all + 2.0 * options.z_loss * coef * lse
    at_all = at_all.masked_fill(is_ignored, 0.0)[:, None]
    if entropy_coef is not None:
        entropy_coef = entropy_coef.to(z.dtype).masked_fill(is_ignored, 0.0)[:, None]
        log_p = shifted.sub_(log_total[:, None])
        at_all = at_all - log_p.add_(row_entropy[:, None]).mul_(entropy_coef)
    dz = e.mul_(at_all.div_(total[:, None]))
    if options.label_smoothing:
        dz.sub_(spread[:, None] if class_weight is None else spread[:, None] * class_weight)
    dz.scatter_add_(1, column, -at_label[:, None])
    if slope is not None:
        dz.mul_(slope.square_().neg_().add_(1.0))
    if options.scale != 1.0:
        dz.mul_(options.scale)
    if dz is not dx:
        dx.copy_(dz)
