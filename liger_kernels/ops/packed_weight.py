"""Frozen weights in few bits: recognised, and unpacked for a product."""

import sys
from typing import Any

import torch


class PackedFormat:
    """The format of a frozen weight that is held in few bits, kept on the weight as `quant_state`.

    A linear layer whose weight has one computes x @ unpack(weight).t() + bias, and nothing else.
    States of bitsandbytes are known without it.
    """

    # (N, K), as the unpacked weight.
    shape: torch.Size

    def unpack(self, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return the weight (N, K) in dtype."""
        raise NotImplementedError


def frozen_weight(weight: Any, dtype: torch.dtype) -> torch.Tensor:
    """Return a frozen weight (N, K) in dtype: itself, cast, or dequantised from few bits."""
    state = getattr(weight, "quant_state", None)
    if isinstance(state, PackedFormat):
        return state.unpack(weight, dtype)
    if state is not None:
        # The code that made the weight has imported it.
        functional = sys.modules["bitsandbytes"].functional
        weight = functional.dequantize_4bit(weight.data, state)
    return weight if weight.dtype == dtype else weight.to(dtype)


def is_packed(weight: Any) -> bool:
    """Return whether a weight is in 4 bits, as bitsandbytes packs it, or in a format given."""
    return getattr(weight, "quant_state", None) is not None


def has_own_format(weight: Any) -> bool:
    """Return whether a weight brings the way to unpack it, a PackedFormat."""
    return isinstance(getattr(weight, "quant_state", None), PackedFormat)
