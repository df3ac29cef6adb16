"""Log-probabilities of answers: sums over the scored tokens of each, in float64.

A sum over 2048 tokens in float32 is wrong by 3e-3, which is much of a margin; in float64 by 5e-5,
which are the errors of the tokens themselves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from liger_cli.data.class_formats import TARGETS
from liger_cli.data.encode import IGNORED
from liger_cli.data.pair_formats import ANSWER_FIGURES
from liger_cli.training.objectives.objective import Batch
from liger_kernels.ops import sequence_sums
from liger_kernels.transformers import token_logprobs
from liger_kernels.transformers.wrappers import forward_parameters

__all__ = ["Answers", "model_inputs", "token_values"]

# Keys of a batch that no forward takes.
_NOT_INPUTS = frozenset(
    {
        *("labels", "num_tokens", "answer_ids", "num_answers", "num_pairs", "kl"),
        *(*ANSWER_FIGURES, TARGETS),
    }
)


@dataclass(frozen=True)
class Answers:
    """The scored tokens of a batch of M answers.

    Of pairs the chosen answer of pair i has the number 2i, the rejected one 2i + 1.

    Attributes:
        numbers: (B, T - 1) int64, the answer of each token that the batch predicts; -1 of those
            that are not scored.
        lengths: (M,) float64, scored tokens of each answer.
        weights: (B, T - 1) float64; tokens beyond the shorter answer of a pair may count less.
    """

    numbers: torch.Tensor
    lengths: torch.Tensor
    weights: torch.Tensor | None

    @classmethod
    def of(cls, batch: Batch, device: torch.device, ld_alpha: float | None = None) -> Answers:
        """Find the scored tokens of a batch on the host.

        Args:
            batch: Collated answers, with labels and answer_ids, (B, T) int64.
            device: Where the values will be.
            ld_alpha: Weight of tokens beyond the shorter answer of a pair; None weighs none.
        """
        is_scored = batch["labels"][:, 1:] != IGNORED
        numbers = torch.where(is_scored, batch["answer_ids"][:, 1:], -1)
        lengths = torch.bincount(numbers[is_scored], minlength=int(batch["num_answers"]))
        weights = None
        if ld_alpha is not None:
            weights = _length_weights(numbers, lengths, ld_alpha).to(device)
        return cls(numbers.to(device), lengths.double().to(device), weights)

    def sums(self, values: torch.Tensor, *, weighted: bool = False) -> torch.Tensor:
        """Return the sum over each answer, (M,) float64, the same in every run.

        Args:
            values: (B, T - 1), of the tokens that the batch predicts.
            weighted: Whether tokens beyond the shorter answer count less.
        """
        if weighted and self.weights is not None:
            values = values.double() * self.weights
        return sequence_sums(values, self.numbers, len(self.lengths))


def _length_weights(numbers: torch.Tensor, lengths: torch.Tensor, ld_alpha: float) -> torch.Tensor:
    """Return 1 for the first tokens of each answer, as many as its pair shares, else ld_alpha."""
    flat = numbers.flatten()
    # By answer, and in the order of the batch within one.
    ordered, places = flat.sort(stable=True)
    is_scored = ordered >= 0
    ordered, places = ordered[is_scored], places[is_scored]
    positions = torch.arange(len(ordered)) - (lengths.cumsum(0) - lengths)[ordered]
    shared = lengths.view(-1, 2).min(1).values.repeat_interleave(2)
    weights = torch.ones(flat.shape, dtype=torch.float64)
    weights[places[positions >= shared[ordered]]] = ld_alpha
    return weights.view(numbers.shape)


def model_inputs(batch: Batch, device: torch.device) -> dict[str, Any]:
    """Return the arguments of a model's forward, on the device."""
    return {
        key: value.to(device, non_blocking=True) if hasattr(value, "to") else value
        for key, value in batch.items()
        if key not in _NOT_INPUTS
    }


def token_values(
    model: Any,
    batch: Batch,
    device: torch.device,
    *,
    temperature: float = 1.0,
    balances: bool = False,
) -> Any:
    """Return the values of token_logprobs for the labels of a batch: logprob and aux_loss.

    Args:
        balances: Whether aux_loss, the balance of the model's experts, is asked for; else None.
    """
    labels = batch["labels"].to(device, non_blocking=True)
    inputs = model_inputs(batch, device)
    if "output_router_logits" in forward_parameters(model):
        inputs["output_router_logits"] = balances
    outputs = ("logprob", "aux_loss")
    return token_logprobs(model, inputs, labels, temperature=temperature, outputs=outputs)
