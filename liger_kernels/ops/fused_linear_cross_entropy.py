"""Cross entropy of a linear layer's outputs, without ever making all logits.

    z = softcap * tanh(scale * (hidden @ weight.T + bias) / softcap), then as in row_loss_kernel.py

Legend: N tokens, H hidden width, V vocabulary.
Compute dtype: autocast's under autocast, else the weight's. Hidden (chunk by chunk), weight and
bias are cast to it; gradients come back in each tensor's own dtype.
Rounding: logits are rounded to the compute dtype, as a linear layer's are, and widened to fp32 from
there on; the loss is fp32. The logits' gradient is rounded once, to the compute dtype. The weight
gradient is summed over chunks in fp32, or in bf16 over at most eight (four on a CPU).
Memory: one chunk of logits, and the gradients, made in forward; eager code keeps three copies of
all logits. Tokens without a label are left out before the product. reduction="none" keeps no
logits, but their gradient of hidden where the layer is frozen, and else computes them again.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from liger_kernels.ops.arguments import (
    Flag,
    Instance,
    TensorArgument,
    check_tensors,
)
from liger_kernels.ops.cross_entropy import cross_entropy_ref, random_target
from liger_kernels.ops.losses.autograd import PerTokenLoss, TotalLoss, compiled
from liger_kernels.ops.losses.label_count import LabelCount, count_labels, is_capturing
from liger_kernels.ops.losses.linear_loss import LinearLossCall
from liger_kernels.ops.losses.options import (
    IGNORE_INDEX,
    LOSS_OPTIONS,
    NORMALIZER,
    REDUCTION,
    LossOptions,
    check_class_weight,
    check_linear,
    check_target,
    class_weight_argument,
    has_autocast,
    inverse_of_mean,
    label_argument,
    wide_dtype,
)
from liger_kernels.ops.op import Case, Op, Sample, randn

__all__ = [
    "OP",
    "LabelCount",
    "Stats",
    "count_labels",
    "fused_linear_cross_entropy",
]

# The weight first: all that is moved is moved to its device.
LINEAR_TENSORS = (
    TensorArgument("weight", "(V, H)"),
    TensorArgument("hidden", "(..., H)", is_moved=True),
    TensorArgument("bias", "(V,)", is_optional=True),
)
_TENSORS = (*LINEAR_TENSORS, label_argument("target"), class_weight_argument("class_weight"))
_RETURN_STATS = Flag("return_stats")
_LABEL_COUNT = Instance("label_count", LabelCount, "count_labels")


def linear_ref(hidden, weight, bias):
    bias = None if bias is None else bias.to(weight.dtype)
    return F.linear(hidden.to(weight.dtype), weight, bias)


def fused_linear_cross_entropy_ref(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    class_weight: torch.Tensor | None = None,
    **rest: Any,
) -> torch.Tensor:
    """The definition, in plain torch."""
    return cross_entropy_ref(linear_ref(hidden, weight, bias), target, weight=class_weight, **rest)


class Stats(NamedTuple):
    """Statistics of each token, in target's shape, 0 where ignored; not differentiable."""

    # -log p of the label: without smoothing, class weight or z-loss.
    nll: torch.Tensor
    logprob: torch.Tensor
    # Entropy of the distribution, in nats.
    entropy: torch.Tensor
    # Whether the label has the largest logit; of equal logits the first counts.
    correct: torch.Tensor


def compute_dtype_of(weight):
    kind, dtype = weight.device.type, weight.dtype
    is_cast = has_autocast(weight.device) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if is_cast and dtype != torch.float64 else dtype


def needs_of(*tensors):
    return tuple(t is not None and t.requires_grad and torch.is_grad_enabled() for t in tensors)


def fused_linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    class_weight: torch.Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    scale: float = 1.0,
    reduction: str = "mean",
    normalizer: int | torch.Tensor | None = None,
    return_stats: bool = False,
    label_count: LabelCount | None = None,
) -> torch.Tensor | tuple[torch.Tensor, Stats]:
    """Return the cross entropy of softcap * tanh(scale * (hidden @ weight.T + bias) / softcap).

    Args:
        hidden: (..., H) fp32, bf16 or fp16. Moved to weight's device and, chunk by chunk, cast to
            the compute dtype: autocast's under autocast, else weight's.
        weight: (V, H). If it does not require grad, its gradient is neither computed nor allocated;
            the same holds for hidden and bias.
        target: (...) int32 or int64 labels, not shifted here.
        bias: (V,) or None.
        class_weight: (V,) floating; a mean divides by the sum of the labels' weights.
        ignore_index: Tokens with this label give 0 and are left out before the product; any int.
        label_smoothing: Share of the loss that goes to all classes alike, 0 to 1, as in torch.
        z_loss: Adds z_loss * lse^2 to each token that has a label, under the same denominator.
        softcap: Cap of the logits; None or infinity for none.
        scale: Multiplies the logits before the cap.
        reduction: "mean", "sum", or "none" for the loss of each token, 0 where ignored.
        normalizer: Divides the sum of a mean in place of the count; a number, or a tensor with
            one on any device. 0 counts as 1.
        return_stats: Also return a Stats with a value per token.
        label_count: From count_labels, started earlier, so that nothing is waited for here. An
            upper bound; if target has more labels, the loss and its gradients are NaN.

    Returns:
        The loss, or (loss, Stats). A scalar, or target's shape for "none"; fp32 (fp64 for fp64
        weights). If every label is ignored, 0 with gradients of 0, where torch gives NaN. A label
        out of range gives NaN on a GPU. The gradients are made in forward: a second backward over
        a retained graph raises RuntimeError, except with "none". Differentiable once. On a GPU
        the host waits for the count of labels and for nothing else; while a CUDA graph is
        captured it does not wait, and no token is left out.

    Raises:
        ValueError: a type, shape, dtype, device or option is off, or, on a CPU, a label is out of
            range.
    """
    check_tensors(_TENSORS, weight, hidden, bias, target, class_weight)
    check_linear(hidden, weight, bias)
    vocab = weight.shape[0]
    options = LossOptions.of(ignore_index, label_smoothing, z_loss, softcap, scale)
    REDUCTION.of(reduction)
    normalizer, label_count = NORMALIZER.of(normalizer), _LABEL_COUNT.of(label_count)
    if normalizer is not None and reduction != "mean":
        raise ValueError(f"normalizer is for reduction='mean', got reduction={reduction!r}")
    return_stats = _RETURN_STATS.of(return_stats)
    ignored: Any = options.ignore_index
    check_target(target, hidden.shape[:-1], vocab, ignored, "target")
    check_class_weight(class_weight, vocab, "class_weight")
    # Compiled code counts the labels inside its operator; while a graph is captured all take part.
    is_counted = not torch.compiler.is_compiling() and not is_capturing(weight)
    count = None
    if is_counted:
        # Begun before all else, so that its wait is short.
        count = label_count or count_labels(target, ignored)
    dtype, device = compute_dtype_of(weight), weight.device
    label = target.reshape(-1).to(device, non_blocking=True)
    if class_weight is not None:
        class_weight = class_weight.to(device, wide_dtype(dtype)).contiguous()
    if reduction == "mean":
        inverse = inverse_of_mean(label, ignored, class_weight, wide_dtype(dtype), normalizer)
    else:
        inverse = torch.ones((), dtype=wide_dtype(dtype), device=device)
    if is_counted and label_count is not None:
        is_broken = (label != ignored).sum() > label_count.wait()
        inverse = inverse.masked_fill(is_broken, float("nan"))
    call = LinearLossCall(
        label=label,
        options=options,
        compute_dtype=dtype,
        outputs=("loss", "nll", "entropy", "best") if return_stats else ("loss",),
        differentiable=("loss",),
        needs=needs_of(hidden, weight, bias),
        class_weight=class_weight,
        label_count=count,
        is_per_token=reduction == "none",
    )
    x = hidden.reshape(-1, hidden.shape[-1]).to(device)
    if torch.compiler.is_compiling():
        found = compiled(x, weight, bias, call, None if reduction == "none" else inverse)
    elif reduction == "none":
        found = PerTokenLoss.apply(x, weight, bias, call)
    else:
        found = TotalLoss.apply(x, weight, bias, call, inverse)
    loss, *stats = found
    if reduction == "none":
        # Times 1, or NaN where label_count was too small.
        loss = (loss if label_count is None else loss * inverse).view(target.shape)
    if not return_stats:
        return loss
    nll, entropy, best = (value.view(target.shape) for value in stats)
    # An ignored token has no best class, -1, which may also be ignore_index.
    correct = (best == label.view(target.shape)) & (best >= 0)
    return loss, Stats(nll, -nll, entropy, correct)


def linear_sample(case: Case, dtype, device, generator, options):
    *lead, width, vocab = case.shape
    hidden = randn((*lead, width), dtype, device, generator)
    # Logits of about one unit, as a freshly made head gives.
    size = options.pop("spread", 1.0) * width**-0.5
    weight = randn((vocab, width), dtype, device, generator, scale=size)
    if options.pop("has_bias", False):
        options["bias"] = randn((vocab,), dtype, device, generator)
    return hidden, weight


def _sample(case: Case, dtype, device, generator) -> Sample:
    *lead, _, vocab = case.shape
    options = dict(case.options)
    ignored = options.pop("ignored", 0.3)
    if options.pop("has_class_weight", False):
        options["class_weight"] = (torch.rand(vocab, generator=generator) + 0.5).to(device)
    hidden, weight = linear_sample(case, dtype, device, generator, options)
    target = random_target(tuple(lead), vocab, device, generator, ignored)
    if options.get("ignore_index", IGNORE_INDEX) != IGNORE_INDEX:
        target = target.masked_fill(target == IGNORE_INDEX, options["ignore_index"])
    return Sample((hidden, weight, target), options)


def linear_bytes(case: Case, dtype: torch.dtype) -> tuple[int, int]:
    *lead, width, vocab = case.shape
    size = (torch.Size(lead).numel() + vocab) * width * dtype.itemsize
    return size, size


def _num_flops(case: Case) -> int:
    return 6 * torch.Size(case.shape).numel()


_ALL = {
    "has_bias": True,
    "has_class_weight": True,
    "label_smoothing": 0.1,
    "z_loss": 1e-2,
    "softcap": 3.0,
    "scale": 0.5,
}

OP = Op(
    name="fused_linear_cross_entropy",
    aliases=("flce",),
    summary="Linear layer and cross entropy in chunks: never all logits, none for ignored tokens.",
    function=fused_linear_cross_entropy,
    reference=fused_linear_cross_entropy_ref,
    # Each option alone, then all. The op's own tests run them again in chunks of few tokens.
    cases=(
        Case("tiny", (4, 8, 16)),
        Case("odd", (7, 33, 127)),
        Case("rank-1", (16, 40), {"ignored": 0.0}),
        Case("rank-3", (2, 5, 16, 40), {"ignored": 0.0}),
        Case("bias", (6, 16, 50), {"has_bias": True}),
        Case("class-weight", (6, 16, 50), {"has_class_weight": True}),
        Case("smoothing", (6, 16, 50), {"label_smoothing": 0.1}),
        Case("z-loss", (6, 16, 50), {"z_loss": 1e-2}),
        Case("softcap", (6, 16, 50), {"softcap": 3.0, "spread": 3.0}),
        Case("scale", (6, 16, 50), {"scale": 0.125, "spread": 8.0}),
        Case("sum", (6, 16, 50), {"reduction": "sum"}),
        Case("none", (2, 5, 16, 50), {"reduction": "none"}),
        Case("normalizer", (6, 16, 50), {"normalizer": 11}),
        Case("all", (9, 24, 129), _ALL),
        Case("all-none", (9, 24, 129), {**_ALL, "reduction": "none"}),
        Case("ignore-a-class", (8, 16, 20), {"ignore_index": 0}),
        Case("ignore-past-the-end", (8, 16, 20), {"ignore_index": 20}),
        Case("mostly-ignored", (40, 16, 30), {"ignored": 0.9}),
        Case("all-ignored", (4, 16, 20), {"ignored": 1.0}),
        Case("no-rows", (0, 16, 20)),
        Case("four-blocks", (3, 4, 32768)),
        Case("two-blocks", (3, 4, 41001), {"has_bias": True}),
        Case("real", (4096, 2048, 32000), {"ignored": 0.5}, needs_gpu=True),
        Case("real-wide", (1024, 2304, 256000), {"softcap": 30.0}, needs_gpu=True),
    ),
    sample=_sample,
    num_bytes=linear_bytes,
    num_flops=_num_flops,
    tensors=_TENSORS,
    options=(*LOSS_OPTIONS, NORMALIZER, _RETURN_STATS, _LABEL_COUNT),
)
