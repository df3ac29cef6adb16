"""Divergence of rows of logits from a teacher's, and its gradient.

    p = softmax(teacher / temperature), q = softmax(x / temperature), m = beta * p + (1 - beta) * q
    beta 0: KL(p, q);  beta 1: KL(q, p);  between: beta * KL(p, m) + (1 - beta) * KL(q, m)

(Agarwal et al. 2024, arXiv 2306.13649.) The gradient in x is coef / temperature times q - p for
beta 0, else q * (g - sum(q * g)), with g = log(q / p) for beta 1, (1 - beta) * log(q / m) between.
Equal logits give 0 with a gradient of 0, exactly. A class whose logit is -inf has no share.

Rows of 16 bits are computed in powers of two, which a GPU has instructions for. Their error of a
ratio, 1e-7, is nothing beside that of the logits, unless beta is so near 0 or 1 that the ratios are
as small themselves.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from liger_kernels.ops.backend import fp32, runs_triton, tl, triton
from liger_kernels.ops.launcher import Launch, cache_by_shape, next_power_of_2

__all__ = ["DivergenceOptions", "divergence_rows"]

# Elements of a row that a program takes at a time: 32 a thread.
_BLOCK, _NUM_WARPS = 8192, 8
_FORWARD, _REVERSE, _MIXED = 0, 1, 2
# The least share of either side in a mixture of which powers of two are near enough.
_LEAST_SHARE = 0.01


class DivergenceOptions(NamedTuple):
    """The options of a row's divergence: beta from 0 to 1, temperature above 0."""

    beta: float
    temperature: float

    @property
    def kind(self) -> int:
        """The formula: both ends of beta are limits of the one between, which is 0 there."""
        return {0.0: _FORWARD, 1.0: _REVERSE}.get(self.beta, _MIXED)


@triton.jit
def _exp(x, IN_BITS: tl.constexpr):
    return tl.exp2(x) if IN_BITS else tl.exp(x)


@triton.jit
def _log(x, IN_BITS: tl.constexpr):
    return tl.log2(x) if IN_BITS else tl.log(x)


@triton.jit
def _load(ptr, cols, V, temperature, scale, IN_BITS: tl.constexpr):
    """Return logits over the temperature, in bits or nats."""
    x = tl.load(ptr + cols, mask=cols < V, other=float("-inf")).to(tl.float32)
    return x * scale if IN_BITS else x / temperature


@triton.jit
def _add_block(x, peak, total, IN_BITS: tl.constexpr):
    """Return the peak and the sum of exponentials, less the peak, with those of a block."""
    new = tl.maximum(peak, tl.max(x, 0))
    # Of -inf alone the difference would be NaN.
    finite = tl.where(new == float("-inf"), 0.0, new)
    return new, total * _exp(peak - finite, IN_BITS) + tl.sum(_exp(x - finite, IN_BITS), 0)


@triton.jit
def _expm1(x):
    """Return exp(x) - 1 for x of 0 at most, to a few units in the last place near 0 too."""
    series = 1.0 + x * (1.0 / 8.0)
    series = 1.0 + x * series * (1.0 / 7.0)
    series = 1.0 + x * series * (1.0 / 6.0)
    series = 1.0 + x * series * (1.0 / 5.0)
    series = 1.0 + x * series * (1.0 / 4.0)
    series = 1.0 + x * series * (1.0 / 3.0)
    series = 1.0 + x * series * (1.0 / 2.0)
    return tl.where(x > -0.5, x * series, tl.exp(x) - 1.0)


@triton.jit
def _log1p(x):
    """Return log(1 + x) for x from -1 to 0, to a few units in the last place near 0 too."""
    # 2 * atanh(x / (2 + x)), whose argument is from -1 / 3 to 0 where the series is taken.
    s = x / (2.0 + x)
    square = s * s
    series = 1.0 / 11.0 + square * (1.0 / 13.0)
    series = 1.0 / 9.0 + square * series
    series = 1.0 / 7.0 + square * series
    series = 1.0 / 5.0 + square * series
    series = 1.0 / 3.0 + square * series
    return tl.where(x > -0.5, 2.0 * s * (1.0 + square * series), tl.log(1.0 + x))


@triton.jit
def _ratios_in_bits(log_q, log_p, beta):
    """Return log2(q / m) and log2(p / m), 0 where p = q."""
    # Above, the power overflows; q is 0 there beside p.
    difference = tl.minimum(log_p - log_q, 126.0)
    of_q = -tl.log2(1.0 + beta * (tl.exp2(difference) - 1.0))
    return of_q, difference + of_q


@triton.jit
def _ratios_in_nats(log_q, log_p, beta):
    """Return log(q / m) and log(p / m), exact where p = q."""
    difference = log_p - log_q
    inner = _expm1(-tl.abs(difference))
    is_less = difference <= 0.0
    nearer = -_log1p(tl.where(is_less, beta, 1.0 - beta) * inner)
    of_q = tl.where(is_less, nearer, nearer - difference)
    of_p = tl.where(is_less, nearer + difference, nearer)
    return of_q, of_p


@triton.jit
def _ratios(log_q, log_p, beta, IN_BITS: tl.constexpr):
    if IN_BITS:
        of_q, of_p = _ratios_in_bits(log_q, log_p, beta)
    else:
        of_q, of_p = _ratios_in_nats(log_q, log_p, beta)
    return of_q, of_p


@triton.jit
def _divergence_kernel(
    x_ptr,  # (M, V) logits, and their gradient
    teacher_ptr,  # (M, V) logits
    coef_ptr,  # (M,) or None: no gradient
    out_ptr,  # (M,) fp32 or None
    stride_xm,
    stride_tm,
    stride_coefm,
    V,
    beta,
    temperature,
    scale,  # of logits in bits: 1 / (temperature * log(2))
    KIND: tl.constexpr,  # 0 forward KL, 1 reverse KL, 2 Jensen-Shannon
    IN_BITS: tl.constexpr,  # powers of two
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * stride_xm
    teacher_ptr += row * stride_tm
    beta = fp32(beta)
    temperature = fp32(temperature)
    scale = fp32(scale)
    low = float("-inf")
    peak_q, total_q = fp32(low), fp32(0.0)
    peak_p, total_p = fp32(low), fp32(0.0)
    for start in range(0, V, BLOCK_V):
        cols = start + tl.arange(0, BLOCK_V)
        x = _load(x_ptr, cols, V, temperature, scale, IN_BITS)
        t = _load(teacher_ptr, cols, V, temperature, scale, IN_BITS)
        peak_q, total_q = _add_block(x, peak_q, total_q, IN_BITS)
        peak_p, total_p = _add_block(t, peak_p, total_p, IN_BITS)
    # Taken off after the peak: a sum of both would round the largest logits away.
    total_q = _log(total_q, IN_BITS)
    total_p = _log(total_p, IN_BITS)
    value = fp32(0.0)
    # sum(q * g)
    mean = fp32(0.0)
    for start in range(0, V, BLOCK_V):
        cols = start + tl.arange(0, BLOCK_V)
        log_q = _load(x_ptr, cols, V, temperature, scale, IN_BITS) - peak_q - total_q
        log_p = _load(teacher_ptr, cols, V, temperature, scale, IN_BITS) - peak_p - total_p
        q = _exp(log_q, IN_BITS)
        p = _exp(log_p, IN_BITS)
        if KIND == 0:
            value += tl.sum(tl.where(p > 0.0, p * (log_p - log_q), 0.0), 0)
        elif KIND == 1:
            value += tl.sum(tl.where(q > 0.0, q * (log_q - log_p), 0.0), 0)
        else:
            of_q, of_p = _ratios(log_q, log_p, beta, IN_BITS)
            mean += tl.sum(tl.where(q > 0.0, (1.0 - beta) * q * of_q, 0.0), 0)
            value += tl.sum(tl.where(p > 0.0, beta * p * of_p, 0.0), 0)
    if KIND == 1:
        mean = value
    if KIND == 2:
        value += mean
    # log(2), in nats
    unit = fp32(0.6931471805599453) if IN_BITS else fp32(1.0)
    if out_ptr is not None:
        tl.store(out_ptr + row, value * unit)
    if coef_ptr is not None:
        coef = tl.load(coef_ptr + row * stride_coefm).to(tl.float32) / temperature
        for start in range(0, V, BLOCK_V):
            cols = start + tl.arange(0, BLOCK_V)
            log_q = _load(x_ptr, cols, V, temperature, scale, IN_BITS) - peak_q - total_q
            log_p = _load(teacher_ptr, cols, V, temperature, scale, IN_BITS) - peak_p - total_p
            q = _exp(log_q, IN_BITS)
            if KIND == 0:
                dx = q - _exp(log_p, IN_BITS)
            elif KIND == 1:
                dx = tl.where(q > 0.0, q * (log_q - log_p - mean), 0.0) * unit
            else:
                of_q, _ = _ratios(log_q, log_p, beta, IN_BITS)
                dx = tl.where(q > 0.0, q * ((1.0 - beta) * of_q - mean), 0.0) * unit
            tl.store(x_ptr + cols, (coef * dx).to(x_ptr.dtype.element_ty), mask=cols < V)


def divergence_rows(
    x: torch.Tensor,
    teacher: torch.Tensor,
    options: DivergenceOptions,
    *,
    coef: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> None:
    """Compute the divergence of each row of logits, and overwrite x with its gradient.

    Args:
        x: Logits (M, V) of the student; rows are packed, at any stride.
        teacher: The same of the teacher, of any floating dtype.
        coef: (M,) the gradients that come in, at any stride; None leaves x as it is.
        out: (M,) fp32 or fp64 to write the divergences to, or None.
    """
    num_rows, vocab = x.shape
    if num_rows == 0:
        return
    if not (runs_triton(x) and runs_triton(teacher)):
        _rows_torch(x, teacher, options, coef, out)
        return
    stride_coef = None if coef is None else coef.stride(0)
    strides = x.stride(0), teacher.stride(0), stride_coef
    least = min(options.beta, 1 - options.beta) if options.kind == _MIXED else 1.0
    in_bits = x.element_size() == teacher.element_size() == 2 and least >= _LEAST_SHARE
    launch = _launch_of(num_rows, vocab, strides, options, in_bits)
    launch(x, teacher, coef, out)


@cache_by_shape
def _launch_of(
    num_rows: int,
    vocab: int,
    strides: tuple[int, int, int | None],
    options: DivergenceOptions,
    in_bits: bool,
) -> Launch:
    block = min(_BLOCK, next_power_of_2(vocab))
    return Launch(
        _divergence_kernel,
        (num_rows,),
        stride_xm=strides[0],
        stride_tm=strides[1],
        stride_coefm=strides[2] or 0,
        V=vocab,
        beta=options.beta,
        temperature=options.temperature,
        scale=1 / (options.temperature * math.log(2)),
        KIND=options.kind,
        IN_BITS=in_bits,
        BLOCK_V=block,
        num_warps=min(_NUM_WARPS, max(1, block // 256)),
    )


def _rows_torch(x, teacher, options, coef, out):
    beta, temperature = options
    wide = torch.float64 if torch.float64 in (x.dtype, teacher.dtype) else torch.float32
    log_q = (x.to(wide) / temperature).log_softmax(-1)
    log_p = (teacher.to(wide) / temperature).log_softmax(-1)
    q, p = log_q.exp(), log_p.exp()
    if options.kind == _FORWARD:
        value = torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1)
        gradient = q - p
    else:
        of_q, of_p = log_q - log_p, None
        if options.kind == _MIXED:
            of_q, of_p = _ratios_torch(of_q, beta)
            of_q = (1 - beta) * of_q
        mean = torch.where(q > 0, q * of_q, 0.0).sum(-1)
        value = mean if of_p is None else mean + torch.where(p > 0, beta * p * of_p, 0.0).sum(-1)
        gradient = torch.where(q > 0, q * (of_q - mean[:, None]), 0.0)
    if out is not None:
        out.copy_(value)
    if coef is not None:
        x.copy_(gradient * (coef.to(wide) / temperature)[:, None])


def _ratios_torch(log_ratio: torch.Tensor, beta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return log(q / m) and log(p / m) from log(q / p), exact where it is 0."""
    inner = torch.expm1(-log_ratio.abs())
    is_less = log_ratio >= 0
    nearer = -torch.log1p(torch.where(is_less, beta, 1 - beta) * inner)
    of_q = torch.where(is_less, nearer, nearer + log_ratio)
    return of_q, torch.where(is_less, nearer - log_ratio, nearer)
