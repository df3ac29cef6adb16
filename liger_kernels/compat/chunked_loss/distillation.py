"""The loss of a student that learns from a teacher's distribution."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from liger_kernels import ops
from liger_kernels.compat.chunked_loss.tokens import LinearLoss
from liger_kernels.ops.losses.options import IGNORE_INDEX, wide_dtype

__all__ = ["LigerFusedLinearJSDLoss"]


class LigerFusedLinearJSDLoss(LinearLoss):
    """The generalized Jensen-Shannon divergence from a teacher, and the loss of the labels.

    Args:
        weight_hard_loss: Of the cross entropy with the labels.
        weight_soft_loss: Of the divergence.
        beta: 0 is the forward KL from the teacher, 1 the reverse one; as ops.divergence takes it.
        ignore_index: Label of tokens that are left out of both.
        temperature: Divides the logits of both sides in the divergence.
        compiled: Changes nothing here; so does chunk_size.
        chunk_size: See compiled.
        return_soft_hard_loss: Return the divergence and the cross entropy too.
    """

    def __init__(
        self,
        weight_hard_loss: float = 0.5,
        weight_soft_loss: float = 0.5,
        beta: float = 0.5,
        ignore_index: int = IGNORE_INDEX,
        temperature: float = 1.0,
        compiled: bool = True,
        chunk_size: int = 1024,
        return_soft_hard_loss: bool = False,
    ) -> None:
        super().__init__(compiled=compiled, chunk_size=chunk_size)
        self.weights = weight_hard_loss, weight_soft_loss
        self.ignore_index = ignore_index
        self.options = {"beta": beta, "temperature": temperature}
        self.return_soft_hard_loss = return_soft_hard_loss

    def forward(
        self,
        student_input: Tensor,
        student_weight: Tensor,
        teacher_input: Tensor,
        teacher_weight: Tensor,
        true_labels: Tensor,
        student_bias: Tensor | None = None,
        teacher_bias: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """Compute the mean over the tokens that have a label; labels are not shifted.

        Args:
            student_input: (..., H); teacher_input (..., G) has the same tokens.
            true_labels: (...).
        """
        hard_weight, soft_weight = self.weights
        hard: Any = student_weight.new_zeros((), dtype=wide_dtype(student_weight.dtype))
        if hard_weight or self.return_soft_hard_loss:
            hard = ops.fused_linear_cross_entropy(
                student_input,
                student_weight,
                true_labels,
                bias=student_bias,
                ignore_index=self.ignore_index,
            )
        is_counted = true_labels != self.ignore_index
        soft = ops.fused_linear_divergence(
            student_input[is_counted.to(student_input.device)],
            student_weight,
            teacher_input[is_counted.to(teacher_input.device)],
            teacher_weight,
            bias=student_bias,
            teacher_bias=teacher_bias,
            reduction="mean",
            **self.options,
        )
        loss = hard_weight * hard + soft_weight * soft
        if not self.return_soft_hard_loss:
            return loss
        return loss, soft.detach(), hard.detach()
