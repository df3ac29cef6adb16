"""Losses of Direct Preference Optimization, as functions of the log-probabilities of answers.

Each takes a `Pairs` of N pairs in float64 and returns the loss of each, (N,). The names are TRL's.
With pi the model, ref the reference, w the chosen and l the rejected answer,

    a = log pi(w) - log ref(w),   c = log pi(l) - log ref(l),   z = beta (a - c) - margin.

An f-divergence puts f'(exp(a)) in the place of a, and c alike (`divergence_score`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

__all__ = ["DPO_LOSSES", "MARGIN_LOSSES", "LossOptions", "Pairs", "divergence_score"]

# exp of more is not finite in float32; what has come so far from the reference is lost anyway.
_LARGEST_EXPONENT = 88.0


@dataclass(frozen=True)
class Pairs:
    """Log-probabilities of N pairs, each (N,) float64.

    Attributes:
        chosen, rejected: Of the model, summed over the answer.
        ref_chosen, ref_rejected: The same of the reference.
        chosen_length, rejected_length: Scored tokens.
        margin: How much better the chosen answer is, in units of the reward.
    """

    chosen: torch.Tensor
    rejected: torch.Tensor
    ref_chosen: torch.Tensor
    ref_rejected: torch.Tensor
    chosen_length: torch.Tensor
    rejected_length: torch.Tensor
    margin: torch.Tensor

    @property
    def chosen_ratio(self) -> torch.Tensor:
        """The log-ratio a."""
        return self.chosen - self.ref_chosen

    @property
    def rejected_ratio(self) -> torch.Tensor:
        """The log-ratio c."""
        return self.rejected - self.ref_rejected


@dataclass(frozen=True)
class LossOptions:
    """Settings of the losses; the names are those of the configuration.

    Attributes:
        divergence: f_divergence_type.
        divergence_coef: f_alpha_divergence_coef.
    """

    beta: float = 0.1
    label_smoothing: float = 0.0
    divergence: str = "reverse_kl"
    divergence_coef: float = 0.5
    discopop_tau: float = 0.05


def divergence_score(ratio: torch.Tensor, options: LossOptions) -> torch.Tensor:
    """Return f'(u) - f'(1) for u = exp(ratio), of the divergence f.

    reverse_kl log u, forward_kl 1 - 1/u, js_divergence log(2u / (1 + u)), and alpha_divergence
    (u^(alpha - 1) - 1) / (alpha - 1), which is log u at 1 (Wang et al. 2023, arXiv 2309.16240).
    """
    if options.divergence == "forward_kl":
        return 1 - torch.exp((-ratio).clamp(max=_LARGEST_EXPONENT))
    if options.divergence == "js_divergence":
        return math.log(2) - F.softplus(-ratio)
    power = options.divergence_coef - 1
    if options.divergence == "alpha_divergence" and power != 0:
        return torch.expm1((power * ratio).clamp(max=_LARGEST_EXPONENT)) / power
    return ratio


def _difference(pairs: Pairs, options: LossOptions) -> torch.Tensor:
    """Return a - c, of the divergence that was asked for."""
    chosen = divergence_score(pairs.chosen_ratio, options)
    return chosen - divergence_score(pairs.rejected_ratio, options)


def _mean_difference(pairs: Pairs, options: LossOptions) -> torch.Tensor:
    """Return a and c divided by the lengths of their answers, and subtracted."""
    chosen = divergence_score(pairs.chosen_ratio, options) / pairs.chosen_length
    return chosen - divergence_score(pairs.rejected_ratio, options) / pairs.rejected_length


def _logit(pairs: Pairs, options: LossOptions) -> torch.Tensor:
    return options.beta * _difference(pairs, options) - pairs.margin


def _smoothed(logit: torch.Tensor, smoothing: float) -> torch.Tensor:
    """Return the cross-entropy of a logit with 1 - smoothing (cDPO)."""
    return -F.logsigmoid(logit) * (1 - smoothing) - F.logsigmoid(-logit) * smoothing


def sigmoid(pairs: Pairs, options: LossOptions) -> torch.Tensor:
    """DPO (Rafailov et al. 2023, arXiv 2305.18290); margin is ODPO's (arXiv 2402.10571)."""
    return _smoothed(_logit(pairs, options), options.label_smoothing)


def sigmoid_norm(pairs: Pairs, options: LossOptions) -> torch.Tensor:
    """DPO on means over the tokens of an answer (Tulu 3, arXiv 2411.15124)."""
    logit = options.beta * _mean_difference(pairs, options) - pairs.margin
    return _smoothed(logit, options.label_smoothing)


def hinge(pairs: Pairs, options: LossOptions) -> torch.Tensor:
    """SLiC's hinge on the rewards (Zhao et al. 2023, arXiv 2305.10425)."""
    return F.relu(1 - _logit(pairs, options))


def ipo(pairs: Pairs, options: LossOptions) -> torch.Tensor:
    """IPO on means over tokens, with tau = beta (Azar et al. 2023, arXiv 2310.12036)."""
    return (_mean_difference(pairs, options) - 1 / (2 * options.beta)).square()


def robust(pairs: Pairs, options: LossOptions) -> torch.Tensor:
    """DPO, unbiased under flipped labels (Chowdhury et al. 2024, arXiv 2403.00409)."""
    logit, smoothing = _logit(pairs, options), options.label_smoothing
    loss = -F.logsigmoid(logit) * (1 - smoothing) + F.logsigmoid(-logit) * smoothing
    return loss / (1 - 2 * smoothing)


def exo_pair(pairs: Pairs, options: LossOptions) -> torch.Tensor:
    """Reverse KL to the smoothed preference (EXO, Ji et al. 2024, arXiv 2402.00856)."""
    logit, smoothing = options.beta * _difference(pairs, options), options.label_smoothing
    better = F.logsigmoid(logit) - math.log1p(-smoothing)
    worse = F.logsigmoid(-logit) - math.log(smoothing)
    return torch.sigmoid(logit) * better + torch.sigmoid(-logit) * worse


def nca_pair(pairs: Pairs, options: LossOptions) -> torch.Tensor:
    """Noise-contrastive alignment (Chen et al. 2024, arXiv 2402.05369)."""
    chosen, rejected = _rewards(pairs, options)
    return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


def bco_pair(pairs: Pairs, options: LossOptions) -> torch.Tensor:
    """Binary classifier optimization without reward shift (Jung et al. 2024, arXiv 2404.04656)."""
    chosen, rejected = _rewards(pairs, options)
    return -F.logsigmoid(chosen) - F.logsigmoid(-rejected)


def sppo_hard(pairs: Pairs, options: LossOptions) -> torch.Tensor:
    """Self-play with hard labels (SPPO, Wu et al. 2024, arXiv 2405.00675)."""
    target = 0.5 / options.beta
    return (pairs.chosen_ratio - target).square() + (pairs.rejected_ratio + target).square()


def apo_zero(pairs: Pairs, options: LossOptions) -> torch.Tensor:
    """Anchored: chosen up, rejected down (D'Oosterlinck et al. 2024, arXiv 2408.06266)."""
    chosen, rejected = _rewards(pairs, options)
    return 1 - torch.sigmoid(chosen) + torch.sigmoid(rejected)


def apo_down(pairs: Pairs, options: LossOptions) -> torch.Tensor:
    """Anchored: both down, rejected more (D'Oosterlinck et al. 2024, arXiv 2408.06266)."""
    chosen, rejected = _rewards(pairs, options)
    return torch.sigmoid(chosen) + 1 - torch.sigmoid(chosen - rejected)


def discopop(pairs: Pairs, options: LossOptions) -> torch.Tensor:
    """Log-ratio modulated loss (DiscoPOP, Lu et al. 2024, arXiv 2406.08414).

    At a difference of 0 it slopes towards the rejected answer: see docs/preferences.md.
    """
    logit = options.beta * _difference(pairs, options)
    scaled = logit / options.discopop_tau
    # The share as a logarithm: of a logit far below 0 the product is infinity times 0.
    weighted = torch.exp((F.logsigmoid(scaled) - logit).clamp(max=_LARGEST_EXPONENT))
    return -F.logsigmoid(logit) * torch.sigmoid(-scaled) + weighted


def aot(pairs: Pairs, options: LossOptions) -> torch.Tensor:
    """Optimal transport of the margins of all pairs to the reference's (arXiv 2406.05882).

    Sorts: the N pairs must be those of the whole step.
    """
    model = (pairs.chosen - pairs.rejected).sort().values
    reference = (pairs.ref_chosen - pairs.ref_rejected).sort().values
    return _smoothed(options.beta * (model - reference), options.label_smoothing)


def aot_unpaired(pairs: Pairs, options: LossOptions) -> torch.Tensor:
    """Optimal transport of all rejected ratios to the chosen ones (arXiv 2406.05882).

    Sorts: the N pairs must be those of the whole step.
    """
    difference = pairs.chosen_ratio.sort().values - pairs.rejected_ratio.sort().values
    return _smoothed(options.beta * difference, options.label_smoothing)


def _rewards(pairs: Pairs, options: LossOptions) -> tuple[torch.Tensor, torch.Tensor]:
    return options.beta * pairs.chosen_ratio, options.beta * pairs.rejected_ratio


Loss = Callable[[Pairs, LossOptions], torch.Tensor]

# loss_type sft is a mean over tokens and not over pairs: dpo.py has it.
DPO_LOSSES: dict[str, Loss] = {
    "sigmoid": sigmoid,
    "hinge": hinge,
    "ipo": ipo,
    "exo_pair": exo_pair,
    "nca_pair": nca_pair,
    "robust": robust,
    "bco_pair": bco_pair,
    "sppo_hard": sppo_hard,
    "aot": aot,
    "aot_unpaired": aot_unpaired,
    "apo_zero": apo_zero,
    "apo_down": apo_down,
    "discopop": discopop,
    "sigmoid_norm": sigmoid_norm,
}

# Those that subtract a margin.
MARGIN_LOSSES = frozenset({"sigmoid", "sigmoid_norm", "hinge", "robust"})
