"""A reward model: one score of a prompt with its answer, the chosen answer's above the other's.

loss = -logsigmoid(score(chosen) - score(rejected) - margin), the mean over pairs (Bradley-Terry;
Ouyang et al. 2022, arXiv 2203.02155; margins: Touvron et al. 2023, arXiv 2307.09288), plus
center_rewards_coefficient times the mean of (score(chosen) + score(rejected))^2, which keeps scores
around 0 (Eisenstein et al. 2023, arXiv 2312.09244). It is the loss of TRL's RewardTrainer.

An answer is scored at its last token, which is known by its place.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from liger_cli.config import RunConfig
from liger_cli.config.objectives import REWARD_METRICS
from liger_cli.training.model.classifiers import row_scores, take_places
from liger_cli.training.objectives.answers import model_inputs
from liger_cli.training.objectives.objective import Batch
from liger_cli.training.objectives.pairs import PairObjective, PairSums, margin_of

__all__ = ["Reward", "last_places"]


class Reward(PairObjective):
    """The objective reward."""

    pair_metrics = REWARD_METRICS
    shows_likelihood = False
    reads_margin = True

    def __init__(self, config: RunConfig, model: Any, device: torch.device) -> None:
        super().__init__(config, model, device)
        take_places(model)

    def rewards(self, model: Any, batch: Batch) -> torch.Tensor:
        """Return the scores of the answers of a batch, chosen and rejected in turn, (2N,) fp64."""
        places = last_places(batch["answer_ids"], 2 * int(batch["num_pairs"]))
        inputs = model_inputs(batch, self._device)
        return row_scores(model, inputs, places.to(self._device)).double().squeeze(-1)

    def batch_sums(self, model: Any, batch: Batch) -> PairSums:
        rewards = self.rewards(model, batch)
        chosen, rejected = rewards[::2], rewards[1::2]
        losses = -F.logsigmoid(chosen - rejected - margin_of(batch, chosen))
        if (coefficient := self._config.center_rewards_coefficient) is not None:
            losses = losses + coefficient * (chosen + rejected).square()
        with torch.no_grad():
            margins = chosen - rejected
            means = (chosen, rejected, (margins > 0).double(), margins)
            metrics = torch.stack([value.sum() for value in means])
        return PairSums(losses.sum(), torch.zeros_like(metrics[0]), metrics)


def last_places(answer_ids: torch.Tensor, num_answers: int) -> torch.Tensor:
    """Return the place of the last token of each answer in the flattened batch, (num_answers,).

    Args:
        answer_ids: (B, T) int64 on the host, the number of the answer of each token; -1 for none.
    """
    numbers = answer_ids.flatten()
    places = torch.arange(len(numbers))
    is_token = numbers >= 0
    last = torch.zeros(num_answers, dtype=torch.int64)
    return last.scatter_reduce_(0, numbers[is_token], places[is_token], "amax")
