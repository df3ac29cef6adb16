"""NEFTune: noise on the embeddings of a training step (https://arxiv.org/abs/2310.05914)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from liger_kernels.transformers.wrappers import inner_model

__all__ = ["add_embedding_noise"]


def add_embedding_noise(model: Any, alpha: float) -> None:
    """Add uniform noise to the embeddings of a model while it is in training mode.

    Each element gets noise of at most alpha / sqrt(L * D) in size, as in the Trainer of
    transformers, from the generator of the device, whose state a checkpoint has.

    Args:
        model: Its input embedding returns (B, L, D); it may be wrapped.
        alpha: Above 0.
    """

    def with_noise(module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        if not module.training:
            return output
        bound = alpha / math.sqrt(output.shape[1] * output.shape[2])
        return output + torch.empty_like(output).uniform_(-bound, bound)

    inner_model(model).get_input_embeddings().register_forward_hook(with_noise)
