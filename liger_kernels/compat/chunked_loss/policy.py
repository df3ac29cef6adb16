"""The loss of GRPO and its kin, and the log-probabilities that it starts from."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from liger_kernels import ops
from liger_kernels.compat.chunked_loss.tokens import Head, LinearLoss, token_logps
from liger_kernels.ops.losses.options import IGNORE_INDEX, wide_dtype

__all__ = ["LigerFusedLinearGRPOLoss", "fused_selective_log_softmax"]

# By loss type: whether the ratio may be that of a whole answer.
_TYPES = {
    "grpo": True,
    "bnpo": True,
    "dr_grpo": True,
    "dapo": True,
    "cispo": False,
    "sapo": False,
}
_ELSEWHERE = ("luspo", "vespo")
_LEVELS = ("token", "sequence")


class LigerFusedLinearGRPOLoss(LinearLoss):
    """GRPO (arXiv 2402.03300) and the ways of TRL to bound its ratio and to take its mean.

    Args:
        beta: Weight of the KL to the reference; at 0 none is computed.
        compiled: Changes nothing here; so does chunk_size.
        use_ref_model: Whether there is a reference; without one the KL is 0.
        chunk_size: See compiled.
        epsilon_low: The ratio counts down to 1 - epsilon_low.
        epsilon_high: The ratio counts up to 1 + epsilon_high; of "cispo" up to epsilon_high.
        loss_type: "grpo", "bnpo", "dr_grpo", "dapo", "cispo" or "sapo".
        max_completion_length: Divides the sum of "dr_grpo", with the number of answers.
        importance_sampling_level: "token", or "sequence" for one ratio an answer.
        sapo_temperature_pos: Of "sapo" where the advantage is positive.
        sapo_temperature_neg: Of "sapo" elsewhere.
        temperature: Divides the logits.
        delta: Bound of the ratio where it is not clipped, or None.
        use_bias_correction_kl: Multiply the KL by the ratio.
        others: Of loss types that are not here.

    Raises:
        ValueError: An option is off.
        NotImplementedError: The loss type is one of liger_kernel that is not here.
    """

    def __init__(
        self,
        beta: float = 0.04,
        compiled: bool = True,
        use_ref_model: bool = True,
        chunk_size: int = 1,
        epsilon_low: float = 0.2,
        epsilon_high: float = 0.2,
        loss_type: str = "dapo",
        max_completion_length: int | None = None,
        importance_sampling_level: str = "token",
        sapo_temperature_pos: float = 1.0,
        sapo_temperature_neg: float = 1.05,
        temperature: float = 1.0,
        delta: float | None = None,
        use_bias_correction_kl: bool = False,
        **others: float,
    ) -> None:
        super().__init__(compiled=compiled, chunk_size=chunk_size)
        _check(loss_type, importance_sampling_level, max_completion_length, others)
        self.beta = beta
        self.use_ref_model = use_ref_model
        self.bounds = 1 - epsilon_low, 1 + epsilon_high
        self.cispo_bound = epsilon_high
        self.loss_type = loss_type
        # 0 where no loss type reads it.
        self.max_completion_length = max_completion_length or 0
        self.level = importance_sampling_level
        self.sapo_temperatures = sapo_temperature_pos, sapo_temperature_neg
        self.temperature = temperature
        self.delta = delta
        self.use_bias_correction_kl = use_bias_correction_kl

    def forward(
        self,
        _input: Tensor,
        lin_weight: Tensor,
        selected_token_ids: Tensor,
        attention_mask: Tensor,
        advantages: Tensor,
        bias: Tensor | None = None,
        ref_per_token_logps: Tensor | None = None,
        old_per_token_logps: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        vllm_is_ratio: Tensor | None = None,
        num_items_in_batch: Tensor | float | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Compute the loss of hidden states (B, T, H) of answers.

        Args:
            selected_token_ids: (B, T) int32 or int64, the token that each hidden state led to.
            attention_mask: (B, T), 0 for tokens that do not count.
            advantages: (B,).
            ref_per_token_logps: (B, T) of the reference; else ref_input, ref_weight, ref_bias.
            old_per_token_logps: (B, T) of the policy that sampled, or None for the model itself.
            vllm_is_ratio: Multiplies the loss of each token before its KL, (B, T), (B, 1) or
                (B,).
            num_items_in_batch: Tokens of all processes, which divide the sums of "dapo" and
                "cispo"; None to count those of this call on all of them.

        Returns:
            The loss, and (the mean KL where beta is not 0, the share of tokens that were clipped).

        Raises:
            ValueError: A shape is off, or there is no reference where beta and use_ref_model ask
                for one.
        """
        shape = selected_token_ids.shape
        _check_shapes(
            shape,
            attention_mask=attention_mask,
            ref_per_token_logps=ref_per_token_logps,
            old_per_token_logps=old_per_token_logps,
        )
        _check_shapes(shape[:1], advantages=advantages)
        mask = attention_mask.to(lin_weight.device, wide_dtype(lin_weight.dtype))
        ids = selected_token_ids.masked_fill(attention_mask == 0, IGNORE_INDEX)
        logps = self._logps(Head(_input, lin_weight, bias), ids)
        old = logps.detach() if old_per_token_logps is None else old_per_token_logps
        ratio = self._ratio(logps - old, mask)
        signed = advantages[:, None].to(logps)
        losses, is_clipped = self._token_losses(ratio, logps, signed)
        if vllm_is_ratio is not None:
            losses = losses * vllm_is_ratio.view(len(losses), -1)
        metrics = []
        if self.beta != 0:
            kl = torch.zeros_like(losses)
            if self.use_ref_model:
                reference = ref_per_token_logps
                if reference is None:
                    reference = self._reference((ref_input, ref_weight, ref_bias), ids)
                kl = torch.exp(reference - logps) - (reference - logps) - 1
                kl = kl * ratio if self.use_bias_correction_kl else kl
            losses = losses + self.beta * kl
            metrics.append(_token_mean(kl, mask))
        metrics.append(_token_mean(is_clipped.to(mask), mask))
        loss = self._mean(losses, mask, num_items_in_batch)
        return loss, tuple(metric.detach() for metric in metrics)

    def _logps(self, head: Head, ids: Tensor) -> Tensor:
        return token_logps(head, ids, ignore_index=IGNORE_INDEX, temperature=self.temperature)

    def _reference(self, reference: tuple[Tensor | None, ...], ids: Tensor) -> Tensor:
        hidden, weight, bias = reference
        if hidden is None or weight is None:
            raise ValueError(
                f"{type(self).__name__} needs ref_per_token_logps, or ref_input and ref_weight; "
                "without a reference use_ref_model=False"
            )
        with torch.no_grad():
            return self._logps(Head(hidden, weight, bias), ids)

    def _ratio(self, log_ratio: Tensor, mask: Tensor) -> Tensor:
        """Return how much likelier a token, or its answer on average, has become."""
        if self.level == "token":
            return log_ratio.exp()
        lengths = mask.sum(-1, keepdim=True).clamp(min=1)
        return ((log_ratio * mask).sum(-1, keepdim=True) / lengths).exp()

    def _token_losses(
        self, ratio: Tensor, logps: Tensor, advantages: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Compute the loss of each token without its KL, and whether its ratio was clipped."""
        is_good = advantages > 0
        if self.loss_type == "cispo":
            weight = ratio.clamp(max=self.cispo_bound).detach()
            return -weight * advantages * logps, (ratio > self.cispo_bound) & is_good
        if self.loss_type == "sapo":
            good, bad = self.sapo_temperatures
            slope = torch.where(is_good, good, bad)
            gate = torch.sigmoid(slope * (ratio - 1)) * 4 / slope
            return -gate * advantages, torch.zeros_like(gate, dtype=torch.bool)
        low, high = self.bounds
        free = ratio if self.delta is None else ratio.clamp(max=self.delta)
        losses = -torch.minimum(free * advantages, ratio.clamp(low, high) * advantages)
        is_clipped = ((ratio < low) & (advantages < 0)) | ((ratio > high) & is_good)
        return losses.expand_as(logps), is_clipped.expand_as(logps)

    def _mean(self, losses: Tensor, mask: Tensor, num_items: Tensor | float | None) -> Tensor:
        if self.loss_type in ("grpo", "sapo"):
            return ((losses * mask).sum(-1) / mask.sum(-1).clamp(min=1)).mean()
        if self.loss_type == "bnpo":
            return _token_mean(losses, mask)
        total = (losses * mask).sum()
        if self.loss_type == "dr_grpo":
            return total / (len(losses) * self.max_completion_length)
        return total / _items_of_a_process(mask, num_items)


def _check(loss_type: str, level: str, max_length: int | None, others: dict[str, float]) -> None:
    if loss_type in _ELSEWHERE:
        raise NotImplementedError(
            f"loss_type {loss_type!r} is not here; TRL's GRPOTrainer has it, on log-probabilities "
            "in chunks"
        )
    if loss_type not in _TYPES:
        raise ValueError(f"loss_type must be one of {', '.join(_TYPES)}, got {loss_type!r}")
    if others:
        names = ", ".join(others)
        raise ValueError(f"LigerFusedLinearGRPOLoss got {names}, which no loss_type here reads")
    if level not in _LEVELS or (level == "sequence" and not _TYPES[loss_type]):
        allowed = " or ".join(_LEVELS) if _TYPES[loss_type] else "token"
        raise ValueError(
            f"importance_sampling_level of loss_type {loss_type!r} must be {allowed}, got {level!r}"
        )
    if loss_type == "dr_grpo" and max_length is None:
        raise ValueError("loss_type 'dr_grpo' needs max_completion_length, got None")


def _check_shapes(shape: torch.Size, **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name} must be {tuple(shape)}, got {tuple(tensor.shape)}")


def _token_mean(values: Tensor, mask: Tensor) -> Tensor:
    return (values * mask).sum() / mask.sum().clamp(min=1)


def _items_of_a_process(mask: Tensor, num_items: Tensor | float | None) -> Tensor | float:
    """Return the mean number of tokens a process, by which the mean over processes is that of all.

    Args:
        num_items: Those of all processes; None to add up what their masks count.
    """
    is_parallel = dist.is_available() and dist.is_initialized()
    if num_items is None:
        counted = mask.sum()
        if is_parallel:
            dist.all_reduce(counted)
        num_items = counted.clamp(min=1)
    return num_items / dist.get_world_size() if is_parallel else num_items


def fused_selective_log_softmax(
    logits: Tensor, input_ids: Tensor, temperature: float = 0.9, mask: Tensor | None = None
) -> Tensor:
    """Compute the log-probability of each id that follows a position; 0 where mask is 0.

    Args:
        logits: (B, T + 1, V), of which the last position predicts nothing.
        input_ids: (B, T) int32 or int64, or (B, T + n) whose last T count.
        temperature: Divides the logits.
        mask: (B, T), or None for all.

    Returns:
        (B, T) fp32 (fp64 for fp64 logits), with a gradient.
    """
    ids = input_ids[:, -(logits.shape[1] - 1) :]
    if mask is not None:
        ids = ids.masked_fill(mask == 0, IGNORE_INDEX)
    losses: Any = ops.cross_entropy(
        logits[:, :-1], ids, scale=1 / temperature, reduction="none", ignore_index=IGNORE_INDEX
    )
    return -losses
