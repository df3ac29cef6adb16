"""Losses as other people write them, on deferred logits, without materializing these.

    log_softmax, then gather or nll_loss    log-probabilities of labels (nll_loss is in loss.py)
    gather and logsumexp                    their difference is the same; one op computes both
    mean                                    of all logits, or of those of each token

log_softmax is recorded; casts, views and rows may follow it. Every function here returns None where
the logits are needed. Values have the dtype that the logits would have.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from liger_kernels.ops.losses.options import wide_dtype, without_autocast
from liger_kernels.transformers.lazy_logits import loss
from liger_kernels.transformers.lazy_logits.deferred import DeferredLogits, RecordedOp
from liger_kernels.transformers.lazy_logits.logprobs import LogprobRequest, values_of
from liger_kernels.transformers.lazy_logits.sharding import gather as gather_weights

__all__ = ["PATTERNS"]

# One op gives both, with a gradient each, so that a difference of them costs one.
_BOTH = ("logprob", "logsumexp")


def _is_last(deferred: DeferredLogits, dim: Any) -> bool:
    return type(dim) is int and dim in (-1, deferred.rows.dim() - 1)


def _arguments(names: tuple[str, ...], args: Any, kwargs: Any) -> dict[str, Any] | None:
    """Return the arguments that are given by name, or None if there are others."""
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    given.pop("_stacklevel", None)
    return given if len(args) <= len(names) and given.keys() <= set(names) else None


def _log_softmax(
    deferred: DeferredLogits, function: Any, args: Any, kwargs: Any
) -> DeferredLogits | None:
    given = _arguments(("dim", "dtype"), args, kwargs)
    if given is None or deferred.is_log_softmax or not _is_last(deferred, given.get("dim")):
        return None
    dtype = given.get("dtype") or deferred.dtype
    if not dtype.is_floating_point:
        return None
    # All of its arguments, as running_function may return it without defaults.
    call = functools.partial(_called, function, args, kwargs)
    return deferred.then(RecordedOp("log_softmax", call), dtype=dtype)


def _called(function: Any, args: Any, kwargs: Any, logits: Tensor) -> Tensor:
    log_p: Tensor = function(logits, *args, **kwargs)
    return log_p


def _gather(deferred: DeferredLogits, function: Any, args: Any, kwargs: Any) -> Tensor | None:
    given = _arguments(("dim", "index"), args, kwargs)
    index = None if given is None else given.get("index")
    if (
        given is None
        or not _is_last(deferred, given.get("dim"))
        or type(index) is not Tensor
        or index.dtype != torch.int64
        or tuple(index.shape) != (*deferred.shape[:-1], 1)
    ):
        return None
    names = ("logprob",) if deferred.is_log_softmax else _BOTH
    found = values_of(deferred, LogprobRequest(index[..., 0], 1.0, names, None, names))
    if deferred.is_log_softmax:
        chosen: Tensor = found.logprob
    else:
        deferred.lse = found.logsumexp
        chosen = found.logprob + found.logsumexp
    return chosen.to(deferred.dtype)[..., None]


def _logsumexp(deferred: DeferredLogits, function: Any, args: Any, kwargs: Any) -> Tensor | None:
    given = _arguments(("dim", "keepdim"), args, kwargs)
    if given is None or deferred.is_log_softmax:
        return None
    dim = given.get("dim")
    if isinstance(dim, (tuple, list)) and len(dim) == 1:
        dim = dim[0]
    if not _is_last(deferred, dim):
        return None
    lse, needs_grad = deferred.lse, deferred.needs_grad and torch.is_grad_enabled()
    if lse is None or lse.requires_grad != needs_grad:
        target = torch.zeros(deferred.shape[:-1], dtype=torch.int64, device=deferred.rows.device)
        names = ("logsumexp",)
        lse = values_of(deferred, LogprobRequest(target, 1.0, names, None, names)).logsumexp
    else:
        # The other one is a part of what gather returned.
        lse = lse.clone()
    lse = lse.to(deferred.dtype)
    return lse[..., None] if given.get("keepdim") else lse


def _mean(deferred: DeferredLogits, function: Any, args: Any, kwargs: Any) -> Tensor | None:
    given = _arguments(("dim", "keepdim", "dtype"), args, kwargs)
    if given is None or deferred.is_log_softmax or given.get("dtype") is not None:
        return None
    dim = given.get("dim")
    is_whole = dim is None and not given.get("keepdim")
    if not is_whole and not _is_last(deferred, dim):
        return None
    with deferred.as_recorded(deferred.needs_grad and torch.is_grad_enabled()):
        mean = _mean_of_linear(deferred)
    if mean is None:
        if torch.compiler.is_compiling():
            return None
        target = torch.zeros(deferred.shape[:-1], dtype=torch.int64, device=deferred.rows.device)
        names = ("mean_logit",)
        mean = values_of(deferred, LogprobRequest(target, 1.0, names, None, names)).mean_logit
    else:
        deferred.finish_loss(mean)
    if is_whole:
        return mean.mean().to(deferred.dtype)
    mean = mean.to(deferred.dtype)
    return mean[..., None] if given.get("keepdim") else mean


def _mean_of_linear(deferred: DeferredLogits) -> Tensor | None:
    """Return each token's mean logit as a product with the mean of the weight, or None."""
    gather_weights(deferred.head)
    linear = loss.linear_of(deferred)
    transform = loss.transform_of(deferred.arithmetic())
    if linear is None or transform is None or transform.softcap is not None:
        return None
    wide = wide_dtype(linear.weight.dtype)
    with without_autocast(deferred.rows.device):
        mean = deferred.rows.to(wide) @ linear.weight.mean(0, dtype=wide)
        if linear.bias is not None:
            mean = mean + linear.bias.mean(dtype=wide)
        return mean * transform.scale


def _unbind(
    deferred: DeferredLogits, function: Any, args: Any, kwargs: Any
) -> tuple[DeferredLogits, ...] | None:
    given = _arguments(("dim",), args, kwargs)
    if given is None or given.get("dim", 0) != 0 or deferred.rows.dim() < 3:
        return None
    return tuple(
        deferred.then(RecordedOp("rows", operator.getitem, (i,)), rows=deferred.rows[i])
        for i in range(len(deferred.rows))
    )


# By name of a torch function whose first argument the logits are.
PATTERNS: Mapping[str, Callable[..., Any]] = {
    "log_softmax": _log_softmax,
    "gather": _gather,
    "logsumexp": _logsumexp,
    "mean": _mean,
    "unbind": _unbind,
}
