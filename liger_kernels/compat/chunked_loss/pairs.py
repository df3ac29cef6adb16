"""Losses of pairs: chosen answers are the first half of a batch, rejected ones the second."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from liger_kernels.compat.chunked_loss.tokens import (
    AnswerLogps,
    Head,
    LinearLoss,
    answer_logps,
    logit_sum,
    reference_logps,
    token_logps,
)
from liger_kernels.ops.losses.options import IGNORE_INDEX, wide_dtype
from liger_kernels.preferences.dpo_losses import DPO_LOSSES, LossOptions, Pairs
from liger_kernels.preferences.likelihood_losses import CpoOptions, cpo_loss, log_odds_ratio

__all__ = [
    "LigerFusedLinearCPOLoss",
    "LigerFusedLinearDPOLoss",
    "LigerFusedLinearORPOLoss",
    "LigerFusedLinearSimPOLoss",
]

_DPO_TYPES = (
    *("sigmoid", "apo_zero", "apo_down", "sppo_hard", "nca_pair", "hinge", "robust", "exo_pair"),
    *("bco_pair", "discopop"),
)
_Result = tuple[Tensor, tuple[Tensor, ...]]


class _PairLoss(LinearLoss):
    """The mean loss of N pairs, plus alpha times the negative log-likelihood of chosen answers."""

    average = False

    def __init__(
        self,
        ignore_index: int,
        beta: float,
        alpha: float,
        compute_nll_loss: bool,
        **how: Any,
    ) -> None:
        super().__init__(**how)
        self.ignore_index = ignore_index
        self.beta = beta
        self.alpha = alpha if compute_nll_loss else 0.0
        self.compute_nll_loss = compute_nll_loss

    def losses(self, pairs: Pairs) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Compute the loss of each pair (N,), and what is returned beside it."""
        raise NotImplementedError

    def _result(
        self,
        head: Head,
        target: Tensor,
        reference: AnswerLogps | None = None,
        nll_target: Tensor | None = None,
    ) -> _Result:
        """Compute the loss, and log-probabilities, means of logits, likelihood and the rest."""
        if len(target) % 2:
            raise ValueError(
                f"{type(self).__name__} takes as many chosen as rejected answers, one half of the "
                f"batch each, got {len(target)}"
            )
        answers = answer_logps(head, target, self.ignore_index)
        pairs = _pairs_of(answers, reference, self.average)
        losses, further = self.losses(pairs)
        nll = losses.new_zeros(())
        if self.compute_nll_loss:
            nll = self._nll(head, answers, nll_target)
        loss = losses.mean() + self.alpha * nll
        is_chosen = torch.arange(len(target), device=target.device) < len(target) // 2
        num_logits = len(losses) * target.shape[1] * len(head.weight)
        means = (logit_sum(head, each) / num_logits for each in (is_chosen, ~is_chosen))
        values = (pairs.chosen, pairs.rejected, *means, nll, *further)
        dtype = wide_dtype(head.weight.dtype)
        return loss.to(dtype), tuple(value.detach().to(dtype) for value in values)

    def _nll(self, head: Head, answers: AnswerLogps, nll_target: Tensor | None) -> Tensor:
        half = len(answers.sums) // 2
        if nll_target is None:
            return -answers.sums[:half].sum() / answers.lengths[:half].sum().clamp(min=1)
        chosen, labels = head._replace(hidden=head.hidden[:half]), nll_target[:half]
        logps = token_logps(chosen, labels, ignore_index=self.ignore_index)
        count = (labels != self.ignore_index).sum()
        return -logps.sum(dtype=torch.float64) / count.clamp(min=1)


def _pairs_of(answers: AnswerLogps, reference: AnswerLogps | None, average: bool) -> Pairs:
    logps = answers.values(average)
    ref = torch.zeros_like(logps) if reference is None else reference.values(average)
    (chosen, rejected), (ref_chosen, ref_rejected) = logps.chunk(2), ref.chunk(2)
    lengths = answers.lengths.chunk(2)
    margin = torch.zeros_like(chosen)
    return Pairs(chosen, rejected, ref_chosen, ref_rejected, lengths[0], lengths[1], margin)


def _check_smoothing(loss_type: str, smoothing: float) -> None:
    if loss_type == "exo_pair":
        is_allowed, allowed = 0 < smoothing < 1, "above 0 and below 1"
    elif loss_type == "robust":
        is_allowed, allowed = 0 <= smoothing < 0.5, "at least 0 and below 0.5"
    else:
        is_allowed, allowed = smoothing == 0, "0, as liger_kernel leaves it out of it,"
    if not is_allowed:
        raise ValueError(
            f"label_smoothing must be {allowed} for loss_type {loss_type!r}, got {smoothing!r}"
        )


class LigerFusedLinearDPOLoss(_PairLoss):
    """DPO, and the losses of its pairs that liger_kernel has, by loss_type.

    Args:
        ignore_index: Label of tokens that are left out.
        beta: Multiplies log-ratios.
        alpha: Weight of the likelihood of chosen answers, with compute_nll_loss.
        compute_nll_loss: Whether that is added.
        compiled: Changes nothing here; so does chunk_size.
        use_ref_model: Whether forward gets a reference.
        average_log_prob: Means over the tokens of an answer in place of sums.
        chunk_size: See compiled.
        loss_type: A name of liger_kernels.preferences.dpo_losses that liger_kernel has too.
        label_smoothing: Share of pairs that are labelled the wrong way round, of loss types
            "robust" and "exo_pair".
        discopop_tau: Of loss_type "discopop".

    Raises:
        ValueError: An option is off.
    """

    def __init__(
        self,
        ignore_index: int = IGNORE_INDEX,
        beta: float = 0.1,
        alpha: float = 1.0,
        compute_nll_loss: bool = False,
        compiled: bool = True,
        use_ref_model: bool = True,
        average_log_prob: bool = False,
        chunk_size: int = 1,
        loss_type: str = "sigmoid",
        label_smoothing: float = 0.0,
        discopop_tau: float = 0.05,
    ) -> None:
        super().__init__(
            ignore_index, beta, alpha, compute_nll_loss, compiled=compiled, chunk_size=chunk_size
        )
        if loss_type not in _DPO_TYPES:
            raise ValueError(f"loss_type must be one of {', '.join(_DPO_TYPES)}, got {loss_type!r}")
        _check_smoothing(loss_type, label_smoothing)
        self.use_ref_model = use_ref_model
        self.average = average_log_prob
        self.loss_type = loss_type
        self.options = LossOptions(beta, label_smoothing, discopop_tau=discopop_tau)

    def losses(self, pairs: Pairs) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Compute the loss and the rewards of each pair."""
        rewards = self.beta * pairs.chosen_ratio, self.beta * pairs.rejected_ratio
        return DPO_LOSSES[self.loss_type](pairs, self.options), rewards

    def forward(
        self,
        lin_weight: Tensor,
        _input: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
    ) -> _Result:
        """Compute the loss of hidden states (2N, T, H) and labels (2N, T), which are not shifted.

        Returns:
            The loss, and (log-probabilities of chosen, of rejected answers, the mean of all logits
            of chosen, of rejected ones, their likelihood, rewards of chosen, of rejected ones).
        """
        reference = reference_logps(
            type(self).__name__,
            (ref_input, ref_weight, ref_bias),
            target,
            self.ignore_index,
            self.use_ref_model,
        )
        return self._result(Head(_input, lin_weight, bias), target, reference)


class LigerFusedLinearORPOLoss(_PairLoss):
    """ORPO: the likelihood of chosen answers, and beta times that of the odds ratio.

    Args:
        ignore_index: Label of tokens that are left out.
        beta: Weight of the odds ratio.
        compute_nll_loss: Whether the likelihood is added.
        compiled: Changes nothing here; so does chunk_size.
        chunk_size: See compiled.
    """

    average = True

    def __init__(
        self,
        ignore_index: int = IGNORE_INDEX,
        beta: float = 0.1,
        compute_nll_loss: bool = True,
        compiled: bool = True,
        chunk_size: int = 1,
    ) -> None:
        super().__init__(
            ignore_index, beta, 1.0, compute_nll_loss, compiled=compiled, chunk_size=chunk_size
        )

    def losses(self, pairs: Pairs) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Compute the loss and rewards of each pair, and the means of the ratio and its log."""
        log_odds = log_odds_ratio(pairs.chosen, pairs.rejected)
        ratio = F.logsigmoid(log_odds)
        rewards = self.beta * pairs.chosen, self.beta * pairs.rejected
        return -self.beta * ratio, (*rewards, ratio.mean(), log_odds.mean())

    def forward(
        self,
        lin_weight: Tensor,
        _input: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        nll_target: Tensor | None = None,
    ) -> _Result:
        """Compute the loss as LigerFusedLinearDPOLoss does; two means follow the rewards.

        nll_target (2N, T) has other labels for the likelihood of chosen answers.
        """
        return self._result(Head(_input, lin_weight, bias), target, nll_target=nll_target)


class LigerFusedLinearCPOLoss(_PairLoss):
    """CPO: the likelihood of chosen answers, and how much likelier than rejected ones they are.

    Args:
        ignore_index: Label of tokens that are left out.
        beta: Multiplies log-probabilities.
        alpha: Weight of the likelihood.
        label_smoothing: Share of pairs that are labelled the wrong way round.
        compute_nll_loss: Whether the likelihood is added.
        compiled: Changes nothing here; so does chunk_size.
        average_log_prob: Means over the tokens of an answer in place of sums.
        chunk_size: See compiled.
    """

    def __init__(
        self,
        ignore_index: int = IGNORE_INDEX,
        beta: float = 0.1,
        alpha: float = 1.0,
        label_smoothing: float = 0.0,
        compute_nll_loss: bool = True,
        compiled: bool = True,
        average_log_prob: bool = False,
        chunk_size: int = 1,
    ) -> None:
        super().__init__(
            ignore_index, beta, alpha, compute_nll_loss, compiled=compiled, chunk_size=chunk_size
        )
        self.average = average_log_prob
        self.name, self.options = "sigmoid", CpoOptions(beta, label_smoothing)

    def losses(self, pairs: Pairs) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Compute the loss and the rewards of each pair."""
        losses = cpo_loss(self.name, pairs.chosen, pairs.rejected, pairs.margin, self.options)
        return losses, (self.beta * pairs.chosen, self.beta * pairs.rejected)

    def forward(
        self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None
    ) -> _Result:
        """Compute the loss as LigerFusedLinearDPOLoss does."""
        return self._result(Head(_input, lin_weight, bias), target)


class LigerFusedLinearSimPOLoss(LigerFusedLinearCPOLoss):
    """SimPO: CPO of means over tokens, with a margin gamma; options as LigerFusedLinearCPOLoss."""

    def __init__(
        self,
        ignore_index: int = IGNORE_INDEX,
        beta: float = 0.1,
        alpha: float = 1.0,
        label_smoothing: float = 0.0,
        compute_nll_loss: bool = True,
        compiled: bool = True,
        gamma: float = 0.5,
        chunk_size: int = 1,
    ) -> None:
        super().__init__(
            ignore_index,
            beta,
            alpha,
            label_smoothing,
            compute_nll_loss,
            compiled=compiled,
            average_log_prob=True,
            chunk_size=chunk_size,
        )
        self.name, self.options = "simpo", CpoOptions(beta, label_smoothing, simpo_gamma=gamma)
