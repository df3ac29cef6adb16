"""CPO and its variants SimPO and AlphaPO: pairs without a reference.

loss = loss_type(chosen, rejected) + cpo_alpha * nll, where nll is the likelihood of the scored
tokens of chosen answers, as in sft (Xu et al. 2024, arXiv 2401.08417).
"""

from __future__ import annotations

from typing import Any

import torch

from liger_cli.config import RunConfig
from liger_cli.training.objectives.objective import Batch
from liger_cli.training.objectives.pairs import (
    PairObjective,
    PairSums,
    Scores,
    margin_of,
    mean_metrics,
)
from liger_kernels.preferences.likelihood_losses import AVERAGED, CpoOptions, cpo_loss, shaped

__all__ = ["Cpo"]


class Cpo(PairObjective):
    """The objectives cpo and simpo."""

    def __init__(self, config: RunConfig, model: Any, device: torch.device) -> None:
        super().__init__(config, model, device)
        self.likelihood_weight = config.likelihood_weight
        [self._loss] = config.losses
        self.reads_margin = self._loss != "ipo"
        self._options = CpoOptions(
            config.beta, config.label_smoothing, config.simpo_gamma, config.alpha
        )

    def sums(self, model: Any, batch: Batch, scores: Scores) -> PairSums:
        logps = scores.sums / scores.lengths if self._loss in AVERAGED else scores.sums
        values = shaped(logps, self._options.alpha)
        chosen, rejected = values[::2], values[1::2]
        losses = cpo_loss(self._loss, chosen, rejected, margin_of(batch, chosen), self._options)
        metrics = mean_metrics(self._options.beta * values, logps)
        return PairSums(losses.sum(), self.likelihood(scores), metrics)
