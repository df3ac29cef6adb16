"""The gradient of rows of logits from what forward kept of them: one pass, over the logits.

    dx_j = coef * dloss/dx_j + entropy_coef * dentropy/dx_j + lse_coef * dlse/dx_j

with p_j = exp(z_j - peak) / exp(log_total), else as in row_loss_kernel.py.
"""

from __future__ import annotations

import torch

from liger_kernels.ops.backend import fp32, runs_triton, tl, triton
from liger_kernels.ops.launcher import Launch, cache_by_shape, cdiv, next_power_of_2
from liger_kernels.ops.losses.options import LossOptions
from liger_kernels.ops.losses.row_loss_kernel import _dlogits, _exp, _logits
from liger_kernels.ops.losses.row_loss_torch import Coefs, KeptRows, RowCall, loss_rows_torch

# Elements of a row a program takes: 32 a thread, four loads of 16 bytes of bf16 at a time.
_BLOCK, _NUM_WARPS = 8192, 8


@triton.jit
def _gradient_kernel(
    x_ptr,  # (M, V) logits, and their gradient
    label_ptr,  # (M,) int32 or int64
    class_weight_ptr,  # (V,) fp32 or None
    weight_sum_ptr,  # () fp32 or None: V
    coef_ptr,  # (M,) fp32
    entropy_coef_ptr,  # (M,) fp32 or None
    lse_coef_ptr,  # (M,) fp32 or None
    peak_ptr,  # (M,) fp32
    log_total_ptr,  # (M,) fp32
    entropy_ptr,  # (M,) fp32 or None
    stride_xm,
    stride_coefm,
    stride_entropy_coefm,
    stride_lse_coefm,
    V,
    stop,  # columns that are read and written, V or a few more
    num_blocks,
    label_smoothing,
    z_loss,
    softcap,
    scale,
    IGNORE_INDEX: tl.constexpr,  # None: every label counts
    HAS_CLASS_WEIGHT: tl.constexpr,
    HAS_SMOOTHING: tl.constexpr,
    HAS_Z_LOSS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_ENTROPY_COEF: tl.constexpr,
    HAS_LSE_COEF: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    row = program // num_blocks
    cols = (program % num_blocks).to(tl.int32) * BLOCK_V + tl.arange(0, BLOCK_V)
    scale = fp32(scale)
    softcap = fp32(softcap)
    label_smoothing = fp32(label_smoothing)
    label = tl.load(label_ptr + row).to(tl.int64)
    in_range = (label >= 0) & (label < V)
    if IGNORE_INDEX is None:
        is_ignored = label != label
    else:
        is_ignored = label == IGNORE_INDEX
    column = tl.where(in_range & (is_ignored == 0), label, -1).to(tl.int32)
    # An ignored row is not read: its kept numbers are 0, which large logits would overflow with.
    x = tl.load(
        x_ptr + row * stride_xm + cols,
        mask=cols < tl.where(is_ignored, 0, stop),
        other=0.0,
        eviction_policy="evict_first",
    )
    peak = tl.load(peak_ptr + row)
    log_total = tl.load(log_total_ptr + row)
    total = _exp(log_total)
    # Every factor carries the slope of z, so that no element needs it. NaN, as a kernel cannot
    # raise for a label that is neither ignored nor in range.
    coef = tl.load(coef_ptr + row * stride_coefm)
    coef = tl.where(is_ignored, 0.0, tl.where(in_range, coef, float("nan")) * scale)
    w = fp32(1.0)
    w_label = fp32(1.0)
    weight_sum = V * fp32(1.0)
    if HAS_CLASS_WEIGHT:
        w_label = tl.load(class_weight_ptr + column, mask=column >= 0, other=0.0)
        if HAS_SMOOTHING:
            w = tl.load(class_weight_ptr + cols, mask=cols < V, other=0.0)
            weight_sum = tl.load(weight_sum_ptr)
    at_label = coef * w_label
    spread = coef * label_smoothing / V
    if HAS_SMOOTHING:
        at_label *= 1.0 - label_smoothing
        at_all = at_label + spread * weight_sum
    else:
        at_all = at_label
    if HAS_Z_LOSS:
        at_all += 2.0 * coef * fp32(z_loss) * (peak + log_total)
    if HAS_LSE_COEF:
        lse_coef = tl.load(lse_coef_ptr + row * stride_lse_coefm)
        at_all += tl.where(is_ignored, 0.0, lse_coef * scale)
    at_all /= total
    entropy_coef = fp32(0.0)
    entropy = fp32(0.0)
    if HAS_ENTROPY_COEF:
        entropy = tl.load(entropy_ptr + row)
        entropy_coef = tl.load(entropy_coef_ptr + row * stride_entropy_coefm)
        entropy_coef = tl.where(is_ignored, 0.0, entropy_coef * scale) / total
    z = _logits(x, scale, softcap, HAS_SCALE, HAS_SOFTCAP)
    at_label = tl.where(cols == column, at_label, 0.0)
    dz = _dlogits(
        z, w, peak, log_total, entropy, at_all, at_label, spread, entropy_coef, softcap,
        HAS_SMOOTHING, HAS_SOFTCAP, HAS_ENTROPY_COEF,
    )  # fmt: skip
    tl.store(
        x_ptr + row * stride_xm + cols,
        dz.to(x_ptr.dtype.element_ty),
        mask=cols < stop,
        eviction_policy="evict_first",
    )


def gradient_rows(
    x: torch.Tensor,
    label: torch.Tensor,
    options: LossOptions,
    kept: KeptRows,
    *,
    coefs: Coefs,
    class_weight: torch.Tensor | None = None,
) -> None:
    """Overwrite logits x (M, V) with their gradient.

    Rows of x are packed, at any stride; what lies between V and the next multiple of 16 columns is
    overwritten where rows are that far apart. label and coefs (M,) may have any stride, 0 too;
    class_weight (V,) is wide; kept is of the same logits.
    """
    num_rows, vocab = x.shape
    if num_rows == 0:
        return
    if not runs_triton(x):
        call = RowCall(options, class_weight, overwrite=True)
        loss_rows_torch(call, x, label, coefs, x, {}, kept)
        return
    strides = tuple(None if t is None else t.stride(0) for t in (x, *coefs))
    launch = _launch_of(num_rows, vocab, strides, class_weight is not None, options)
    weight_sum = None
    if class_weight is not None and options.label_smoothing:
        weight_sum = class_weight.sum()
    peak, log_total, entropy = kept.map(torch.Tensor.contiguous)
    launch(
        x, label.contiguous(), class_weight, weight_sum, *coefs, peak, log_total,
        None if coefs.entropy is None else entropy,
    )  # fmt: skip


@cache_by_shape
def _launch_of(
    num_rows: int,
    vocab: int,
    strides: tuple[int | None, ...],
    has_class_weight: bool,
    options: LossOptions,
) -> Launch:
    stride_x, stride_coef, stride_entropy_coef, stride_lse_coef = strides
    block = min(_BLOCK, next_power_of_2(vocab))
    # Up to a multiple of 16, so that an odd vocabulary is read and written in vectors.
    padded = cdiv(vocab, 16) * 16
    return Launch(
        _gradient_kernel,
        (num_rows * cdiv(vocab, block),),
        stride_xm=stride_x,
        stride_coefm=stride_coef,
        stride_entropy_coefm=stride_entropy_coef or 0,
        stride_lse_coefm=stride_lse_coef or 0,
        V=vocab,
        stop=padded if stride_x is not None and stride_x >= padded else vocab,
        num_blocks=cdiv(vocab, block),
        HAS_CLASS_WEIGHT=has_class_weight,
        **options.kernel_arguments(),
        HAS_ENTROPY_COEF=stride_entropy_coef is not None,
        HAS_LSE_COEF=stride_lse_coef is not None,
        BLOCK_V=block,
        num_warps=min(_NUM_WARPS, max(1, block // 256)),
    )
