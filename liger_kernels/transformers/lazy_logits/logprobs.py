"""The log-probabilities of deferred logits, computed inside of the model's forward.

There hooks of DDP and FSDP see them as the forward's output, the head's weights are gathered, and
torch.compile has them in the model's graph. The routes are those of loss.py:

  fused    a plain linear head behind a scale and a softcap: fused_linear_logprobs.py
  chunked  any other head (LoRA, quantised) or arithmetic, and logits that exist: plain torch on a
           bounded number of tokens at a time, recomputed in backward
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from liger_kernels.ops.fused_linear_logprobs import (
    DIFFERENTIABLE,
    linear_logprobs,
    logprob_options,
    logprobs_of_logits,
    named_outputs,
)
from liger_kernels.ops.losses.label_count import LabelCount, count_labels, rows_with_labels
from liger_kernels.ops.losses.options import IGNORE_INDEX
from liger_kernels.transformers.lazy_logits import loss
from liger_kernels.transformers.lazy_logits.deferred import DeferredLogits
from liger_kernels.transformers.lazy_logits.sharding import gather

__all__ = [
    "ARGUMENT",
    "HeadRequest",
    "LogprobRequest",
    "answer",
    "logits_of",
    "logprobs_of_real",
    "values_of",
]

# The argument of a patched model's forward that holds the request.
ARGUMENT = "token_logprobs"


class LogprobRequest(NamedTuple):
    """Values that token_logprobs asks a patched model's forward for, in place of logits."""

    # (B, T) int64: the id that each position's logits are of, -100 for none.
    target: Tensor
    temperature: float
    outputs: tuple[str, ...]
    # Of targets that are left out; None: none is.
    ignore_index: int | None = IGNORE_INDEX
    # The outputs that have a gradient.
    differentiable: tuple[str, ...] = DIFFERENTIABLE

    def of_deferred(self, deferred: DeferredLogits) -> Any:
        return _cloned(values_of(deferred, self))

    def of_real(self, logits: Tensor) -> Any:
        return _cloned(logprobs_of_real(logits, self))


def _cloned(values: Any) -> Any:
    """Copy values: FSDP2 warns of views, since an in-place operation would lose its hook."""
    return type(values)(*(value.clone() for value in values))


class HeadRequest(Protocol):
    """Asks a patched model's forward for values in place of its logits."""

    @property
    def target(self) -> Tensor:
        """Return the id that each position's logits are of, (B, T) int64, -100 for none."""

    def of_deferred(self, deferred: DeferredLogits) -> Any:
        """Compute it of deferred logits."""

    def of_real(self, logits: Tensor) -> Any:
        """Compute it of logits (B, T, V) that exist."""


def answer(
    out: Any, find: Callable[[Any], DeferredLogits | None], request: HeadRequest, problem: str
) -> Any:
    """Return a model's output with the values that were asked for in place of its logits.

    Args:
        out: With deferred logits, which `find` knows, or with real ones.
        find: Returns the deferred logits behind a value, or None.
        request: What to compute.
        problem: Why logits are real, where they are.
    """
    is_tuple = isinstance(out, tuple)
    logits = out[0] if is_tuple else out["logits"]
    deferred = find(logits)
    if deferred is None:
        warn_of_logits(problem)
        _check_shape(logits.shape[:-1], request)
        values = request.of_real(logits)
    else:
        _check_shape(deferred.shape[:-1], request)
        values = request.of_deferred(deferred)
    return (values, *out[1:]) if is_tuple else type(out)(**{**out, "logits": values})


def warn_of_logits(problem: str) -> None:
    """Warn that all logits are made, and why."""
    warnings.warn(f"token_logprobs makes all logits: {problem}", stacklevel=3)


def logprobs_of_real(logits: Tensor, request: LogprobRequest) -> Any:
    """Compute the values of logits (B, T, V) that exist, a chunk of tokens in fp32 at a time."""
    _check_shape(logits.shape[:-1], request)
    return _chunked(logits, lambda rows: rows, logits.shape[-1], request)


def _check_shape(shape: Any, request: HeadRequest) -> None:
    if tuple(shape) != tuple(request.target.shape):
        raise ValueError(
            f"labels must have a label for each position of the logits {tuple(shape)}, got "
            f"{tuple(request.target.shape)}"
        )


def values_of(deferred: DeferredLogits, request: LogprobRequest) -> Any:
    """Compute what is asked for of deferred logits, without them where that is possible.

    A recorded log_softmax is left out: log-probabilities are the same without it.
    """
    if deferred.has_been_made():
        return logprobs_of_real(deferred.real(), request)
    target = request.target.to(deferred.rows.device)
    count = None if request.ignore_index is None else deferred.call.label_count
    gather(deferred.head)
    with deferred.as_recorded(deferred.needs_grad and torch.is_grad_enabled()):
        linear = loss.linear_of(deferred)
        transform = loss.transform_of(deferred.arithmetic())
        # The op has no gradient of a mean.
        is_fused = not ("mean_logit" in request.differentiable and torch.is_grad_enabled())
        if is_fused and linear is not None and transform is not None:
            values = linear_logprobs(
                (deferred.rows, linear.weight, linear.bias),
                target,
                logprob_options(
                    request.ignore_index, request.temperature, transform.softcap, transform.scale
                ),
                request.outputs,
                differentiable=tuple(x for x in request.differentiable if x != "mean_logit"),
                label_count=count,
            )
        elif torch.compiler.is_compiling():
            return logprobs_of_real(deferred.real(), request)
        else:
            values = _chunked(deferred.rows, logits_of(deferred), deferred.width, request, count)
    deferred.finish_loss(*values)
    return values


def logits_of(deferred: DeferredLogits) -> Callable[[Tensor], Tensor]:
    """Return the function from some of the head's input to their logits."""

    def make(rows: Tensor) -> Tensor:
        logits = deferred.head_output(rows)
        for op in deferred.arithmetic():
            logits = op.apply(logits)
        return logits

    return make


def _chunked(
    x: Tensor,
    make: Callable[[Tensor], Tensor],
    width: int,
    request: LogprobRequest,
    count: LabelCount | None = None,
) -> Any:
    """Compute the values of make(x) (..., H) at the tokens that have a target, in chunks."""
    target = request.target.to(x.device)
    x, label = x.flatten(0, -2), target.flatten()
    rows = None
    ignored = request.ignore_index
    if ignored is not None and not torch.compiler.is_compiling():
        rows = rows_with_labels(label, ignored, count or count_labels(label, ignored))
    if rows is not None:
        x, label = x[rows], label[rows]
    compute = functools.partial(_chunk, make, request)
    size = max(1, loss.CHUNK_ELEMENTS // width)
    chunks = zip(x.split(size), label.split(size), strict=True)
    # Checkpointed: a chunk's logits live until its values are known, and once more in backward.
    parts = [checkpoint(compute, *chunk, use_reentrant=False) for chunk in chunks]
    values = [torch.cat(found) for found in zip(*parts, strict=True)]
    if rows is not None:
        values = [v.new_zeros(target.numel()).index_copy(0, rows, v) for v in values]
    return named_outputs(request.outputs, [v.view(target.shape) for v in values])


def _chunk(
    make: Callable[[Tensor], Tensor], request: LogprobRequest, x: Tensor, label: Tensor
) -> Any:
    logits = make(x)
    z = logits.to(torch.promote_types(logits.dtype, torch.float32)) / request.temperature
    is_ignored = torch.zeros_like(label, dtype=torch.bool)
    if request.ignore_index is not None:
        is_ignored = label == request.ignore_index
    label = label.masked_fill(is_ignored, 0)
    values = logprobs_of_logits(z, label, request.outputs, request.differentiable)
    return tuple(value.masked_fill(is_ignored, 0) for value in values)
