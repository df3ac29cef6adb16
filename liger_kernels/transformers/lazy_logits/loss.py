"""The cross entropy of deferred logits, without materializing them.

Three routes for F.cross_entropy:
  fused    the head is a plain linear layer, and the recorded operations are a scale and a softcap:
           fused_linear_cross_entropy, which under torch.compile is one operator of the graph
  chunked  any other head (LoRA, quantised) or arithmetic: the stock operations on a bounded number
           of tokens at a time, recomputed in backward; not under torch.compile
  real     anything else (probabilities as target, the (B, V, T) form): None, and the caller
           materializes the logits
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from liger_kernels.ops.arguments import LARGEST
from liger_kernels.ops.cross_entropy import cross_entropy
from liger_kernels.ops.fused_linear_cross_entropy import fused_linear_cross_entropy
from liger_kernels.ops.losses.options import IGNORE_INDEX
from liger_kernels.transformers.lazy_logits.callers import is_stock_loss
from liger_kernels.transformers.lazy_logits.deferred import (
    DeferredLogits,
    RecordedOp,
    active_layer,
    same_layout,
    weights_of,
)
from liger_kernels.transformers.lazy_logits.sharding import gather
from liger_kernels.transformers.replacements.calls import runs_stock_linear


@dataclass(frozen=True)
class LogitTransform:
    """The recorded arithmetic in closed form: softcap * tanh(scale * logits / softcap)."""

    scale: float = 1.0
    # None: no cap, scale * logits.
    softcap: float | None = None


# Logits the chunked route makes at a time: 256 MiB in fp32, and as much again for the gradient.
CHUNK_ELEMENTS = 2**26


def loss_of(
    deferred: DeferredLogits,
    face: Tensor,
    input: Any,
    target: Any,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = IGNORE_INDEX,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor | None:
    """Compute F.cross_entropy of deferred logits, or return None if it needs the real ones."""
    options = {
        "ignore_index": ignore_index,
        "label_smoothing": label_smoothing,
        "reduction": reduction,
    }
    is_usual = input is face and size_average is None and reduce is None
    if not is_usual or deferred.is_log_softmax:
        return None
    return _cross_entropy(deferred, target, weight, options)


def nll_of(
    deferred: DeferredLogits,
    face: Tensor,
    input: Any,
    target: Any,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = IGNORE_INDEX,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor | None:
    """Compute F.nll_loss of a log-softmax of deferred logits: it is their cross entropy."""
    options = {"ignore_index": ignore_index, "label_smoothing": 0.0, "reduction": reduction}
    is_usual = input is face and size_average is None and reduce is None
    if not is_usual or not deferred.is_log_softmax:
        return None
    return _cross_entropy(deferred, target, weight, options)


def _cross_entropy(
    deferred: DeferredLogits, target: Any, weight: Tensor | None, options: dict[str, Any]
) -> Tensor | None:
    is_usual = (
        deferred.rows.dim() == 2
        and type(target) is Tensor
        and target.shape == deferred.rows.shape[:1]
        and target.dtype == torch.int64
        and options["reduction"] in ("mean", "sum", "none")
    )
    is_fused = deferred.call.op == "fused_linear_cross_entropy"
    if not is_usual or (is_fused and deferred.has_been_made()):
        return None
    target = target.to(deferred.rows.device)
    with deferred.as_recorded(deferred.needs_grad and torch.is_grad_enabled()):
        if is_fused:
            loss = _loss_without_logits(deferred, target, weight, options)
        else:
            loss = cross_entropy(_before_upcast(deferred), target, weight=weight, **options)
    if loss is not None:
        deferred.finish_loss(loss)
    return loss


def _loss_without_logits(
    deferred: DeferredLogits, target: Tensor, weight: Tensor | None, options: dict[str, Any]
) -> Tensor | None:
    gather(deferred.head)
    linear = linear_of(deferred)
    transform = transform_of(deferred.arithmetic())
    if linear is None or transform is None:
        if torch.compiler.is_compiling():
            return None
        return _chunked_loss(deferred, target, weight, **options)
    call = deferred.call
    is_bounded = target.numel() == call.num_targets and options["ignore_index"] == IGNORE_INDEX
    if call.label_count is not None and is_bounded and is_stock_loss():
        # Shifting and masking only take labels away, so the count of all is an upper bound. A loss
        # of anybody else may have other targets, and is counted by the op, which waits for it.
        options = {**options, "label_count": call.label_count}
    loss: Any = fused_linear_cross_entropy(
        deferred.rows,
        linear.weight,
        target,
        bias=linear.bias,
        class_weight=weight,
        softcap=transform.softcap,
        scale=transform.scale,
        **options,
    )
    return loss


def _label_total(target: Tensor, weight: Tensor | None, ignore_index: int) -> Tensor:
    """Return the denominator of a mean; 1 without labels, for a loss of 0 where torch has NaN."""
    is_label = target != ignore_index
    total = (is_label if weight is None else weight[target * is_label] * is_label).sum()
    return torch.where(total > 0, total, 1)


def transform_of(ops: list[RecordedOp]) -> LogitTransform | None:
    """Fold the recorded arithmetic into one scale and one softcap, or return None.

    Casts drop out: the fused op keeps fp32 from the product to the loss.
    """
    scale, softcap = 1.0, None
    for op in ops:
        if op.kind == "tanh":
            if softcap is not None:
                return None
            softcap = 1.0
        elif op.kind == "scale":
            if op.factor is None:
                return None
            if softcap is None:
                scale *= op.factor
            else:
                softcap *= op.factor
    if softcap is not None:
        scale *= softcap
    # The fused op takes finite numbers; with others the stock operations run.
    is_finite = abs(scale) <= LARGEST and (softcap is None or 0.0 < softcap <= LARGEST)
    return LogitTransform(scale, softcap) if is_finite else None


def _before_upcast(deferred: DeferredLogits) -> Tensor:
    """Materialize the logits without a last upcast, which the op does in registers."""
    parent, op = deferred.parent, deferred.last_op
    if parent is not None and op is not None:
        if op.kind == "cast" and deferred.dtype.itemsize >= parent.dtype.itemsize:
            return _before_upcast(parent)
        if op.kind == "view":
            return op.apply(_before_upcast(parent))
    return deferred.real()


def linear_of(deferred: DeferredLogits) -> Any:
    """Return the plain linear layer that alone computes the head's output, or None."""
    head = deferred.head
    leaf: Any = active_layer(head)
    # The hooks of the head itself have run; those of a layer inside it run only through the head.
    if leaf is not head and (leaf._forward_hooks or leaf._forward_pre_hooks):
        return None
    if not runs_stock_linear(leaf) or "forward" in leaf.__dict__:
        return None
    if type(leaf.weight) not in (nn.Parameter, Tensor):
        return None
    return leaf if same_layout(deferred.weights, weights_of(head)) else None


def _chunked_loss(
    deferred: DeferredLogits,
    target: Tensor,
    weight: Tensor | None,
    *,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
) -> Tensor:
    loss_of = functools.partial(
        _chunk_loss,
        deferred,
        weight,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction="none" if reduction == "none" else "sum",
    )
    size = max(1, CHUNK_ELEMENTS // deferred.width)
    chunks = zip(deferred.rows.split(size), target.split(size), strict=True)
    # Checkpointed: a chunk's logits live until its loss is known, and once more in its backward.
    losses = [checkpoint(loss_of, rows, labels, use_reentrant=False) for rows, labels in chunks]
    if reduction == "none":
        return torch.cat(losses)
    total = torch.stack(losses).sum()
    if reduction == "sum":
        return total
    return total / _label_total(target, weight, ignore_index)


def _chunk_loss(
    deferred: DeferredLogits, weight: Tensor | None, rows: Tensor, target: Tensor, **options: Any
) -> Tensor:
    logits = deferred.head_output(rows)
    for op in deferred.arithmetic():
        logits = op.apply(logits)
    wide = torch.promote_types(logits.dtype, torch.float32)
    weight = None if weight is None else weight.to(wide)
    return F.cross_entropy(logits.to(wide), target, weight, **options)
