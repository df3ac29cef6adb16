"""What torch functions do to pending logits: record an operation, compute a loss, or need numbers.

Three routes for F.cross_entropy:
  fused    the head is a plain linear layer, and what follows is a scale and a softcap: the fused op
  chunked  any other head (LoRA, quantised) or arithmetic: the stock operations on a bounded number
           of tokens at a time, computed again in backward
  real     anything else (probabilities as target, the (B, V, T) form): None, so logits are made
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from liger_kernels.ops.arguments import LARGEST
from liger_kernels.ops.cross_entropy import cross_entropy
from liger_kernels.ops.fused_linear_cross_entropy import fused_linear_cross_entropy
from liger_kernels.transformers.lazy_logits.deferred import (
    IGNORE_INDEX,
    Pending,
    Step,
    active_layer,
    same_layout,
    weights_of,
)
from liger_kernels.transformers.lazy_logits.sharding import gather
from liger_kernels.transformers.recognise import Tail
from liger_kernels.transformers.replacements.calls import runs_stock_linear

# Logits the chunked route makes at a time: 256 MiB in fp32, and as much again for the gradient.
_CHUNK_ELEMENTS = 2**26


def respond(
    pending: Pending, face: Tensor, function: Callable[..., Any], args: Any, kwargs: Any
) -> Pending | Tensor | None:
    """Return what `function` makes of pending logits, or None if it needs their values.

    Args:
        pending: The logits.
        face: The tensor that stands for them among args.
        function: A torch function, as __torch_function__ gets it.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
    """
    name = getattr(function, "__name__", "")
    if name == "cross_entropy":
        return _loss(pending, face, *args, **kwargs)
    record = _RECORDERS.get(name)
    if record is None:
        return None
    if args[0] is face:
        return record(pending, function, args[1:], kwargs)
    return record(pending, function, args[:1], kwargs) if name == "mul" else None


def _scale(pending: Pending, function: Any, args: Any, kwargs: Any) -> Pending | None:
    if kwargs or len(args) != 1:
        return None
    number = args[0]
    factor: float | None = None
    if isinstance(number, Tensor):
        # A learned scale needs its gradient, and a tensor of several numbers is no scale.
        if type(number) is not Tensor or number.dim() or number.requires_grad:
            return None
        if number.device.type == "cpu" and not torch.compiler.is_compiling():
            factor = float(number.item())
    elif isinstance(number, (int, float)):
        factor = float(number)
    else:
        return None
    if function.__name__ != "mul" and factor is not None:
        if factor == 0.0:
            return None
        factor = 1.0 / factor
    return pending.then(Step("scale", function, (number,), factor))


def _tanh(pending: Pending, function: Any, args: Any, kwargs: Any) -> Pending | None:
    return None if args or kwargs else pending.then(Step("tanh", torch.tanh))


_CASTS = {"float": torch.float32, "half": torch.float16, "bfloat16": torch.bfloat16}


def _cast(pending: Pending, function: Any, args: Any, kwargs: Any) -> Pending | None:
    dtype = _CASTS.get(function.__name__)
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.dtype):
            dtype = value
        elif isinstance(value, (str, torch.device)):
            if torch.device(value) != pending.rows.device:
                return None
        elif value is not None and value is not False:
            # Another tensor, a memory format, or a forced copy, which may be written to.
            return None
    if dtype is None or dtype == pending.dtype:
        return pending
    if not dtype.is_floating_point:
        return None
    return pending.then(Step("cast", Tensor.to, (dtype,)), dtype=dtype)


def _contiguous(pending: Pending, function: Any, args: Any, kwargs: Any) -> Pending | None:
    return None if args or kwargs else pending


def _detach(pending: Pending, function: Any, args: Any, kwargs: Any) -> Pending | None:
    return pending.then(Step("detach", torch.detach), rows=pending.rows.detach())


def _view(pending: Pending, function: Any, args: Any, kwargs: Any) -> Pending | None:
    shape = args[0] if len(args) == 1 and isinstance(args[0], Sequence) else args
    if kwargs or not shape or not all(isinstance(size, int) for size in shape):
        return None
    *lead, last = shape
    num_rows = pending.rows.shape[:-1].numel()
    known = 1
    for size in lead:
        known *= 1 if size == -1 else size
    if -1 in lead:
        is_rows = last == pending.width and lead.count(-1) == 1 and known and not num_rows % known
    else:
        is_rows = last in (pending.width, -1) and known == num_rows
    if not is_rows:
        return None
    rows = pending.rows.reshape(*lead, pending.rows.shape[-1])
    return pending.then(Step("view", function, tuple(args)), rows=rows)


def _flatten(pending: Pending, function: Any, args: Any, kwargs: Any) -> Pending | None:
    start = args[0] if args else kwargs.get("start_dim", 0)
    end = args[1] if len(args) > 1 else kwargs.get("end_dim", -1)
    if end in (-1, pending.rows.dim() - 1):
        return None
    rows = pending.rows.flatten(start, end)
    return pending.then(Step("view", torch.flatten, (start, end)), rows=rows)


def _select(pending: Pending, function: Any, args: Any, kwargs: Any) -> Pending | None:
    """Record an index that leaves the vocabulary whole, such as logits[..., :-1, :]."""
    index = args[0] if isinstance(args[0], tuple) else (args[0],)
    num_used = 0
    for item in index:
        if type(item) is Tensor and item.dtype in (torch.bool, torch.int64):
            num_used += item.dim() if item.dtype == torch.bool else 1
        elif isinstance(item, (int, slice)) and not isinstance(item, bool):
            num_used += 1
        elif item is not Ellipsis:
            return None
    last = index[-1] if index else Ellipsis
    reaches_vocab = num_used == pending.rows.dim() or (
        any(item is Ellipsis for item in index) and last is not Ellipsis
    )
    if reaches_vocab:
        is_whole = isinstance(last, slice) and (last.start, last.stop, last.step) == (None,) * 3
        if not is_whole:
            return None
    return pending.then(Step("rows", function, (args[0],)), rows=pending.rows[args[0]])


_RECORDERS: Mapping[str, Callable[..., Pending | None]] = {
    "mul": _scale,
    "div": _scale,
    "true_divide": _scale,
    "tanh": _tanh,
    "float": _cast,
    "half": _cast,
    "bfloat16": _cast,
    "to": _cast,
    "contiguous": _contiguous,
    "detach": _detach,
    "view": _view,
    "reshape": _view,
    "flatten": _flatten,
    "__getitem__": _select,
}

# What a tensor tells about itself without a look at its numbers.
# fmt: off
_METADATA = frozenset((
    "size", "dim", "ndimension", "stride", "numel", "nelement", "element_size", "is_floating_point",
    "is_complex", "is_contiguous", "get_device", "__len__",
))
_ATTRIBUTES = frozenset((
    "shape", "dtype", "device", "layout", "ndim", "requires_grad", "grad_fn", "is_leaf", "is_cuda",
    "is_cpu", "is_xpu", "is_mps", "is_meta", "is_sparse", "is_quantized", "is_nested", "itemsize",
    "nbytes", "names", "output_nr", "_base",
))
# fmt: on


def is_metadata(function: Callable[..., Any]) -> bool:
    """Return whether a torch function asks for nothing but shape, dtype and their like."""
    name = getattr(function, "__name__", "")
    if name == "__get__":
        return getattr(getattr(function, "__self__", None), "__name__", "") in _ATTRIBUTES
    return name in _METADATA


def _loss(
    pending: Pending,
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
    """F.cross_entropy of pending logits, or None where only real logits will do."""
    is_usual = (
        input is face
        and pending.rows.dim() == 2
        and type(target) is Tensor
        and target.shape == pending.rows.shape[:1]
        and target.dtype == torch.int64
        and size_average is None
        and reduce is None
        and reduction in ("mean", "sum", "none")
    )
    is_fused = pending.call.op == "fused_linear_cross_entropy"
    if not is_usual or (is_fused and pending.has_been_made()):
        return None
    options: dict[str, Any] = {
        "ignore_index": ignore_index,
        "label_smoothing": label_smoothing,
        "reduction": reduction,
    }
    target = target.to(pending.rows.device)
    with pending.as_recorded(pending.needs_grad and torch.is_grad_enabled()):
        if is_fused:
            loss = _loss_without_logits(pending, target, weight, options)
        else:
            loss = cross_entropy(_before_upcast(pending), target, weight=weight, **options)
    if loss is not None:
        pending.finish_loss(loss)
    return loss


def _loss_without_logits(
    pending: Pending, target: Tensor, weight: Tensor | None, options: dict[str, Any]
) -> Tensor | None:
    gather(pending.head)
    linear = _linear_of(pending)
    tail = _tail_of(pending.arithmetic())
    if linear is None or tail is None:
        if torch.compiler.is_compiling():
            return None
        return _chunked_loss(pending, target, weight, **options)
    call = pending.call
    is_bounded = target.numel() == call.num_targets and options["ignore_index"] == IGNORE_INDEX
    if call.label_count is not None and is_bounded:
        # Shifting and masking only take labels away, so the count of all is an upper bound.
        options = {**options, "label_count": call.label_count}
    loss: Any = fused_linear_cross_entropy(
        pending.rows,
        linear.weight,
        target,
        bias=linear.bias,
        class_weight=weight,
        softcap=tail.softcap,
        scale=tail.scale,
        **options,
    )
    return loss


def _label_total(target: Tensor, weight: Tensor | None, ignore_index: int) -> Tensor:
    """What a mean divides by; 1 if there is no label, for a loss of 0 where torch gives NaN."""
    is_label = target != ignore_index
    total = (is_label if weight is None else weight[target * is_label] * is_label).sum()
    return torch.where(total > 0, total, 1)


def _tail_of(steps: list[Step]) -> Tail | None:
    """The recorded arithmetic as one scale and one softcap, if it is that.

    Casts drop out: the fused op keeps fp32 from the product to the loss.
    """
    scale, softcap = 1.0, None
    for step in steps:
        if step.kind == "tanh":
            if softcap is not None:
                return None
            softcap = 1.0
        elif step.kind == "scale":
            if step.factor is None:
                return None
            if softcap is None:
                scale *= step.factor
            else:
                softcap *= step.factor
    if softcap is not None:
        scale *= softcap
    # The fused op takes finite numbers; with others the stock operations give what they give.
    is_finite = abs(scale) <= LARGEST and (softcap is None or 0.0 < softcap <= LARGEST)
    return Tail(scale, softcap) if is_finite else None


def _before_upcast(pending: Pending) -> Tensor:
    """The real logits without a last cast to a wider dtype, which the op does in registers."""
    parent, step = pending.parent, pending.step
    if parent is not None and step is not None:
        if step.kind == "cast" and pending.dtype.itemsize >= parent.dtype.itemsize:
            return _before_upcast(parent)
        if step.kind == "view":
            return step.apply(_before_upcast(parent))
    return pending.real()


def _linear_of(pending: Pending) -> Any:
    """The plain linear layer that alone makes the head's output, or None."""
    head = pending.head
    leaf: Any = active_layer(head)
    # The hooks of the head itself have run; those of a layer inside it run only through the head.
    if leaf is not head and (leaf._forward_hooks or leaf._forward_pre_hooks):
        return None
    if not runs_stock_linear(leaf) or "forward" in leaf.__dict__:
        return None
    if type(leaf.weight) not in (nn.Parameter, Tensor):
        return None
    return leaf if same_layout(pending.weights, weights_of(head)) else None


def _chunked_loss(
    pending: Pending,
    target: Tensor,
    weight: Tensor | None,
    *,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
) -> Tensor:
    loss_of = functools.partial(
        _chunk_loss,
        pending,
        weight,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction="none" if reduction == "none" else "sum",
    )
    size = max(1, _CHUNK_ELEMENTS // pending.width)
    chunks = zip(pending.rows.split(size), target.split(size), strict=True)
    # Checkpointed: a chunk's logits live until its loss is known, and once more in its backward.
    losses = [checkpoint(loss_of, rows, labels, use_reentrant=False) for rows, labels in chunks]
    if reduction == "none":
        return torch.cat(losses)
    total = torch.stack(losses).sum()
    if reduction == "sum":
        return total
    return total / _label_total(target, weight, ignore_index)


def _chunk_loss(
    pending: Pending, weight: Tensor | None, rows: Tensor, target: Tensor, **options: Any
) -> Tensor:
    logits = pending.head_output(rows)
    for step in pending.arithmetic():
        logits = step.apply(logits)
    wide = torch.promote_types(logits.dtype, torch.float32)
    weight = None if weight is None else weight.to(wide)
    return F.cross_entropy(logits.to(wide), target, weight, **options)
