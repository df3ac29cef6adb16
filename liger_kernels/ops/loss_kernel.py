"""The kernel of every loss: one pass over a row of logits for its statistics, one for its gradient.

    z = softcap * tanh(scale * x / softcap)   (softcap None: scale * x),   log p_j = z_j - lse
    loss = (1 - s) * w_y * nll + s / V * sum_j w_j * (lse - z_j) + z_loss * lse^2,   nll = lse - z_y
    dx_j = coef * dloss/dx_j + entropy_coef * dentropy/dx_j,   entropy = -sum_j p_j * log p_j

Legend: M rows, V vocabulary, x logits, y label, w class weights, s label smoothing.
Rounding: logits are widened to fp32 as they are read, all sums are fp32 (fp64 for fp64 logits),
and the gradient is rounded once, to its buffer's dtype. (p_y - 1) is formed before that rounding.
A row whose label is ignore_index gives 0 and a gradient of 0. A label out of range, which the
public functions refuse on a CPU, gives NaN and is never used as an address.
Source: Milakov and Gimelshein, Online normalizer calculation for softmax,
https://arxiv.org/abs/1805.02867.
"""

import torch

from liger_kernels.ops.launch import (
    device_guard,
    fp32,
    lookup,
    next_power_of_2,
    runs_triton,
    tl,
    triton,
)
from liger_kernels.ops.loss_options import LossOptions

# (vocabulary, block) and (block, warps): a wide row streams in few wide blocks, and few rows are
# in flight at once, so that the second pass finds the row in L2. Swept on an H100 in bf16, as a
# share of one read and one write: 0.64 at 128256 with (16384, 16), 0.58 with 32 warps, 0.61 with
# (4096, 8); 0.78 at 32000 with (8192, 8), 0.75 with 16 warps.
_BLOCKS = ((65536, 8192), (1 << 62, 16384))
_WARPS = ((1024, 4), (8192, 8), (16384, 16))
# The statistics keep three more vectors a program; a wider block would spill.
_STATS_BLOCK = 4096
# The torch code widens at most this many logits at a time where it needs a copy.
_COPY_BYTES = 32 << 20


@triton.jit
def _tanh(x):
    # One minus an exponential loses the digits of small values, which a cap of 30 would multiply.
    e = tl.exp2(-2.8853900817779268 * tl.abs(x))
    far = (1.0 - e) / (1.0 + e)
    far = tl.where(x < 0.0, -far, far)
    s = x * x
    near = x + x * s * (
        -0.3333333333333333
        + s * (0.13333333333333333 + s * (-0.05396825396825397 + s * 0.02186948853615520))
    )
    return tl.where(s < 0.0625, near, far)


@triton.jit
def _capped(x, scale, softcap, per_softcap, HAS_SOFTCAP: tl.constexpr):
    z = x.to(tl.float32) * scale
    if HAS_SOFTCAP:
        z = softcap * _tanh(z * per_softcap)
    return z


# These differ from call to call; a kernel for each value would be compiled again, even while a CUDA
# graph is captured.
@triton.jit(do_not_specialize=["ignore_index", "stride_coefm", "stride_entropy_coefm"])
def _loss_rows_kernel(
    x_ptr,  # (M, V) logits
    label_ptr,  # (M,) int32 or int64
    class_weight_ptr,  # (V,) fp32 or None
    coef_ptr,  # (M,) fp32 or None
    entropy_coef_ptr,  # (M,) fp32 or None
    dx_ptr,  # (M, V), may be x_ptr, or None
    loss_ptr,  # (M,) fp32 or None
    nll_ptr,  # (M,) fp32 or None
    entropy_ptr,  # (M,) fp32 or None
    best_ptr,  # (M,) int64 or None
    stride_xm,
    stride_dxm,
    stride_coefm,
    stride_entropy_coefm,
    V,
    ignore_index,
    label_smoothing,
    z_loss,
    softcap,
    scale,
    HAS_IGNORE: tl.constexpr,
    HAS_CLASS_WEIGHT: tl.constexpr,
    HAS_SMOOTHING: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_DX: tl.constexpr,
    HAS_ENTROPY_COEF: tl.constexpr,
    HAS_LOSS: tl.constexpr,
    HAS_NLL: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    HAS_BEST: tl.constexpr,
    BLOCK_V: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    LOG2E: tl.constexpr = 1.4426950408889634
    LN2: tl.constexpr = 0.6931471805599453
    # Finite, so that a lane without a column yet subtracts it from itself without a NaN.
    LOWEST: tl.constexpr = -1e30
    row = tl.program_id(0).to(tl.int64)
    x_row = x_ptr + row * stride_xm
    scale = fp32(scale)
    softcap = fp32(softcap)
    per_softcap = 1.0 / softcap
    label_smoothing = fp32(label_smoothing)

    label = tl.load(label_ptr + row).to(tl.int64)
    in_range = (label >= 0) & (label < V)
    if HAS_IGNORE:
        is_ignored = label == ignore_index
    else:
        is_ignored = label != label
    has_label = in_range & (is_ignored == 0)
    # No column is -1, so that neither an ignored label nor a padded lane can match.
    column = tl.where(has_label, label, -1).to(tl.int32)
    address = tl.maximum(column, 0)
    x_label = tl.load(x_row + address, mask=has_label, other=0.0)
    z_label = _capped(x_label, scale, softcap, per_softcap, HAS_SOFTCAP)
    # Neither ignored nor in range: NaN, since a kernel cannot raise.
    z_label = tl.where(has_label, z_label, float("nan"))
    w_label = fp32(1.0)
    if HAS_CLASS_WEIGHT:
        w_label = tl.load(class_weight_ptr + address, mask=has_label, other=0.0)

    # Every lane keeps its own running maximum and sums; they meet once, after the loop.
    peaks = tl.full((BLOCK_V,), LOWEST, tl.float32)
    sums = tl.zeros((BLOCK_V,), tl.float32)
    if HAS_ENTROPY or HAS_ENTROPY_COEF:
        moments = tl.zeros((BLOCK_V,), tl.float32)
    if HAS_SMOOTHING:
        weighted = tl.zeros((BLOCK_V,), tl.float32)
        weights = tl.zeros((BLOCK_V,), tl.float32)
    if HAS_BEST:
        bests = tl.zeros((BLOCK_V,), tl.int32)
    # An ignored row is not read.
    stop = tl.where(is_ignored, 0, V)
    for start in tl.range(0, stop, BLOCK_V, num_stages=NUM_STAGES):
        cols = start + tl.arange(0, BLOCK_V)
        mask = cols < V
        x = tl.load(x_row + cols, mask=mask, other=0.0, eviction_policy="evict_last")
        z = tl.where(mask, _capped(x, scale, softcap, per_softcap, HAS_SOFTCAP), LOWEST)
        if HAS_BEST:
            bests = tl.where(z > peaks, cols, bests)
        new_peaks = tl.maximum(peaks, z)
        shrink = tl.exp2((peaks - new_peaks) * LOG2E)
        e = tl.exp2((z - new_peaks) * LOG2E)
        if HAS_ENTROPY or HAS_ENTROPY_COEF:
            # Sums of e * (z - peak) stay small where sums of e * z would cancel.
            moments = shrink * (moments + sums * (peaks - new_peaks))
            moments += tl.where(e > 0.0, e * (z - new_peaks), 0.0)
        if HAS_SMOOTHING:
            if HAS_CLASS_WEIGHT:
                w = tl.load(class_weight_ptr + cols, mask=mask, other=0.0)
                weights += w
                weighted += tl.where(mask, w * z, 0.0)
            else:
                weighted += tl.where(mask, z, 0.0)
        sums = sums * shrink + e
        peaks = new_peaks
    # A row that was not read has no peak; 0 keeps what is computed for nothing finite.
    peak = tl.where(is_ignored, 0.0, tl.max(peaks, 0))
    shrink = tl.exp2((peaks - peak) * LOG2E)
    total = tl.where(is_ignored, 1.0, tl.sum(sums * shrink, 0))
    log_total = tl.log2(total) * LN2
    lse = peak + log_total
    # A confident row has z_label == peak and keeps the digits of log_total.
    nll = log_total + (peak - z_label)
    if HAS_NLL:
        tl.store(nll_ptr + row, tl.where(is_ignored, 0.0, nll))
    if HAS_ENTROPY or HAS_ENTROPY_COEF:
        moment = tl.sum(tl.where(shrink > 0.0, shrink * (moments + sums * (peaks - peak)), 0.0), 0)
        entropy = log_total - moment / total
        if HAS_ENTROPY:
            tl.store(entropy_ptr + row, tl.where(is_ignored, 0.0, entropy))
    if HAS_BEST:
        best = tl.min(tl.where(peaks == peak, bests, V), 0)
        tl.store(best_ptr + row, tl.where(is_ignored, -1, best).to(tl.int64))
    weight_sum = V * fp32(1.0)
    if HAS_SMOOTHING and HAS_CLASS_WEIGHT:
        weight_sum = tl.sum(weights, 0)
    if HAS_LOSS:
        loss = w_label * nll
        if HAS_SMOOTHING:
            smooth = (weight_sum * lse - tl.sum(weighted, 0)) / V
            loss = (1.0 - label_smoothing) * loss + label_smoothing * smooth
        loss += fp32(z_loss) * lse * lse
        tl.store(loss_ptr + row, tl.where(is_ignored, 0.0, loss))

    if HAS_DX:
        coef = tl.load(coef_ptr + row * stride_coefm)
        coef = tl.where(in_range, coef, float("nan"))
        at_label = coef * w_label
        if HAS_SMOOTHING:
            at_label *= 1.0 - label_smoothing
            spread = coef * label_smoothing / V
            at_all = at_label + spread * weight_sum
        else:
            at_all = at_label
        at_all += 2.0 * coef * fp32(z_loss) * lse
        if HAS_ENTROPY_COEF:
            entropy_coef = tl.load(entropy_coef_ptr + row * stride_entropy_coefm)
        per_total = 1.0 / total
        dx_row = dx_ptr + row * stride_dxm
        for start in tl.range(0, V, BLOCK_V, num_stages=NUM_STAGES):
            cols = start + tl.arange(0, BLOCK_V)
            mask = cols < V
            x = tl.load(x_row + cols, mask=mask, other=0.0, eviction_policy="evict_first")
            z = _capped(x, scale, softcap, per_softcap, HAS_SOFTCAP)
            p = tl.exp2((z - peak) * LOG2E) * per_total
            dz = at_all * p
            if HAS_SMOOTHING:
                if HAS_CLASS_WEIGHT:
                    dz -= spread * tl.load(class_weight_ptr + cols, mask=mask, other=0.0)
                else:
                    dz -= spread
            if HAS_ENTROPY_COEF:
                log_p = z - peak - log_total
                dz -= entropy_coef * tl.where(p > 0.0, p * (log_p + entropy), 0.0)
            dz = tl.where(cols == column, dz - at_label, dz)
            if HAS_SOFTCAP:
                t = z * per_softcap
                dz *= 1.0 - t * t
            dz = tl.where(is_ignored, 0.0, dz * scale)
            tl.store(dx_row + cols, dz.to(dx_ptr.dtype.element_ty), mask=mask)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype losses are computed and returned in: fp32, or fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)


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

    coef and entropy_coef (M,) may have stride 0; class_weight (V,) is wide and contiguous. With
    overwrite x is scratch memory and dx, if given, is x itself; else x is left as it is.
    """
    num_rows, vocab = x.shape
    if num_rows == 0:
        return
    if not runs_triton(x):
        in_place = overwrite and x.dtype == wide_dtype(x.dtype)
        step = num_rows if in_place else max(1, _COPY_BYTES // (4 * vocab))
        tensors = (x, label, coef, entropy_coef, dx, loss, nll, entropy, best)
        for start in range(0, num_rows, step):
            part = [None if t is None else t[start : start + step] for t in tensors]
            with torch.autocast(x.device.type, enabled=False):
                _loss_rows_torch(options, class_weight, in_place, *part)
        return
    block = min(next_power_of_2(vocab), lookup(_BLOCKS, vocab))
    if not (entropy is None and entropy_coef is None and best is None):
        block = min(block, _STATS_BLOCK)
    with device_guard(x):
        _loss_rows_kernel[(num_rows,)](
            x_ptr=x,
            label_ptr=label,
            class_weight_ptr=class_weight,
            coef_ptr=coef,
            entropy_coef_ptr=entropy_coef,
            dx_ptr=dx,
            loss_ptr=loss,
            nll_ptr=nll,
            entropy_ptr=entropy,
            best_ptr=best,
            stride_xm=x.stride(0),
            stride_dxm=0 if dx is None else dx.stride(0),
            stride_coefm=0 if coef is None else coef.stride(0),
            stride_entropy_coefm=0 if entropy_coef is None else entropy_coef.stride(0),
            V=vocab,
            ignore_index=options.ignore_index or 0,
            label_smoothing=options.label_smoothing,
            z_loss=options.z_loss,
            softcap=options.softcap or 1.0,
            scale=options.scale,
            HAS_IGNORE=options.ignore_index is not None,
            HAS_CLASS_WEIGHT=class_weight is not None,
            HAS_SMOOTHING=options.label_smoothing != 0.0,
            HAS_SOFTCAP=options.softcap is not None,
            HAS_DX=dx is not None,
            HAS_ENTROPY_COEF=entropy_coef is not None,
            HAS_LOSS=loss is not None,
            HAS_NLL=nll is not None,
            HAS_ENTROPY=entropy is not None,
            HAS_BEST=best is not None,
            BLOCK_V=block,
            NUM_STAGES=2,
            num_warps=lookup(_WARPS, block),
        )


def _loss_rows_torch(
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
    if options.label_smoothing:
        weighted = z.sum(1) if class_weight is None else z @ class_weight

    peak = z.amax(1)
    z.sub_(peak[:, None])
    if entropy is not None or entropy_coef is not None:
        # A logit of -inf has p = 0 and adds nothing; 0 * -inf would be NaN.
        shifted = z.clamp_min(-1e30)
    e = z.exp_()
    total = e.sum(1)
    log_total = total.log()
    lse = peak + log_total
    row_nll = log_total + (peak - z_label)
    if nll is not None:
        nll.copy_(row_nll.masked_fill(is_ignored, 0.0))
    if entropy is not None or entropy_coef is not None:
        row_entropy = log_total - torch.einsum("mv,mv->m", e, shifted) / total
    if entropy is not None:
        entropy.copy_(row_entropy.masked_fill(is_ignored, 0.0))
    if loss is not None:
        row_loss = w_label * row_nll
        if options.label_smoothing:
            smooth = (weight_sum * lse - weighted) / vocab
            row_loss = row_loss.lerp(smooth, options.label_smoothing)
        row_loss = row_loss + options.z_loss * lse.square()
        loss.copy_(row_loss.masked_fill(is_ignored, 0.0))
    if dx is None:
        return

    coef = coef.to(z.dtype).masked_fill(is_wrong, float("nan")).masked_fill(is_ignored, 0.0)
    spread = coef * (options.label_smoothing / vocab)
    at_label = coef * w_label * (1.0 - options.label_smoothing)
    at_all = at_label + spread * weight_sum + 2.0 * options.z_loss * coef * lse
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
