"""Losses and gradients of rows of logits in plain torch, for fp64 and devices without Triton."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from liger_kernels.ops.losses.options import LossOptions, wide_dtype, without_autocast

# It widens at most this many logits at a time where it needs a copy.
_COPY_BYTES = 32 << 20
# A logarithm whose exponential is 0 in fp64 too.
_NO_EXP = -1e3


class RowCall(NamedTuple):
    """Options that all rows of a call share."""

    options: LossOptions
    class_weight: Tensor | None  # (V,)
    # Whether x may be written to.
    overwrite: bool


class KeptRows(NamedTuple):
    """Numbers that forward keeps of each row for its gradient; lse is the sum of the first two."""

    peak: Tensor  # (M,)
    log_total: Tensor  # (M,)
    entropy: Tensor | None = None  # (M,)

    def map(self, function: Callable[[Tensor], Tensor]) -> KeptRows:
        """Return the function of each number that is there."""
        entropy = None if self.entropy is None else function(self.entropy)
        return KeptRows(function(self.peak), function(self.log_total), entropy)


class Coefs(NamedTuple):
    """The gradients that come in for each row's values; (M,), at any stride."""

    loss: Tensor
    entropy: Tensor | None = None
    # Of the logarithm of the sum, and with the peak a constant so of lse.
    lse: Tensor | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> Coefs:
        """Return the function of each that is there."""
        return Coefs(function(self.loss), *(None if t is None else function(t) for t in self[1:]))


class _Labels(NamedTuple):
    is_ignored: Tensor  # (M,)
    is_wrong: Tensor  # (M,)
    column: Tensor  # (M, 1) int64, 0 where there is no label


class _Softmax(NamedTuple):
    e: Tensor  # (M, V) exp(z - peak)
    shifted: Tensor | None  # (M, V) z - peak, for an entropy
    total: Tensor  # (M,) of e
    log_total: Tensor
    lse: Tensor
    entropy: Tensor | None


def _rows_of(part: slice, x: Tensor) -> Tensor:
    return x[part]


def loss_rows_torch(
    call: RowCall,
    x: Tensor,
    label: Tensor,
    coefs: Coefs | None,
    dx: Tensor | None,
    outputs: dict[str, Tensor],
    kept: KeptRows | None = None,
) -> None:
    """Fill outputs and dx as loss_rows does; with kept rows the gradient alone, in one pass."""
    num_rows, vocab = x.shape
    in_place = call.overwrite and x.dtype == wide_dtype(x.dtype)
    step = num_rows if in_place else max(1, _COPY_BYTES // (4 * vocab))
    call = call._replace(overwrite=in_place)
    for start in range(0, num_rows, step):
        part = slice(start, start + step)
        rows_of = functools.partial(_rows_of, part)
        at = None if coefs is None else coefs.map(rows_of)
        out = None if dx is None else dx[part]
        filled = {name: out[part] for name, out in outputs.items()}
        rows = None if kept is None else kept.map(rows_of)
        with without_autocast(x.device):
            _some_rows(call, x[part], label[part], at, out, filled, rows)


def _some_rows(call, x, label, coefs, dx, outputs, kept):
    # The names follow the values: one buffer is logits, shifted logits, exponentials, gradient.
    options, vocab = call.options, x.shape[1]
    z = x if call.overwrite else x.to(wide_dtype(x.dtype), copy=True)
    if options.scale != 1.0:
        z.mul_(options.scale)
    slope = None
    if options.softcap is not None:
        slope = z.div_(options.softcap).tanh_()
        z = slope * options.softcap
    is_ignored = label == (vocab if options.ignore_index is None else options.ignore_index)
    is_wrong = ((label < 0) | (label >= vocab)) & ~is_ignored
    column = label.masked_fill(is_ignored | is_wrong, 0).long()[:, None]
    labels = _Labels(is_ignored, is_wrong, column)
    has_entropy_coef = coefs is not None and coefs.entropy is not None
    needs_entropy = "entropy" in outputs or has_entropy_coef
    if kept is None:
        softmax = _fill(call, z, labels, outputs, needs_entropy)
    else:
        # An ignored row has no peak; it must not overflow.
        z.sub_(kept.peak.to(z.dtype).masked_fill(is_ignored, float("inf"))[:, None])
        shifted = z.clamp_min(_NO_EXP) if needs_entropy else None
        peak, log_total, entropy = kept
        lse = peak + log_total
        softmax = _Softmax(z.exp_(), shifted, log_total.exp(), log_total, lse, entropy)
    if dx is None:
        return
    dz = _gradient(call, softmax, labels, coefs)
    if slope is not None:
        dz.mul_(slope.square_().neg_().add_(1.0))
    if options.scale != 1.0:
        dz.mul_(options.scale)
    if dz is not dx:
        dx.copy_(dz)


def _fill(call, z, labels, outputs, needs_entropy):
    """Fill the outputs from logits z, which become exponentials; return these and their sums."""
    options, vocab = call.options, z.shape[1]
    z_label = z.gather(1, labels.column)[:, 0].masked_fill(labels.is_wrong, float("nan"))
    found = {}
    if "mean" in outputs:
        found["mean"] = z.mean(1)
    if "best" in outputs:
        outputs["best"].copy_(z.argmax(1).masked_fill(labels.is_ignored, -1))
    w_label, weight_sum, class_weight = 1.0, float(vocab), call.class_weight
    if class_weight is not None:
        class_weight = class_weight.to(z.dtype)
        w_label, weight_sum = class_weight[labels.column[:, 0]], class_weight.sum()
    found["peak"] = peak = z.amax(1)
    z.sub_(peak[:, None])
    # Of distances from the peak: of large logits the sum would overflow, or lose its digits.
    if options.label_smoothing:
        weighted = z.sum(1) if class_weight is None else z @ class_weight
    # Below it, exp is 0 and the logit adds nothing; 0 * -inf would be NaN.
    shifted = z.clamp_min(_NO_EXP) if needs_entropy else None
    e = z.exp_()
    total = e.sum(1)
    found["log_total"] = log_total = total.log()
    lse = peak + log_total
    found["nll"] = row_nll = log_total + (peak - z_label)
    entropy = None
    if shifted is not None:
        found["entropy"] = entropy = log_total - (e * shifted).sum(1) / total
    if "loss" in outputs:
        row_loss = w_label * row_nll
        if options.label_smoothing:
            smooth = (weight_sum * log_total - weighted) / vocab
            # Not lerp, which takes the difference of two infinite losses.
            row_loss = (1.0 - options.label_smoothing) * row_loss + options.label_smoothing * smooth
        if options.z_loss:
            # From the left: lse^2 may overflow where its product with z_loss does not.
            row_loss = row_loss + options.z_loss * lse * lse
        found["loss"] = row_loss
    for name in outputs.keys() - {"best"}:
        outputs[name].copy_(found[name].masked_fill(labels.is_ignored, 0.0))
    return _Softmax(e, shifted, total, log_total, lse, entropy)


def _gradient(call, softmax, labels, coefs):
    """Return the gradient of the logits after scale and cap, in the buffer of the exponentials."""
    options, (e, shifted, total, log_total, lse, entropy) = call.options, softmax
    vocab, class_weight, is_ignored = e.shape[1], call.class_weight, labels.is_ignored
    w_label, weight_sum = 1.0, float(vocab)
    if class_weight is not None:
        class_weight = class_weight.to(e.dtype)
        w_label, weight_sum = class_weight[labels.column[:, 0]], class_weight.sum()
    coef, entropy_coef, lse_coef = coefs
    coef = coef.to(e.dtype).masked_fill(labels.is_wrong, float("nan")).masked_fill(is_ignored, 0.0)
    at_all = at_label = coef * w_label
    if options.label_smoothing:
        spread = coef * (options.label_smoothing / vocab)
        at_label = at_label * (1.0 - options.label_smoothing)
        at_all = at_label + spread * weight_sum
    if options.z_loss:
        at_all = at_all + 2.0 * options.z_loss * coef * lse
    if lse_coef is not None:
        at_all = at_all + lse_coef.to(e.dtype)
    at_all = at_all.masked_fill(is_ignored, 0.0)[:, None]
    if entropy_coef is not None:
        entropy_coef = entropy_coef.to(e.dtype).masked_fill(is_ignored, 0.0)[:, None]
        log_p = shifted.sub_(log_total[:, None])
        at_all = at_all - log_p.add_(entropy[:, None]).mul_(entropy_coef)
    dz = e.mul_(at_all.div_(total[:, None]))
    if options.label_smoothing:
        dz.sub_(spread[:, None] if class_weight is None else spread[:, None] * class_weight)
    return dz.scatter_add_(1, labels.column, -at_label[:, None])
