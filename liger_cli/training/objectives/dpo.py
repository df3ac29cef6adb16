"""DPO and its variants: pairs, and a reference that the model stays near.

The losses are functions of liger_kernels/preferences/dpo_losses.py; here are their weights, the
reference, and the two things that are no sum over pairs: loss sft, a mean over chosen tokens, and
the losses that sort all pairs of a step. For these the step is scored first without a graph, the
loss of all pairs is differentiated in their log-probabilities, and each micro-batch then gets its
share of that gradient.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, NamedTuple

import torch
from accelerate.utils import gather_object

from liger_cli.config import RunConfig
from liger_cli.config.objectives import WHOLE_STEP_LOSSES
from liger_cli.training.checkpoints.random_state import kept_random_state
from liger_cli.training.inputs import Inputs
from liger_cli.training.objectives.answers import token_values
from liger_cli.training.objectives.objective import Batch, Setting, Totals
from liger_cli.training.objectives.pairs import (
    PairObjective,
    PairSums,
    Scores,
    margin_of,
    mean_metrics,
)
from liger_cli.training.objectives.precompute import has_values, with_values
from liger_cli.training.objectives.reference import (
    NoReference,
    Reference,
    ready_reference,
)
from liger_kernels.preferences.dpo_losses import (
    DPO_LOSSES,
    MARGIN_LOSSES,
    LossOptions,
    Pairs,
)

__all__ = ["Dpo"]


class _Share(NamedTuple):
    """The share of a micro-batch in losses of the whole step.

    Attributes:
        value: Of the losses, which are summed over pairs.
        chosen, rejected: Their gradients in the log-probabilities of its pairs, (N,).
    """

    value: torch.Tensor
    chosen: torch.Tensor
    rejected: torch.Tensor


class Dpo(PairObjective):
    """The objectives dpo and ipo."""

    shows_likelihood = False

    def __init__(self, config: RunConfig, model: Any, device: torch.device) -> None:
        super().__init__(config, model, device)
        losses = dict(config.losses)
        self.likelihood_weight = losses.pop("sft", 0.0)
        self.ld_alpha = config.ld_alpha
        self.reads_margin = losses.keys() <= MARGIN_LOSSES
        self._losses = {n: w for n, w in losses.items() if n not in WHOLE_STEP_LOSSES}
        self._step_losses = {n: w for n, w in losses.items() if n in WHOLE_STEP_LOSSES}
        self._options = LossOptions(
            beta=config.beta,
            label_smoothing=config.label_smoothing,
            divergence=config.f_divergence_type,
            divergence_coef=config.f_alpha_divergence_coef,
            discopop_tau=config.discopop_tau,
        )
        self._reference: Reference | None = None
        if config.reference == "none":
            self._reference = NoReference(device)
        self._shares: deque[_Share] = deque()

    def prepare(self, setting: Setting) -> Inputs:
        super().prepare(setting)
        self._reference = ready_reference(setting)
        if setting.config.reference != "precompute" or has_values(setting.inputs):
            return setting.inputs
        return with_values(self._reference_sums, setting)

    def leaves_values(self, setting: Setting) -> str | None:
        if setting.config.reference != "precompute":
            return f"reference is {setting.config.reference}"
        return None if has_values(setting.inputs) else "some sets of the data have none"

    def _reference_sums(self, model: Any, batch: Batch) -> torch.Tensor:
        return super().score(model, batch).sums

    def score(self, model: Any, batch: Batch) -> Scores:
        assert self._reference is not None, "prepare comes first"
        # First, because it may exchange weights, which no graph of the model would survive.
        with torch.no_grad():
            reference = self._reference.sums(self._reference_sums, model, batch)
        return replace(super().score(model, batch), reference=reference)

    def _pairs(self, batch: Batch, scores: Scores) -> Pairs:
        """Return the log-probabilities of the pairs of a batch, of the model and the reference."""
        sums, lengths, reference = scores.sums, scores.lengths, scores.reference
        assert reference is not None
        return Pairs(
            chosen=sums[::2],
            rejected=sums[1::2],
            ref_chosen=reference[::2],
            ref_rejected=reference[1::2],
            chosen_length=lengths[::2],
            rejected_length=lengths[1::2],
            margin=margin_of(batch, sums[::2]),
        )

    def begin(self, model: Any, batches: Sequence[Batch], totals: Totals) -> None:
        self._shares.clear()
        if not self._step_losses:
            return
        with torch.no_grad(), kept_random_state(self._device):
            parts = [self._pairs(batch, self.score(model, batch)) for batch in batches]
        self._shares.extend(self._divide(parts))

    def _divide(self, parts: Sequence[Pairs]) -> list[_Share]:
        """Return the share of each micro-batch of this process in the losses of the step."""
        own = {
            field.name: [value for part in parts for value in getattr(part, field.name).tolist()]
            for field in fields(Pairs)
        }
        everyone: list[dict[str, list[float]]] = gather_object([own])
        whole = Pairs(
            **{
                name: torch.tensor(
                    [value for one in everyone for value in one[name]], dtype=torch.float64
                )
                for name in own
            }
        )
        leaves = [whole.chosen.requires_grad_(), whole.rejected.requires_grad_()]
        loss = self._sum(self._step_losses, whole)
        gradients = torch.autograd.grad(loss, leaves)
        start = _num_before(everyone)
        shares = []
        for part in parts:
            place = slice(start, start := start + len(part.chosen))
            value = loss.detach() * (len(part.chosen) / max(len(whole.chosen), 1))
            pieces = [x[place] for x in gradients]
            shares.append(_Share(*(x.to(self._device) for x in (value, *pieces))))
        return shares

    def sums(self, model: Any, batch: Batch, scores: Scores) -> PairSums:
        pairs = self._pairs(batch, scores)
        weights = self._weights(model, batch, scores)
        losses = self._sum(self._losses, pairs, weights)
        if self._shares:
            share = self._shares.popleft()
            for gradient, x in ((share.chosen, pairs.chosen), (share.rejected, pairs.rejected)):
                losses = losses + (gradient * (x - x.detach())).sum()
            losses = losses + share.value
        elif self._step_losses:
            # In evaluation each pair is alone, so that the mean does not depend on the batches.
            alone = {"sigmoid": sum(self._step_losses.values())}
            losses = losses + self._sum(alone, pairs)
        rewards = (
            self._options.beta
            * torch.stack((pairs.chosen_ratio, pairs.rejected_ratio), 1).flatten()
        )
        return PairSums(losses, self.likelihood(scores), mean_metrics(rewards, scores.sums))

    def _sum(
        self, losses: Mapping[str, float], pairs: Pairs, weights: torch.Tensor | None = None
    ) -> torch.Tensor:
        # Of no loss, or of no pairs, it is 0 and has a gradient.
        total = (pairs.chosen + pairs.rejected).sum() * 0.0
        for name, weight in losses.items():
            values = weight * DPO_LOSSES[name](pairs, self._options)
            total = total + (values if weights is None else values * weights).sum()
        return total

    @torch.no_grad()
    def _weights(self, model: Any, batch: Batch, scores: Scores) -> torch.Tensor | None:
        """Return the weight of each pair by WPO (Zhou et al. 2024, arXiv 2406.11827), (N,).

        A token counts log p - log sum(p'^2). The sum over the vocabulary is had from the
        log-probability q of the same token at temperature 1/2: log sum(p'^2) = 2 log p - log q.
        """
        if not self._config.use_weighting:
            return None
        sharper = token_values(model, batch, self._device, temperature=0.5).logprob
        means = scores.answers.sums(sharper - scores.tokens.detach()) / scores.lengths
        return means.view(-1, 2).sum(1).exp().clamp(max=1.0)

    def updated(self, step: int) -> None:
        if self._reference is not None:
            self._reference.updated(step)

    def state_dict(self) -> dict[str, Any]:
        return {} if self._reference is None else self._reference.state_dict()

    def load_state_dict(self, values: Mapping[str, Any]) -> None:
        if self._reference is not None and values:
            self._reference.load_state_dict(values)


def _num_before(everyone: list[dict[str, list[float]]]) -> int:
    """Return how many pairs the processes before this one have."""
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    return sum(len(one["chosen"]) for one in everyone[:rank])
