"""KTO, a loss of answers labelled good or bad (Ethayarajh et al. 2024, arXiv 2402.01306)."""

from __future__ import annotations

import torch

__all__ = ["kto_losses"]


def kto_losses(
    ratios: torch.Tensor, is_good: torch.Tensor, kl: torch.Tensor | float, beta: float
) -> torch.Tensor:
    """Compute the loss of each answer without its weight, (N,).

    Args:
        ratios: Log-ratios of the answers, (N,).
        is_good: (N,) bool.
        kl: At least 0, without dimensions.
    """
    logits = beta * (ratios - kl)
    return torch.sigmoid(torch.where(is_good, -logits, logits))
