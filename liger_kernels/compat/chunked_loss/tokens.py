"""Log-probabilities of the tokens of answers, which the losses of this package are made of."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from liger_kernels import ops

__all__ = [
    "AnswerLogps",
    "Head",
    "LinearLoss",
    "answer_logps",
    "logit_sum",
    "reference_logps",
    "token_logps",
]


class Head(NamedTuple):
    """Hidden states (B, T, H) and the head that makes logits of them.

    Attributes:
        weight: (V, H).
        bias: (V,) or None.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None


class AnswerLogps(NamedTuple):
    """Log-probabilities of B answers.

    Attributes:
        sums: (B,) float64.
        lengths: (B,) tokens that count.
    """

    sums: Tensor
    lengths: Tensor

    def values(self, average: bool) -> Tensor:
        """Return the sums, or means over the tokens of each answer; 0 for one without tokens."""
        return self.sums / self.lengths.clamp(min=1) if average else self.sums


class LinearLoss(nn.Module):
    """A loss of hidden states and a head's weight.

    Args:
        compiled: Taken as it is: nothing here needs torch.compile.
        chunk_size: Taken as it is: the op chooses its chunks.
    """

    def __init__(self, *, compiled: bool, chunk_size: int) -> None:
        super().__init__()
        if isinstance(chunk_size, bool) or not isinstance(chunk_size, int) or chunk_size < 1:
            raise ValueError(f"chunk_size must be an int of at least 1, got {chunk_size!r}")
        if not isinstance(compiled, bool):
            raise ValueError(f"compiled must be True or False, got {compiled!r}")


def token_logps(
    head: Head, ids: Tensor, *, ignore_index: int | None = None, temperature: float = 1.0
) -> Tensor:
    """Compute the log-probability of each id (B, T), 0 where it is ignore_index."""
    logps: Tensor = ops.fused_linear_logprobs(
        head.hidden,
        head.weight,
        ids,
        bias=head.bias,
        ignore_index=ignore_index,
        temperature=temperature,
        outputs=("logprob",),
    ).logprob
    return logps


def answer_logps(head: Head, target: Tensor, ignore_index: int) -> AnswerLogps:
    """Add the log-probabilities of the labels (B, T) of each answer, in float64.

    Raises:
        ValueError: The labels are not (B, T), or the op refuses them.
    """
    if target.dim() != 2:
        raise ValueError(f"target must be (answers, tokens), got {tuple(target.shape)}")
    logps = token_logps(head, target, ignore_index=ignore_index)
    return AnswerLogps(logps.double().sum(-1), (target != ignore_index).sum(-1))


@torch.no_grad()
def logit_sum(head: Head, is_counted: Tensor) -> Tensor:
    """Compute the sum of all logits of some answers without any: it is linear in hidden states.

    Args:
        head: Of B answers.
        is_counted: (B,) bool.
    """
    hidden = head.hidden.sum(1, dtype=torch.float64)[is_counted].sum(0)
    total: Tensor = hidden @ head.weight.sum(0, dtype=torch.float64)
    if head.bias is not None:
        num_tokens = is_counted.sum() * head.hidden.shape[1]
        total = total + num_tokens * head.bias.sum(dtype=torch.float64)
    return total


def reference_logps(
    where: str, reference: tuple[Tensor | None, ...], target: Tensor, ignore_index: int, used: bool
) -> AnswerLogps | None:
    """Compute those of the reference model, without a gradient; None without a reference.

    Args:
        where: The class, for messages.
        reference: ref_input, ref_weight and ref_bias of a call.
        used: use_ref_model.

    Raises:
        ValueError: A reference is needed and not given, or given and not used.
    """
    hidden, weight, bias = reference
    if not used:
        if hidden is not None or weight is not None or bias is not None:
            raise ValueError(f"{where} got a reference, but use_ref_model is False")
        return None
    if hidden is None or weight is None:
        raise ValueError(
            f"{where} needs ref_input and ref_weight; without a reference use_ref_model=False"
        )
    with torch.no_grad():
        return answer_logps(Head(hidden, weight, bias), target, ignore_index)
