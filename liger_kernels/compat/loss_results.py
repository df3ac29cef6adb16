"""The results of liger_kernel's losses beside the loss: z-loss, accuracy and predicted tokens.

They are read off a second pass over the logits in chunks, which has no gradient, and are computed
only where they are asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from liger_kernels.ops.losses.options import wide_dtype

__all__ = ["CrossEntropyOutput", "LossTerms", "Wanted"]

# Logits of one chunk of the second pass: 64 MiB in fp32.
_CHUNK_LOGITS = 2**24
_IGNORED_TOKEN = -1


@dataclass(frozen=True)
class CrossEntropyOutput:
    """A loss and what was asked for beside it, in this order; the rest is None.

    Args:
        loss: The loss, with the z-loss.
        z_loss: lse_square_scale * logsumexp^2, reduced as the loss; no gradient.
        token_accuracy: Share of the labels that have the largest logit, fp32; for reduction "none"
            1 or 0 of each token, 0 where ignored.
        predicted_tokens: int64 classes with the largest logit, -1 where ignored, in target's shape.
    """

    loss: Tensor
    z_loss: Tensor | None = None
    token_accuracy: Tensor | None = None
    predicted_tokens: Tensor | None = None


@dataclass(frozen=True)
class LossTerms:
    """The options of a cross entropy, as liger_cross_entropy takes them.

    Attributes:
        class_weight: (V,) or None.
        normalizer: Divides the sum of a mean, and that of its z-loss; None for the count.
    """

    class_weight: Tensor | None
    ignore_index: int
    label_smoothing: float
    lse_square_scale: float
    softcap: float | None
    reduction: str
    normalizer: int | Tensor | None = None

    @property
    def of_op(self) -> dict[str, Any]:
        """The arguments that both ops name alike, but for the reduction."""
        return {
            "ignore_index": self.ignore_index,
            "label_smoothing": self.label_smoothing,
            "z_loss": self.lse_square_scale,
            "softcap": self.softcap,
        }


@dataclass(frozen=True)
class Wanted:
    """The further results that a caller asks for."""

    z_loss: bool
    token_accuracy: bool
    predicted_tokens: bool

    def beside(
        self,
        loss: Tensor,
        terms: LossTerms,
        rows: Tensor,
        target: Tensor,
        head: Callable[[Tensor], Tensor],
    ) -> Tensor | CrossEntropyOutput:
        """Compute the results for rows (N, ...), of which head makes logits (n, V)."""
        if not (self.z_loss or self.token_accuracy or self.predicted_tokens):
            return loss
        lse, best = _largest(rows, head, terms.softcap)
        label = target.reshape(-1).to(best.device)
        valid = label != terms.ignore_index
        count = valid.sum().clamp(min=1)
        z_loss = token_accuracy = predicted_tokens = None
        if self.z_loss:
            values = (terms.lse_square_scale * lse.square()).masked_fill(~valid, 0)
            divisor = count if terms.normalizer is None else terms.normalizer
            summed = values.sum() if terms.reduction == "sum" else values.sum() / divisor
            z_loss = values.view(target.shape) if terms.reduction == "none" else summed
        if self.token_accuracy:
            correct = ((best == label) & valid).float()
            is_whole = terms.reduction == "none"
            token_accuracy = correct.view(target.shape) if is_whole else correct.sum() / count
        if self.predicted_tokens:
            predicted_tokens = best.masked_fill(~valid, _IGNORED_TOKEN).view(target.shape)
        return CrossEntropyOutput(loss, z_loss, token_accuracy, predicted_tokens)


@torch.no_grad()
def _largest(
    rows: Tensor, head: Callable[[Tensor], Tensor], softcap: float | None
) -> tuple[Tensor, Tensor]:
    """Compute the logsumexp and the largest class of each row's logits, chunk by chunk."""
    width = head(rows[:1]).shape[-1]
    parts = []
    for part in rows.split(max(1, _CHUNK_LOGITS // width)):
        logits = head(part)
        logits = logits.to(wide_dtype(logits.dtype))
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        parts.append((logits.logsumexp(-1), logits.argmax(-1)))
    lse, best = zip(*parts, strict=True)
    return torch.cat(lse), torch.cat(best)
