"""The divergence of deferred logits from a teacher's, computed inside of the student's forward.

The teacher runs first and its logits stay deferred: the input of its head is kept. The routes are
those of logprobs.py:

  fused    two plain linear heads without a scale or a softcap: fused_linear_divergence.py
  chunked  other heads or arithmetic, and logits that exist: the op divergence on a bounded number
           of tokens at a time, recomputed in backward
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from liger_kernels.ops.divergence import divergence
from liger_kernels.ops.fused_linear_divergence import fused_linear_divergence
from liger_kernels.ops.losses.divergence_rows import DivergenceOptions
from liger_kernels.ops.losses.label_count import count_labels, rows_with_labels
from liger_kernels.ops.losses.options import IGNORE_INDEX
from liger_kernels.transformers.lazy_logits import loss
from liger_kernels.transformers.lazy_logits.deferred import DeferredLogits
from liger_kernels.transformers.lazy_logits.logprobs import (
    LogprobRequest,
    logits_of,
    logprobs_of_real,
    values_of,
)
from liger_kernels.transformers.lazy_logits.sharding import gather

__all__ = ["DivergenceRequest", "DivergenceSums", "TeacherRequest"]

# Logits (..., V) that exist, or what makes them.
Logits = Tensor | DeferredLogits


class DivergenceSums(NamedTuple):
    """Sums over the labels of a batch, scalars with a gradient."""

    divergence: Tensor
    # The negative log-likelihood of the labels at temperature 1.
    nll: Tensor
    # How evenly the model uses its experts, where it says so.
    aux_loss: Tensor | None = None


class TeacherRequest(NamedTuple):
    """Asks a model's forward for its logits as they are, deferred where its head is patched."""

    target: Tensor

    def of_deferred(self, deferred: DeferredLogits) -> Logits:
        return deferred.real() if deferred.has_been_made() else deferred

    def of_real(self, logits: Tensor) -> Logits:
        return logits


class DivergenceRequest(NamedTuple):
    """Asks a student's forward for DivergenceSums in place of logits."""

    # (B, T) int64: the id that each position's logits are of, -100 for none.
    target: Tensor
    teacher: Logits
    options: DivergenceOptions

    def of_deferred(self, deferred: DeferredLogits) -> DivergenceSums:
        if deferred.has_been_made():
            return self.of_real(deferred.real())
        target = self.target.to(deferred.rows.device)
        nll = values_of(deferred, LogprobRequest(target, 1.0, ("logprob",))).logprob
        gather(deferred.head)
        with deferred.as_recorded(deferred.needs_grad and torch.is_grad_enabled()):
            total = self._divergence(deferred)
        deferred.finish_loss(total)
        return DivergenceSums(total, -nll.sum(dtype=torch.float64))

    def of_real(self, logits: Tensor) -> DivergenceSums:
        nll = logprobs_of_real(logits, LogprobRequest(self.target, 1.0, ("logprob",))).logprob
        return DivergenceSums(self._divergence(logits), -nll.sum(dtype=torch.float64))

    def _divergence(self, student: Logits) -> Tensor:
        """Return the sum of the divergences at the labels."""
        if student.shape != self.teacher.shape:
            raise ValueError(
                f"teacher must have the student's tokens and vocabulary {tuple(student.shape)}, "
                f"got {tuple(self.teacher.shape)}"
            )
        x, teacher = _head_input(student), _head_input(self.teacher)
        label = self.target.flatten().to(x.device)
        rows = rows_with_labels(label, IGNORE_INDEX, count_labels(label, IGNORE_INDEX))
        if rows is not None:
            x, teacher = x[rows], teacher[rows]
        beta, temperature = self.options
        ours, theirs = _plain_layer(student), _plain_layer(self.teacher)
        if ours is not None and theirs is not None:
            return fused_linear_divergence(
                x,
                ours.weight,
                teacher,
                theirs.weight,
                bias=ours.bias,
                teacher_bias=theirs.bias,
                beta=beta,
                temperature=temperature,
                reduction="sum",
            )
        compute = functools.partial(_chunk, _maker(student), self.teacher, self.options)
        size = max(1, loss.CHUNK_ELEMENTS // student.shape[-1])
        parts = zip(x.split(size), teacher.split(size), strict=True)
        # Checkpointed: a chunk's logits live until its values are known, and once more in backward.
        return torch.stack([checkpoint(compute, *p, use_reentrant=False) for p in parts]).sum()


def _head_input(logits: Logits) -> Tensor:
    """Return the input of the head (N, ...), or the logits themselves where they exist."""
    return (logits.rows if isinstance(logits, DeferredLogits) else logits).flatten(0, -2)


def _plain_layer(logits: Logits) -> Any:
    """Return the linear layer whose output the logits are, or None."""
    if not isinstance(logits, DeferredLogits):
        return None
    is_plain = loss.transform_of(logits.arithmetic()) == loss.LogitTransform()
    return loss.linear_of(logits) if is_plain else None


def _maker(logits: Logits) -> Callable[[Tensor], Tensor]:
    return logits_of(logits) if isinstance(logits, DeferredLogits) else lambda rows: rows


def _chunk(
    student: Callable[[Tensor], Tensor],
    teacher: Logits,
    options: DivergenceOptions,
    x: Tensor,
    rows: Tensor,
) -> Tensor:
    if isinstance(teacher, DeferredLogits):
        with teacher.as_recorded(False):
            rows = logits_of(teacher)(rows)
    values = divergence(student(x), rows, beta=options.beta, temperature=options.temperature)
    return values.sum()
