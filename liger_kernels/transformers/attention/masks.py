"""Masks of transformers that are made only where a layer reads one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import masking_utils

from liger_kernels.transformers.attention.kernel import Lengths

__all__ = ["DeferredMask", "defer_mask", "document_numbers"]


class DeferredMask:
    """The arguments of a mask of transformers, in place of the mask.

    One is shared by all layers that have the same mask, and so are the masks that it makes.

    Args:
        arguments: What transformers calls the functions of AttentionMaskInterface with.

    Attributes:
        is_padded: Whether rows have padding, which lengths do not tell.
        is_custom: Whether the model added something to the mask of its layer type.
    """

    def __init__(self, arguments: dict[str, Any]) -> None:
        self._arguments = arguments
        self._made: dict[str, Any] = {}
        self.is_padded = arguments.get("attention_mask") is not None
        self.is_custom = bool(arguments.get("use_vmap", False))

    def make(self, name: str, lengths: Lengths | None = None) -> Any:
        """Return the mask for an attention of transformers: sdpa or flex_attention.

        Args:
            name: Of the attention.
            lengths: Of documents, which then do not see each other; the same in all calls.
        """
        if name not in self._made:
            arguments = self._arguments
            if lengths is not None:
                arguments = {**arguments, **_separated(arguments, lengths)}
            function = masking_utils.ALL_MASK_ATTENTION_FUNCTIONS[name]
            self._made[name] = function(**arguments)
        return self._made[name]


def _separated(arguments: dict[str, Any], lengths: Lengths) -> dict[str, Any]:
    batch_size = arguments["batch_size"]
    num_tokens = batch_size * arguments["kv_length"]
    numbers = document_numbers(lengths.ends_k, num_tokens).view(batch_size, -1)
    same = masking_utils.packed_sequence_mask_function(numbers)
    mask_function = masking_utils.and_masks(arguments["mask_function"], same)
    return {"mask_function": mask_function, "allow_is_causal_skip": False}


def document_numbers(ends: Tensor, num_tokens: int) -> Tensor:
    """Return the number of the document of each token, (T,) int64; empty ones are skipped.

    Args:
        ends: (N + 1,), 0 and the end of each document.
        num_tokens: T, of all documents.
    """
    places = torch.arange(num_tokens, device=ends.device, dtype=ends.dtype)
    return torch.searchsorted(ends[1:].contiguous(), places, right=True)


def defer_mask(**arguments: Any) -> DeferredMask:
    """Return the mask of liger_varlen, with the call of AttentionMaskInterface."""
    return DeferredMask(arguments)
