"""The names of liger_kernel.ops, and the loss that models call with hidden states.

Callers use these names by `apply` alone, with positional arguments. Those of the losses return four
values, as liger_kernel does since it has predicted tokens; what was not asked for is None.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from liger_kernels import ops
from liger_kernels.compat import functional, losses
from liger_kernels.compat.arguments import cast_of, refuse
from liger_kernels.compat.loss_results import CrossEntropyOutput
from liger_kernels.ops.losses.options import IGNORE_INDEX

__all__ = [
    "LigerCrossEntropyFunction",
    "LigerFusedAddRMSNormFunction",
    "LigerFusedLinearCrossEntropyFunction",
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
    in_place: bool = True,
) -> tuple[Tensor, Tensor]:
    """Return the RMS norm of x + residual, and x + residual; options as liger_rms_norm takes them.

    Raises:
        ValueError: As ops.fused_add_rms_norm, or casting_mode is unknown.
    """
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


_Values = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]

_CROSS_ENTROPY_ORDER = (
    *("input", "target", "weight", "ignore_index", "lse_square_scale", "label_smoothing"),
    *("reduction", "softcap", "return_z_loss", "return_token_accuracy", "return_predicted_tokens"),
)


# Options of the loss that LigerForCausalLMLoss passes on.
_OF_LOSS = {
    *("bias", "ce_weight", "lse_square_scale", "label_smoothing"),
    *("return_z_loss", "accum_dtype", "use_token_scaling"),
}
# What a forward of transformers passes to its attention and to its loss alike (TransformersKwargs).
_OF_FORWARD = {
    *("output_hidden_states", "output_attentions", "output_router_logits", "position_ids"),
    *("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "is_causal", "seq_idx"),
}


def _values(found: Tensor | CrossEntropyOutput) -> _Values:
    if isinstance(found, Tensor):
        return found, None, None, None
    return found.loss, found.z_loss, found.token_accuracy, found.predicted_tokens


class LigerCrossEntropyFunction:
    """liger_cross_entropy by apply, with the arguments in the order of _CROSS_ENTROPY_ORDER."""

    @staticmethod
    def apply(*arguments: Any) -> _Values:
        """Compute loss, z-loss, token accuracy and predicted tokens."""
        named = dict(zip(_CROSS_ENTROPY_ORDER, arguments, strict=False))
        if len(named) < len(arguments):
            raise TypeError(
                f"LigerCrossEntropyFunction.apply takes at most {len(named)} arguments, got "
                f"{len(arguments)}"
            )
        return _values(losses.liger_cross_entropy(**named))


class LigerFusedLinearCrossEntropyFunction:
    """liger_fused_linear_cross_entropy by apply, with its arguments in their order."""

    @staticmethod
    def apply(*arguments: Any) -> _Values:
        """Compute loss, z-loss, token accuracy and predicted tokens."""
        return _values(losses.liger_fused_linear_cross_entropy(*arguments))


def LigerForCausalLMLoss(  # noqa: N802
    hidden_states: Tensor,
    lm_head_weight: Tensor,
    labels: Tensor | None,
    hidden_size: int,
    num_items_in_batch: int | Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    shift_labels: Tensor | None = None,
    final_logit_softcapping: float | None = None,
    return_token_accuracy: bool = False,
    return_predicted_tokens: bool = False,
    **options: Any,
) -> Tensor | CrossEntropyOutput:
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
        return_token_accuracy: Return a CrossEntropyOutput that has it.
        return_predicted_tokens: As return_token_accuracy; one for each of the flat hidden states.
        options: Those of liger_fused_linear_cross_entropy, and those that a model's forward passes
            on to every part of it (TransformersKwargs), which no loss reads.

    Raises:
        ValueError: There are no labels, hidden_size is another, reduction is given, or an option is
            unknown and set.
    """
    if hidden_states.shape[-1] != hidden_size:
        raise ValueError(
            f"hidden_size must be the width of hidden_states, {hidden_states.shape[-1]}, got "
            f"{hidden_size}"
        )
    if shift_labels is None:
        if labels is None:
            raise ValueError("LigerForCausalLMLoss needs labels or shift_labels, got neither")
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    options = {name: value for name, value in options.items() if name not in _OF_FORWARD}
    chosen = {name: options.pop(name) for name in _OF_LOSS & options.keys()}
    refuse("LigerForCausalLMLoss", **options)
    return losses.liger_fused_linear_cross_entropy(
        hidden_states.reshape(-1, hidden_size),
        lm_head_weight,
        shift_labels.reshape(-1).to(hidden_states.device),
        ignore_index=ignore_index,
        softcap=final_logit_softcapping,
        normalizer=num_items_in_batch,
        return_token_accuracy=return_token_accuracy,
        return_predicted_tokens=return_predicted_tokens,
        **chosen,
    )
