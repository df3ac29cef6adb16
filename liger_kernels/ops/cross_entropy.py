"""Cross entropy of given logits.

    z = softcap * tanh(scale * logits / softcap),  lse = log sum_j exp z_j,  nll = lse - z_y
    loss = (1 - s) * w_y * nll + s / V * sum_j w_j * (lse - z_j) + z_loss * lse^2

Legend: M rows, V vocabulary, y label, w class weights, s label smoothing.
Rounding: everything after the logits is fp32, and so is the loss; the gradient is rounded once, to
the logits' dtype.
Memory: the gradient, made in forward in a separate buffer; eager code keeps the logits in fp32
and their log-softmax too. With reduction="none" the logits are kept instead and read again in
backward.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from liger_kernels.ops.arguments import TensorArgument, check_tensors
from liger_kernels.ops.autograd import differentiable_once
from liger_kernels.ops.losses.grads_in_forward import (
    backward_grad_scale,
    forward_grad_scale,
    scaled,
    second_backward_error,
)
from liger_kernels.ops.losses.options import (
    IGNORE_INDEX,
    LOSS_OPTIONS,
    REDUCTION,
    LossOptions,
    check_class_weight,
    check_target,
    class_weight_argument,
    inverse_of_mean,
    label_argument,
    wide_dtype,
)
from liger_kernels.ops.losses.row_loss import loss_rows
from liger_kernels.ops.op import Case, Op, Sample, lay_out, randn, traffic, upcast
from liger_kernels.ops.rows import rows_of

_TENSORS = (
    TensorArgument("logits", "(..., V)"),
    label_argument("target"),
    class_weight_argument("weight"),
)


def cross_entropy_ref(
    logits: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    scale: float = 1.0,
    reduction: str = "mean",
    normalizer: Any = None,
) -> Tensor:
    """The definition, in plain torch; F.cross_entropy for what torch has."""
    z = upcast(logits).reshape(-1, logits.shape[-1]) * scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    label = target.flatten().long()
    loss = F.cross_entropy(
        z,
        label,
        weight,
        ignore_index=ignore_index,
        reduction="none",
        label_smoothing=label_smoothing,
    )
    valid = label != ignore_index
    loss = loss + valid * z_loss * z.logsumexp(-1).square()
    if reduction == "none":
        return loss.view(target.shape)
    if reduction == "sum":
        return loss.sum()
    count: Any = valid.sum() if weight is None else weight[label[valid]].sum()
    count = count if normalizer is None else normalizer
    return loss.sum() / (count if count else 1)


@dataclass(frozen=True)
class _Call:
    label: torch.Tensor  # (M,)
    options: LossOptions
    class_weight: torch.Tensor | None  # (V,) in the wide dtype
    needs_grad: bool
    # () what the sum of the losses is times, or None for the loss of each row.
    inverse: torch.Tensor | None


def _cross_entropy_fwd(x, call):
    """Return the loss, and the gradient of a sum before backward_grad_scale, if it is needed."""
    losses = torch.empty(x.shape[0], dtype=wide_dtype(x.dtype), device=x.device)
    kwargs = {"class_weight": call.class_weight, "loss": losses}
    if call.inverse is None:
        loss_rows(x, call.label, call.options, **kwargs)
        return losses, None
    coef = forward_grad_scale(call.inverse, x.dtype).expand(x.shape[:1])
    dx = _empty_rows(x) if call.needs_grad else None
    loss_rows(x, call.label, call.options, coef=coef, dx=dx, **kwargs)
    return losses.sum() * call.inverse, dx


def _cross_entropy_bwd(dy, x, call):
    """Return the gradient from that of each row's loss."""
    dx = _empty_rows(x)
    loss_rows(x, call.label, call.options, class_weight=call.class_weight, coef=dy, dx=dx)
    return dx


def _empty_rows(x):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@differentiable_once("cross_entropy")
class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, call: _Call):
        loss, ctx.dx = _cross_entropy_fwd(x, call)
        ctx.call, ctx.dtype = call, x.dtype
        if call.inverse is None:
            ctx.save_for_backward(x)
        return loss

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor):
        if ctx.call.inverse is None:
            (x,) = ctx.saved_tensors
            return _cross_entropy_bwd(dy, x, ctx.call), None
        if ctx.dx is None:
            raise second_backward_error("cross_entropy")
        dx, ctx.dx = ctx.dx, None
        return scaled(dx, backward_grad_scale(dy, ctx.call.inverse, ctx.dtype), ctx.dtype), None


# torch.compile does not look into an operator: inside, the kernels run as in eager code.
@torch.library.custom_op("liger_kernels::cross_entropy", mutates_args=())
def _cross_entropy_op(
    x: Tensor,
    label: Tensor,
    class_weight: Tensor | None,
    inverse: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    scale: float,
    needs_grad: bool,
) -> list[Tensor]:
    options = LossOptions(ignore_index, label_smoothing, z_loss, softcap, scale)
    loss, dx = _cross_entropy_fwd(x, _Call(label, options, class_weight, needs_grad, inverse))
    return [loss] if dx is None else [loss, dx]


@_cross_entropy_op.register_fake
def _(x, label, class_weight, inverse, *options_and_needs_grad):
    loss = x.new_empty(label.shape if inverse is None else (), dtype=wide_dtype(x.dtype))
    has_dx = inverse is not None and options_and_needs_grad[-1]
    return [loss, _empty_rows(x)] if has_dx else [loss]


@torch.library.custom_op("liger_kernels::cross_entropy_backward", mutates_args=())
def _cross_entropy_backward_op(
    dy: Tensor,
    x: Tensor,
    label: Tensor,
    class_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    scale: float,
) -> Tensor:
    options = LossOptions(ignore_index, label_smoothing, z_loss, softcap, scale)
    return _cross_entropy_bwd(dy, x, _Call(label, options, class_weight, True, None))


@_cross_entropy_backward_op.register_fake
def _(dy, x, *rest):
    return _empty_rows(x)


def _setup(ctx, inputs, output):
    x, label, class_weight, inverse, *ctx.options, _ = inputs
    saved = (x, label, class_weight) if inverse is None else (output[1], inverse)
    ctx.save_for_backward(*saved)
    ctx.is_per_row = inverse is None


def _backward(ctx, dys):
    if ctx.is_per_row:
        dx = _cross_entropy_backward_op(dys[0], *ctx.saved_tensors, *ctx.options)
    else:
        dx, inverse = ctx.saved_tensors
        dx = (dx * backward_grad_scale(dys[0], inverse, dx.dtype)).to(dx.dtype)
    return dx, *[None] * 9


_cross_entropy_op.register_autograd(_backward, setup_context=_setup)


def cross_entropy(
    logits: torch.Tensor,
    target: torch.Tensor,
    *,
    weight: torch.Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    scale: float = 1.0,
    reduction: str = "mean",
) -> torch.Tensor:
    """Return the cross entropy of softcap * tanh(scale * logits / softcap) and the labels, in fp32.

    Args:
        logits: (..., V) fp32, bf16 or fp16; classes last, unlike F.cross_entropy. Rows may lie at
            any stride; leading dimensions that do not merge into one cost a copy.
        target: (...) int32 or int64.
        weight: (V,) floating class weights; a mean divides by the sum of the labels' weights.
        ignore_index: Rows with this label give 0; any int, also one that is a class.
        label_smoothing: Share of the loss that goes to all classes alike, 0 to 1, as in torch.
        z_loss: Adds z_loss * lse^2 to each row that has a label, under the same denominator.
        softcap: Cap of the logits; None or infinity for none.
        scale: Multiplies the logits before the cap.
        reduction: "mean", "sum", or "none" for the loss of each row, 0 where ignored.

    Returns:
        A scalar, or target's shape for "none"; fp32 (fp64 for fp64 logits). If every label is
        ignored, 0 with gradients of 0, where torch gives NaN. A label out of range gives NaN on a
        GPU. The gradient has the logits' dtype. It is made in forward: a second backward over a
        retained graph raises RuntimeError, except with "none". Differentiable once.

    Raises:
        ValueError: a type, shape, dtype, device or option is off, or, on a CPU, a label is out of
            range.
    """
    check_tensors(_TENSORS, logits, target, weight)
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(
            "logits must be floating (..., V) with a class at least, "
            f"got {logits.dtype} {tuple(logits.shape)}"
        )
    vocab = logits.shape[-1]
    options = LossOptions.of(ignore_index, label_smoothing, z_loss, softcap, scale)
    REDUCTION.of(reduction)
    check_target(target, logits.shape[:-1], vocab, options.ignore_index, "target")
    check_class_weight(weight, vocab, "weight")
    x, dtype = rows_of(logits), wide_dtype(logits.dtype)
    label = target.reshape(-1).to(x.device, non_blocking=True)
    if weight is not None:
        weight = weight.to(x.device, dtype).contiguous()
    inverse = None
    if reduction == "mean":
        inverse = inverse_of_mean(label, options.ignore_index, weight, dtype)
    elif reduction == "sum":
        inverse = torch.ones((), dtype=dtype, device=x.device)
    needs_grad = logits.requires_grad and torch.is_grad_enabled()
    if torch.compiler.is_compiling():
        o = options
        fields = (o.ignore_index, o.label_smoothing, o.z_loss, o.softcap, o.scale)
        loss = _cross_entropy_op(x, label, weight, inverse, *fields, needs_grad)[0]
    else:
        loss = _CrossEntropy.apply(x, _Call(label, options, weight, needs_grad, inverse))
    return loss.view(target.shape) if reduction == "none" else loss


def random_target(
    shape: tuple[int, ...],
    vocab: int,
    device: torch.device,
    generator: torch.Generator,
    ignored: float,
) -> torch.Tensor:
    """Return labels of which about the share `ignored` is -100."""
    target = torch.randint(0, vocab, shape, generator=generator)
    hidden = torch.rand(shape, generator=generator) < ignored
    return target.masked_fill(hidden, IGNORE_INDEX).to(device)


def _sample(case: Case, dtype, device, generator) -> Sample:
    *lead, vocab = case.shape
    options = dict(case.options)
    ignored = options.pop("ignored", 0.3)
    layout = options.pop("layout", "contiguous")
    label_dtype = options.pop("label_dtype", torch.int64)
    spread = options.pop("spread", 2.0)
    if options.pop("has_weight", False):
        weight = torch.rand(vocab, generator=generator) + 0.5
        options["weight"] = weight.to(device)
    x = lay_out(randn(case.shape, dtype, device, generator, scale=spread), layout)
    target = random_target(tuple(lead), vocab, device, generator, ignored).to(label_dtype)
    if options.get("ignore_index", IGNORE_INDEX) != IGNORE_INDEX:
        target = target.masked_fill(target == IGNORE_INDEX, options["ignore_index"])
    return Sample((x, target), options)


_ALL = {"has_weight": True, "label_smoothing": 0.1, "z_loss": 1e-2, "softcap": 3.0, "scale": 0.5}

OP = Op(
    name="cross_entropy",
    aliases=("ce",),
    summary="Cross entropy of given logits; keeps their gradient instead of three fp32 copies.",
    function=cross_entropy,
    reference=cross_entropy_ref,
    # Each option alone, then all; vocabularies of one block of a program and of several.
    cases=(
        Case("tiny", (3, 8)),
        Case("odd", (5, 127)),
        Case("rank-1", (9,), {"ignored": 0.0}),
        Case("rank-3", (2, 3, 40), {"reduction": "none"}),
        Case("int32", (4, 33), {"label_dtype": torch.int32}),
        Case("strided", (4, 65), {"layout": "strided"}),
        Case("class-weight", (6, 50), {"has_weight": True}),
        Case("class-weight-sum", (6, 50), {"has_weight": True, "reduction": "sum"}),
        Case("smoothing", (6, 50), {"label_smoothing": 0.1}),
        Case("smoothing-class-weight", (6, 50), {"label_smoothing": 0.2, "has_weight": True}),
        Case("z-loss", (6, 50), {"z_loss": 1e-2}),
        Case("softcap", (6, 50), {"softcap": 3.0, "spread": 4.0}),
        Case("scale", (6, 50), {"scale": 0.125, "spread": 8.0}),
        Case("all", (7, 129), _ALL),
        Case("all-none", (7, 129), {**_ALL, "reduction": "none"}),
        Case("ignore-a-class", (8, 20), {"ignore_index": 0}),
        Case("ignore-past-the-end", (8, 20), {"ignore_index": 20}),
        Case("all-ignored", (4, 20), {"ignored": 1.0}),
        Case("no-rows", (0, 20)),
        Case("one-block", (3, 8192), {"spread": 1.0}),
        Case("two-blocks", (3, 8193)),
        Case("three-blocks-all", (3, 16385), _ALL),
        Case("eight-blocks", (3, 65537), {"label_smoothing": 0.1}),
        Case("real", (4096, 32000), needs_gpu=True),
        Case("real-wide", (256, 262208), _ALL, needs_gpu=True),
    ),
    sample=_sample,
    num_bytes=traffic(1, 2),
    tensors=_TENSORS,
    options=LOSS_OPTIONS,
)
