"""The kernel of every loss: one pass over a row of logits for its statistics, one for its gradient.

    z = softcap * tanh(scale * x / softcap)   (softcap None: scale * x),   log p_j = z_j - lse
    loss = (1 - s) * w_y * nll + s / V * sum_j w_j * (lse - z_j) + z_loss * lse^2,   nll = lse - z_y
    dx_j = coef * dloss/dx_j,   entropy = -sum_j p_j * log p_j

Legend: M rows, V vocabulary, x logits, y label, w class weights, s label smoothing.
Rounding: logits are widened to fp32 as they are read, all sums are fp32 (fp64 for fp64 logits),
and the gradient is rounded once, to its buffer's dtype. (p_y - 1) is formed before that rounding.
A row whose label is ignore_index gives 0 and a gradient of 0. A label out of range, which the
public functions refuse on a CPU, gives NaN and is never used as an address.
Source: Milakov and Gimelshein, Online normalizer calculation for softmax,
https://arxiv.org/abs/1805.02867.
"""

from liger_kernels.ops.backend import fp32, tl, triton


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
def _logits(x, scale, softcap, HAS_SCALE: tl.constexpr, HAS_SOFTCAP: tl.constexpr):
    z = x.to(tl.float32)
    if HAS_SCALE:
        z *= scale
    if HAS_SOFTCAP:
        z = softcap * _tanh(z * (1.0 / softcap))
    return z


@triton.jit
def _exp(x):
    return tl.exp2(x * 1.4426950408889634)


@triton.jit
def _add_tile(
    z,  # [R, LANES]; -inf in columns that do not exist
    w,  # [R, LANES] class weights or 1, 0 in columns that do not exist
    cols,  # [R, LANES]
    peaks,  # [LANES]; -inf before the first finite logit
    sums,
    moments,
    weighted,
    weights,
    bests,
    HAS_MOMENTS: tl.constexpr,
    HAS_SMOOTHING: tl.constexpr,
    HAS_BEST: tl.constexpr,
):
    """Add a tile to the running maximum, sum of exponentials, and what else a lane keeps.

    A thread holds whole columns of the tile: nothing is exchanged, and the sums are rescaled once
    a tile rather than once an element.
    """
    tile_peaks = tl.max(z, 0)
    if HAS_BEST:
        tile_bests = tl.min(tl.where(z == tile_peaks[None, :], cols, 2147483647), 0)
        bests = tl.where(tile_peaks > peaks, tile_bests, bests)
    new_peaks = tl.maximum(peaks, tile_peaks)
    # No logit is reserved to mean "none": all of a row may be the lowest number there is. Anything
    # finite may be taken from -inf.
    base = tl.where(new_peaks == float("-inf"), 0.0, new_peaks)
    rise = peaks - base
    shrink = _exp(rise)
    below = z - base[None, :]
    e = _exp(below)
    if HAS_MOMENTS:
        # Sums of e * (z - peak) stay small where sums of e * z would cancel.
        moments = tl.where(shrink > 0.0, shrink * (moments + sums * rise), 0.0)
        moments += tl.sum(tl.where(e > 0.0, e * below, 0.0), 0)
    if HAS_SMOOTHING:
        # Likewise: sums of w * z would overflow, or lose the digits of their distance from lse.
        weighted += tl.where(weights != 0.0, weights * rise, 0.0)
        weighted += tl.sum(tl.where(w != 0.0, w * below, 0.0), 0)
        weights += tl.sum(w, 0)
    return new_peaks, sums * shrink + tl.sum(e, 0), moments, weighted, weights, bests


@triton.jit
def _dlogits(
    z,
    w,  # class weights, or 1
    peak,
    log_total,
    entropy,
    at_all,
    at_label,
    spread,
    entropy_coef,
    softcap,
    HAS_SMOOTHING: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ENTROPY_COEF: tl.constexpr,
):
    below = z - peak
    e = _exp(below)
    dz = e * at_all - at_label
    if HAS_SMOOTHING:
        dz -= spread * w
    if HAS_ENTROPY_COEF:
        dz -= tl.where(e > 0.0, entropy_coef * e * (below - log_total + entropy), 0.0)
    if HAS_SOFTCAP:
        t = z * (1.0 / softcap)
        dz *= 1.0 - t * t
    return dz


@triton.jit
def loss_rows_kernel(
    x_ptr,  # (M, V) logits
    label_ptr,  # (M,) int32 or int64
    class_weight_ptr,  # (V,) fp32 or None
    coef_ptr,  # (M,) fp32 or None
    dx_ptr,  # (M, V), may be x_ptr, or None
    loss_ptr,  # (M,) fp32 or None
    nll_ptr,  # (M,) fp32 or None
    entropy_ptr,  # (M,) fp32 or None
    best_ptr,  # (M,) int64 or None
    peak_ptr,  # (M,) fp32 or None
    log_total_ptr,  # (M,) fp32 or None: with the peak, lse
    mean_ptr,  # (M,) fp32 or None: of z
    stride_xm,
    stride_dxm,
    stride_coefm,
    V,
    split,  # columns before those kept, a multiple of BLOCK_V
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
    HAS_DX: tl.constexpr,
    HAS_LOSS: tl.constexpr,
    HAS_NLL: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    HAS_BEST: tl.constexpr,
    HAS_PEAK: tl.constexpr,
    HAS_LOG_TOTAL: tl.constexpr,
    HAS_MEAN: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK_V: tl.constexpr,
    KEEP_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    x_row = x_ptr + row * stride_xm
    scale = fp32(scale)
    softcap = fp32(softcap)
    label_smoothing = fp32(label_smoothing)

    label = tl.load(label_ptr + row).to(tl.int64)
    in_range = (label >= 0) & (label < V)
    if IGNORE_INDEX is None:
        is_ignored = label != label
    else:
        is_ignored = label == IGNORE_INDEX
    has_label = in_range & (is_ignored == 0)
    column = tl.where(has_label, label, 0).to(tl.int32)
    x_label = tl.load(x_row + column, mask=has_label, other=0.0)
    z_label = _logits(x_label, scale, softcap, HAS_SCALE, HAS_SOFTCAP)
    # Neither ignored nor in range: NaN, since a kernel cannot raise.
    z_label = tl.where(has_label, z_label, float("nan"))
    w_label = fp32(1.0)
    if HAS_CLASS_WEIGHT:
        w_label = tl.load(class_weight_ptr + column, mask=has_label, other=0.0)

    # Every lane keeps its own running maximum and sums; they meet once, at the end.
    peaks = tl.full((LANES,), float("-inf"), tl.float32)
    sums = tl.zeros((LANES,), tl.float32)
    moments = tl.zeros((LANES,), tl.float32)
    weighted = tl.zeros((LANES,), tl.float32)
    weights = tl.zeros((LANES,), tl.float32)
    bests = tl.zeros((LANES,), tl.int32)
    means = tl.zeros((LANES,), tl.float32)
    lanes = tl.arange(0, LANES)[None, :]
    block = tl.arange(0, BLOCK_V // LANES)[:, None] * LANES + lanes
    kept_cols = split + tl.arange(0, KEEP_V // LANES)[:, None] * LANES + lanes
    kept_mask = kept_cols < V
    # An ignored row is not read.
    stop = tl.where(is_ignored, 0, split)
    is_read = kept_cols < tl.where(is_ignored, 0, V)
    # The next block is on its way while one is added.
    ahead = tl.load(x_row + block, mask=block < stop, other=0.0, eviction_policy="evict_last")
    for start in tl.range(0, stop, BLOCK_V, num_stages=1):
        cols = start + block
        x = ahead
        ahead = tl.load(
            x_row + BLOCK_V + cols,
            mask=BLOCK_V + cols < stop,
            other=0.0,
            eviction_policy="evict_last",
        )
        z = _logits(x, scale, softcap, HAS_SCALE, HAS_SOFTCAP)
        w = tl.full(cols.shape, 1.0, tl.float32)
        if HAS_SMOOTHING and HAS_CLASS_WEIGHT:
            w = tl.load(class_weight_ptr + cols)
        peaks, sums, moments, weighted, weights, bests = _add_tile(
            z, w, cols, peaks, sums, moments, weighted, weights, bests,
            HAS_ENTROPY, HAS_SMOOTHING, HAS_BEST,
        )  # fmt: skip
        if HAS_MEAN:
            # Divided first, as the sum of large logits would overflow.
            means += tl.sum(z * (1.0 / V), 0)
    kept = tl.load(x_row + kept_cols, mask=is_read, other=0.0, eviction_policy="evict_first")
    kept_z = _logits(kept, scale, softcap, HAS_SCALE, HAS_SOFTCAP)
    kept_w = is_read.to(tl.float32)
    if HAS_SMOOTHING and HAS_CLASS_WEIGHT:
        kept_w = tl.load(class_weight_ptr + kept_cols, mask=is_read, other=0.0)
    kept_z = tl.where(is_read, kept_z, float("-inf"))
    peaks, sums, moments, weighted, weights, bests = _add_tile(
        kept_z, kept_w, kept_cols, peaks, sums, moments, weighted, weights, bests,
        HAS_ENTROPY, HAS_SMOOTHING, HAS_BEST,
    )  # fmt: skip
    if HAS_MEAN:
        means += tl.sum(tl.where(is_read, kept_z, 0.0) * (1.0 / V), 0)

    # A row that was not read has no peak; 0 keeps what is computed for nothing finite.
    peak = tl.where(is_ignored, 0.0, tl.max(peaks, 0))
    shrink = _exp(peaks - peak)
    total = tl.where(is_ignored, 1.0, tl.sum(sums * shrink, 0))
    log_total = tl.log2(total) * 0.6931471805599453
    lse = peak + log_total
    if HAS_PEAK:
        tl.store(peak_ptr + row, peak)
    if HAS_LOG_TOTAL:
        tl.store(log_total_ptr + row, log_total)
    # A confident row has z_label == peak and keeps the digits of log_total.
    nll = log_total + (peak - z_label)
    if HAS_NLL:
        tl.store(nll_ptr + row, tl.where(is_ignored, 0.0, nll))
    if HAS_ENTROPY:
        moment = tl.sum(tl.where(shrink > 0.0, shrink * (moments + sums * (peaks - peak)), 0.0), 0)
        entropy = log_total - moment / total
        tl.store(entropy_ptr + row, tl.where(is_ignored, 0.0, entropy))
    if HAS_BEST:
        best = tl.min(tl.where(peaks == peak, bests, V), 0)
        tl.store(best_ptr + row, tl.where(is_ignored, -1, best).to(tl.int64))
    weight_sum = V * fp32(1.0)
    if HAS_SMOOTHING and HAS_CLASS_WEIGHT:
        weight_sum = tl.sum(weights, 0)
    if HAS_MEAN:
        tl.store(mean_ptr + row, tl.sum(means, 0))
    if HAS_LOSS:
        loss = w_label * nll
        if HAS_SMOOTHING:
            weighted += tl.where(weights != 0.0, weights * (peaks - peak), 0.0)
            smooth = (weight_sum * log_total - tl.sum(weighted, 0)) / V
            loss = (1.0 - label_smoothing) * loss + label_smoothing * smooth
        if HAS_Z_LOSS:
            # From the left: lse^2 may overflow where its product with z_loss does not.
            loss += fp32(z_loss) * lse * lse
        tl.store(loss_ptr + row, tl.where(is_ignored, 0.0, loss))

    if HAS_DX:
        coef = tl.load(coef_ptr + row * stride_coefm)
        # Every factor of the gradient carries the slope of z, so that no element needs it.
        coef = tl.where(is_ignored, 0.0, tl.where(in_range, coef, float("nan")) * scale)
        at_label = coef * w_label
        spread = coef * label_smoothing / V
        if HAS_SMOOTHING:
            at_label *= 1.0 - label_smoothing
            at_all = at_label + spread * weight_sum
        else:
            at_all = at_label
        if HAS_Z_LOSS:
            at_all += 2.0 * coef * fp32(z_loss) * lse
        at_all /= total
        zero = fp32(0.0)
        dx_row = dx_ptr + row * stride_dxm
        w = fp32(1.0)
        if HAS_SMOOTHING and HAS_CLASS_WEIGHT:
            w = tl.load(class_weight_ptr + kept_cols, mask=kept_mask, other=0.0)
        ahead = tl.load(
            x_row + (split - BLOCK_V) + block,
            mask=block < stop,
            other=0.0,
            eviction_policy="evict_first",
        )
        # Widened again: 16 bits an element wait in registers, not 32.
        kept_z = _logits(kept, scale, softcap, HAS_SCALE, HAS_SOFTCAP)
        kept_dz = _dlogits(
            kept_z, w, peak, log_total, zero, at_all, 0.0, spread, zero, softcap,
            HAS_SMOOTHING, HAS_SOFTCAP, False,
        )  # fmt: skip
        kept_dz = kept_dz.to(dx_ptr.dtype.element_ty)
        tl.store(dx_row + kept_cols, kept_dz, mask=kept_mask, eviction_policy="evict_first")
        # Backwards: what was read last is what L2 still holds.
        for start in tl.range(0, stop, BLOCK_V, num_stages=1):
            cols = split - BLOCK_V - start + block
            x = ahead
            ahead = tl.load(
                x_row - BLOCK_V + cols,
                mask=start + BLOCK_V + block < stop,
                other=0.0,
                eviction_policy="evict_first",
            )
            z = _logits(x, scale, softcap, HAS_SCALE, HAS_SOFTCAP)
            if HAS_SMOOTHING and HAS_CLASS_WEIGHT:
                w_block = tl.load(class_weight_ptr + cols)
            else:
                w_block = fp32(1.0)
            dz = _dlogits(
                z, w_block, peak, log_total, zero, at_all, 0.0, spread, zero, softcap,
                HAS_SMOOTHING, HAS_SOFTCAP, False,
            )  # fmt: skip
            dz = dz.to(dx_ptr.dtype.element_ty)
            tl.store(dx_row + cols, dz, eviction_policy="evict_first")
        for start in tl.range(0, split - stop, BLOCK_V):
            zeros = tl.zeros((BLOCK_V // LANES, LANES), dx_ptr.dtype.element_ty)
            tl.store(dx_row + start + block, zeros)
        # The label's own element once more, instead of a comparison for each of the others. The
        # barrier orders it after another thread's store.
        tl.debug_barrier()
        dz_label = _dlogits(
            z_label, w_label, peak, log_total, zero, at_all, at_label, spread, zero, softcap,
            HAS_SMOOTHING, HAS_SOFTCAP, False,
        )  # fmt: skip
        tl.store(dx_row + column, dz_label.to(dx_ptr.dtype.element_ty), mask=has_label)
