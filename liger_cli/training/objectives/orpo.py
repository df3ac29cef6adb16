"""ORPO: the likelihood of the chosen answer, and the odds ratio to the rejected one, together.

loss = nll - beta * logsigmoid(log odds(chosen) - log odds(rejected)), the odds of means over the
tokens of an answer (Hong et al. 2024, arXiv 2403.07691). The likelihood is that of the scored
tokens, as in sft; with beta 0 it is sft on chosen answers.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F

from liger_cli.config.objectives import METRICS
from liger_cli.training.objectives.objective import Batch
from liger_cli.training.objectives.pairs import PairObjective, PairSums, Scores, mean_metrics
from liger_kernels.preferences.likelihood_losses import log_odds_ratio

__all__ = ["Orpo"]


class Orpo(PairObjective):
    """The objective orpo."""

    pair_metrics = (*METRICS, "log_odds_ratio", "log_odds_chosen")
    likelihood_weight = 1.0

    def sums(self, model: Any, batch: Batch, scores: Scores) -> PairSums:
        beta = self._config.beta
        means = scores.sums / scores.lengths
        log_odds = log_odds_ratio(means[::2], means[1::2])
        ratio = F.logsigmoid(log_odds)
        metrics = mean_metrics(beta * means, means, ratio, log_odds)
        return PairSums(-beta * ratio.sum(), self.likelihood(scores), metrics)
