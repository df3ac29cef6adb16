"""Losses on pairs that need no reference: ORPO's odds ratio, CPO and its variants.

Each takes log-probabilities in float64 and returns the loss of each pair, (N,). Both add the
negative log-likelihood of chosen answers, which orpo.py and cpo.py do.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

__all__ = ["AVERAGED", "CpoOptions", "cpo_loss", "log_odds_ratio", "shaped"]

# Losses of CPO whose log-probabilities are means over the tokens of an answer.
AVERAGED = frozenset({"ipo", "simpo", "alphapo"})


def log_odds_ratio(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    """Return log odds(chosen) - log odds(rejected), odds(p) = p / (1 - p).

    ORPO (Hong et al. 2024, arXiv 2403.07691): its loss is -beta * logsigmoid of this.

    Args:
        chosen, rejected: Means over the tokens of an answer, below 0.
    """
    return chosen - _log1mexp(chosen) - (rejected - _log1mexp(rejected))


def _log1mexp(x: torch.Tensor) -> torch.Tensor:
    """Return log(1 - exp(x)) for x < 0; of an answer that is certain the largest odds."""
    return torch.log((-torch.expm1(x)).clamp(min=torch.finfo(x.dtype).tiny))


@dataclass(frozen=True)
class CpoOptions:
    """Settings of the losses; the names are those of the configuration."""

    beta: float = 0.1
    label_smoothing: float = 0.0
    simpo_gamma: float = 0.5
    alpha: float = 0.0


def shaped(logps: torch.Tensor, alpha: float) -> torch.Tensor:
    """Return (1 - p^-alpha) / alpha, which is log p at 0 (AlphaPO, arXiv 2501.03884)."""
    if alpha == 0:
        return logps
    return -torch.expm1((-alpha * logps).clamp(max=88.0)) / alpha


def cpo_loss(
    name: str,
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    margin: torch.Tensor,
    options: CpoOptions,
) -> torch.Tensor:
    """Return the loss of each pair without the likelihood of its chosen answer, (N,).

    sigmoid is CPO (Xu et al. 2024, arXiv 2401.08417), hinge SLiC's, ipo IPO's, simpo SimPO (Meng
    et al. 2024, arXiv 2405.14734), alphapo the same with alpha.

    Args:
        name: Of the loss.
        chosen, rejected: Log-probabilities (N,), means over tokens where AVERAGED has the name,
            and shaped.
        margin: How much better the chosen answer is, in units of the reward, (N,).
    """
    beta = options.beta
    difference = chosen - rejected
    if name == "ipo":
        return (difference - 1 / (2 * beta)).square()
    if name == "hinge":
        return F.relu(1 - (beta * difference - margin))
    gamma = options.simpo_gamma if name in ("simpo", "alphapo") else 0.0
    logit = beta * difference - gamma - margin
    smoothing = options.label_smoothing
    return -F.logsigmoid(logit) * (1 - smoothing) - F.logsigmoid(-logit) * smoothing
