"""The answers of deferred logits to torch functions: record it, compute a loss, or need the values.

A recorded operation maps each logit or selects rows: scaling, tanh, casts, views, row indices,
detach. F.cross_entropy goes to loss.py, what other losses are written with to patterns.py. Every
other function gets None here, and its caller materializes the logits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from liger_kernels.transformers.lazy_logits.deferred import DeferredLogits, RecordedOp
from liger_kernels.transformers.lazy_logits.loss import loss_of, nll_of
from liger_kernels.transformers.lazy_logits.patterns import PATTERNS


def respond(
    deferred: DeferredLogits, face: Tensor, function: Callable[..., Any], args: Any, kwargs: Any
) -> DeferredLogits | tuple[DeferredLogits, ...] | Tensor | None:
    """Answer a torch function on deferred logits, or return None if it needs their values.

    Args:
        deferred: The logits.
        face: Their placeholder among args.
        function: A torch function, as __torch_function__ gets it.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
    """
    name = getattr(function, "__name__", "")
    if name == "cross_entropy":
        return loss_of(deferred, face, *args, **kwargs)
    if name == "nll_loss":
        return nll_of(deferred, face, *args, **kwargs)
    pattern = PATTERNS.get(name)
    if pattern is not None:
        is_usual = args[0] is face and deferred.call.op == "fused_linear_cross_entropy"
        if not is_usual or deferred.has_been_made():
            return None
        answer: Any = pattern(deferred, function, args[1:], kwargs)
        return answer
    record = _RECORDERS.get(name)
    if record is None:
        return None
    if args[0] is face:
        return record(deferred, function, args[1:], kwargs)
    return record(deferred, function, args[:1], kwargs) if name == "mul" else None


def _scale(
    deferred: DeferredLogits, function: Any, args: Any, kwargs: Any
) -> DeferredLogits | None:
    if kwargs or len(args) != 1 or deferred.is_log_softmax:
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
    return deferred.then(RecordedOp("scale", function, (number,), factor))


def _tanh(deferred: DeferredLogits, function: Any, args: Any, kwargs: Any) -> DeferredLogits | None:
    if args or kwargs or deferred.is_log_softmax:
        return None
    return deferred.then(RecordedOp("tanh", function))


# As torch has it: a tool may have replaced Tensor.to, and has been called by then.
_TO: Any = torch._C.TensorBase.to
_CASTS = {"float": torch.float32, "half": torch.float16, "bfloat16": torch.bfloat16}


def _cast(deferred: DeferredLogits, function: Any, args: Any, kwargs: Any) -> DeferredLogits | None:
    dtype = _CASTS.get(function.__name__)
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.dtype):
            dtype = value
        elif isinstance(value, (str, torch.device)):
            if torch.device(value) != deferred.rows.device:
                return None
        elif value is not None and value is not False:
            # Another tensor, a memory format, or a forced copy, which may be written to.
            return None
    if dtype is None or dtype == deferred.dtype:
        return deferred
    if not dtype.is_floating_point:
        return None
    return deferred.then(RecordedOp("cast", _TO, (dtype,)), dtype=dtype)


def _contiguous(
    deferred: DeferredLogits, function: Any, args: Any, kwargs: Any
) -> DeferredLogits | None:
    return None if args or kwargs else deferred


def _detach(
    deferred: DeferredLogits, function: Any, args: Any, kwargs: Any
) -> DeferredLogits | None:
    return deferred.then(RecordedOp("detach", function), rows=deferred.rows.detach())


def _view(deferred: DeferredLogits, function: Any, args: Any, kwargs: Any) -> DeferredLogits | None:
    shape = args[0] if len(args) == 1 and isinstance(args[0], Sequence) else args
    if kwargs or not shape or not all(isinstance(size, int) for size in shape):
        return None
    *lead, last = shape
    num_rows = deferred.rows.shape[:-1].numel()
    known = 1
    for size in lead:
        known *= 1 if size == -1 else size
    if -1 in lead:
        is_rows = last == deferred.width and lead.count(-1) == 1 and known and not num_rows % known
    else:
        is_rows = last in (deferred.width, -1) and known == num_rows
    if not is_rows:
        return None
    rows = deferred.rows.reshape(*lead, deferred.rows.shape[-1])
    return deferred.then(RecordedOp("view", function, tuple(args)), rows=rows)


def _flatten(
    deferred: DeferredLogits, function: Any, args: Any, kwargs: Any
) -> DeferredLogits | None:
    start = args[0] if args else kwargs.get("start_dim", 0)
    end = args[1] if len(args) > 1 else kwargs.get("end_dim", -1)
    if end in (-1, deferred.rows.dim() - 1):
        return None
    rows = deferred.rows.flatten(start, end)
    return deferred.then(RecordedOp("view", function, (start, end)), rows=rows)


def _select(
    deferred: DeferredLogits, function: Any, args: Any, kwargs: Any
) -> DeferredLogits | None:
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
    reaches_vocab = num_used == deferred.rows.dim() or (
        any(item is Ellipsis for item in index) and last is not Ellipsis
    )
    if reaches_vocab:
        is_whole = isinstance(last, slice) and (last.start, last.stop, last.step) == (None,) * 3
        if not is_whole:
            return None
    return deferred.then(RecordedOp("rows", function, (args[0],)), rows=deferred.rows[args[0]])


_RECORDERS: Mapping[str, Callable[..., DeferredLogits | None]] = {
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

# Attributes and methods that do not depend on values.
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
    """Return whether a torch function reads only metadata, such as shape and dtype."""
    name = getattr(function, "__name__", "")
    if name == "__get__":
        return getattr(getattr(function, "__self__", None), "__name__", "") in _ATTRIBUTES
    return name in _METADATA
