"""The loss of answers that are labelled good or bad."""

from __future__ import annotations

import torch
from torch import Tensor

from liger_kernels.compat.chunked_loss.tokens import (
    Head,
    LinearLoss,
    answer_logps,
    logit_sum,
    reference_logps,
)
from liger_kernels.ops.losses.options import IGNORE_INDEX, wide_dtype
from liger_kernels.preferences.unpaired_losses import kto_losses

__all__ = ["LigerFusedLinearKTOLoss"]


class LigerFusedLinearKTOLoss(LinearLoss):
    """KTO: each answer compared with a reference, and with the KL that the caller measured.

    Args:
        ignore_index: Label of tokens that are left out.
        beta: Multiplies log-ratios.
        compiled: Changes nothing here; so does chunk_size.
        use_ref_model: Whether forward gets a reference.
        average_log_prob: Means over the tokens of an answer in place of sums.
        chunk_size: See compiled.
    """

    def __init__(
        self,
        ignore_index: int = IGNORE_INDEX,
        beta: float = 0.1,
        compiled: bool = True,
        use_ref_model: bool = False,
        average_log_prob: bool = False,
        chunk_size: int = 1,
    ) -> None:
        super().__init__(compiled=compiled, chunk_size=chunk_size)
        self.ignore_index = ignore_index
        self.beta = beta
        self.use_ref_model = use_ref_model
        self.average = average_log_prob

    def forward(
        self,
        _input: Tensor,
        lin_weight: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        preference_labels: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        kl: Tensor | float | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Compute the mean loss of hidden states (B, T, H) and labels (B, T), not shifted.

        Args:
            preference_labels: (B,) bool, True for a good answer.
            kl: A number, or None for 0.

        Returns:
            The loss, and sums over good and over bad answers in turn: of log-probabilities, of all
            logits, of rewards.

        Raises:
            ValueError: There are no labels, kl is not one number, or the reference is not as
                use_ref_model says.
        """
        name = type(self).__name__
        if preference_labels is None or preference_labels.shape != target.shape[:1]:
            shape = None if preference_labels is None else tuple(preference_labels.shape)
            raise ValueError(
                f"{name} needs preference_labels of shape ({len(target)},), got {shape}"
            )
        if isinstance(kl, Tensor) and kl.numel() != 1:
            raise ValueError(f"{name} takes one number for kl, got a tensor {tuple(kl.shape)}")
        reference = reference_logps(
            name,
            (ref_input, ref_weight, ref_bias),
            target,
            self.ignore_index,
            self.use_ref_model,
        )
        head = Head(_input, lin_weight, bias)
        logps = answer_logps(head, target, self.ignore_index).values(self.average)
        shift = kl.to(logps) if isinstance(kl, Tensor) else kl or 0.0
        ratios = logps if reference is None else logps - reference.values(self.average)
        is_good = preference_labels.to(logps.device).bool()
        loss = kto_losses(ratios, is_good, shift, self.beta).mean()
        kinds = is_good, ~is_good
        values = torch.stack(
            [
                *((logps * kind).sum() for kind in kinds),
                *(logit_sum(head, kind) for kind in kinds),
                *((self.beta * ratios * kind).sum() for kind in kinds),
            ]
        )
        dtype = wide_dtype(lin_weight.dtype)
        return loss.to(dtype), tuple(values.detach().to(dtype))
