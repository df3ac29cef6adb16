"""The names of liger_kernel.ops, and the loss that models call with hidden states.

Callers use these names by `apply` alone, with positional arguments. Names whose returned values
differ between versions of liger_kernel, those of the losses, are not here.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from liger_kernels import ops
from liger_kernels.compat import functional
from liger_kernels.compat.functional import cast_of, refuse
from liger_kernels.ops.losses.options import IGNORE_INDEX

__all__ = [
    "LigerFusedAddRMSNormFunction",
    "LigerGELUMulFunction",
    "LigerLayerNormFunction",
    "LigerRMSNormFunction",
    "LigerRopeFunction",
    "LigerSiLUMulFunction",
]


def fused_add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float,
    offset: float = 0.0,
    casting_mode: str = "llama",
    in_place: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return the RMS norm of x + residual, and x + residual; options as liger_rms_norm takes them.

    Raises:
        ValueError: As ops.fused_add_rms_norm; casting_mode is another, or in_place is asked for.
    """
    refuse("LigerFusedAddRMSNorm", in_place=in_place)
    found: Any = ops.fused_add_rms_norm(
        x, residual, weight, eps, offset=offset, cast=cast_of(casting_mode)
    )
    return found


class LigerRMSNormFunction:
    """liger_rms_norm: apply(x, weight, eps, offset, casting_mode, in_place)."""

    apply = staticmethod(functional.liger_rms_norm)


class LigerFusedAddRMSNormFunction:
    """Norm of a sum: apply(x, residual, weight, eps, offset, casting_mode, in_place)."""

    apply = staticmethod(fused_add_rms_norm)


class LigerLayerNormFunction:
    """liger_layer_norm: apply(x, weight, bias, eps)."""

    apply = staticmethod(functional.liger_layer_norm)


class LigerSiLUMulFunction:
    """liger_swiglu: apply(gate, up)."""

    apply = staticmethod(functional.liger_swiglu)


class LigerGELUMulFunction:
    """liger_geglu: apply(gate, up)."""

    apply = staticmethod(functional.liger_geglu)


class LigerRopeFunction:
    """liger_rope: apply(q, k, cos, sin, position_ids, unsqueeze_dim)."""

    apply = staticmethod(functional.liger_rope)


def LigerForCausalLMLoss(  # noqa: N802
    hidden_states: Tensor,
    lm_head_weight: Tensor,
    labels: Tensor | None,
    hidden_size: int,
    num_items_in_batch: int | Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    shift_labels: Tensor | None = None,
    final_logit_softcapping: float | None = None,
    **options: Any,
) -> Tensor:
    """Compute the loss of a causal model from hidden states, as transformers' ForCausalLMLoss.

    Args:
        hidden_states: (B, T, H), or (..., H) with shift_labels.
        lm_head_weight: (V, H).
        labels: (B, T), shifted here; not needed with shift_labels.
        hidden_size: H.
        num_items_in_batch: Divides the sum of the loss; None for the number of labels.
        ignore_index: Tokens with this label are left out.
        shift_labels: Labels of each hidden state, or None.
        final_logit_softcapping: Cap of the logits, or None.
        options: Must be None or False each.

    Raises:
        ValueError: There are no labels, hidden_size is another, or an option is set.
    """
    refuse("LigerForCausalLMLoss", **options)
    if hidden_states.shape[-1] != hidden_size:
        raise ValueError(
            f"hidden_size must be the width of hidden_states, {hidden_states.shape[-1]}, got "
            f"{hidden_size}"
        )
    if shift_labels is None:
        if labels is None:
            raise ValueError("LigerForCausalLMLoss needs labels or shift_labels, got neither")
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    loss: Any = ops.fused_linear_cross_entropy(
        hidden_states.reshape(-1, hidden_size),
        lm_head_weight,
        shift_labels.reshape(-1).to(hidden_states.device),
        ignore_index=ignore_index,
        softcap=final_logit_softcapping,
        normalizer=num_items_in_batch,
    )
    return loss
