"""The modules under the names of liger_kernel.transformers: parameters around one op each.

Parameters have the names and shapes of the stock modules, so state dicts load both ways.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from liger_kernels import ops
from liger_kernels.compat import functional, functions
from liger_kernels.compat.functional import cast_of, refuse
from liger_kernels.ops.losses.options import IGNORE_INDEX

__all__ = [
    "LigerCrossEntropyLoss",
    "LigerFusedAddRMSNorm",
    "LigerFusedLinearCrossEntropyLoss",
    "LigerGEGLUMLP",
    "LigerLayerNorm",
    "LigerRMSNorm",
    "LigerSwiGLUMLP",
]

_FILLS = {"ones": torch.ones, "zeros": torch.zeros}


def _weight(hidden_size: int, init_fn: str) -> nn.Parameter:
    if init_fn not in _FILLS:
        allowed = " or ".join(map(repr, _FILLS))
        raise ValueError(f"init_fn must be {allowed}, got {init_fn!r}")
    return nn.Parameter(_FILLS[init_fn](hidden_size))


class LigerRMSNorm(nn.Module):
    """RMS norm with the constructor of transformers' norms, LlamaRMSNorm by default.

    Args:
        hidden_size: Width of the last dimension.
        eps: Added to the mean of squares.
        offset: Added to the weight; 1.0 with casting_mode "gemma" and init_fn "zeros" for Gemma.
        casting_mode: "llama" or "gemma", as liger_rms_norm takes it.
        init_fn: What the weight starts as: "ones" or "zeros".
        in_place: Must be False: no input is written to.
    """

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-6,
        offset: float = 0.0,
        casting_mode: str = "llama",
        init_fn: str = "ones",
        in_place: bool = False,
    ) -> None:
        super().__init__()
        refuse(type(self).__name__, in_place=in_place)
        cast_of(casting_mode)
        self.weight = _weight(hidden_size, init_fn)
        self.variance_epsilon = eps
        self.offset = offset
        self.casting_mode = casting_mode

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return the norm over the last dimension."""
        return functional.liger_rms_norm(
            hidden_states, self.weight, self.variance_epsilon, self.offset, self.casting_mode
        )

    def extra_repr(self) -> str:
        """Return the options for print(model)."""
        return f"{tuple(self.weight.shape)}, eps={self.variance_epsilon}, offset={self.offset}"


class LigerFusedAddRMSNorm(LigerRMSNorm):
    """RMS norm of the sum of two tensors, which is returned too; built as LigerRMSNorm."""

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, residual: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the norm of hidden_states + residual over the last dimension, and the sum."""
        return functions.fused_add_rms_norm(
            hidden_states,
            residual,
            self.weight,
            self.variance_epsilon,
            self.offset,
            self.casting_mode,
        )


class LigerLayerNorm(nn.Module):
    """Layer norm over the last dimension.

    Args:
        hidden_size: Width of the last dimension.
        eps: Added to the variance; torch's default is 1e-5.
        bias: Whether there is a bias, which starts as zeros.
        init_fn: What the weight starts as: "ones" or "zeros".
    """

    def __init__(
        self, hidden_size: int, eps: float = 1e-6, bias: bool = False, init_fn: str = "ones"
    ) -> None:
        super().__init__()
        self.weight = _weight(hidden_size, init_fn)
        self.bias = nn.Parameter(torch.zeros(hidden_size)) if bias else None
        self.variance_epsilon = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return the norm over the last dimension."""
        return ops.layer_norm(hidden_states, self.weight, self.bias, self.variance_epsilon)

    def extra_repr(self) -> str:
        """Return the options for print(model)."""
        return f"{tuple(self.weight.shape)}, eps={self.variance_epsilon}"


class _GatedMLP(nn.Module):
    """gate_proj, up_proj and down_proj of the sizes that a transformers configuration gives."""

    # The op's approximate for each name of an activation; without one, the op has none.
    _activations: dict[str, str | None]

    def __init__(self, config: Any) -> None:
        super().__init__()
        name = getattr(config, "hidden_activation", None) or config.hidden_act
        if name not in self._activations:
            raise ValueError(
                f"{type(self).__name__} needs a configuration whose activation is one of "
                f"{', '.join(self._activations)}, got {name!r}"
            )
        self._approximate: Any = self._activations[name]
        has_bias = getattr(config, "mlp_bias", False)
        width, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(width, inner, bias=has_bias)
        self.up_proj = nn.Linear(width, inner, bias=has_bias)
        self.down_proj = nn.Linear(inner, width, bias=has_bias)


class LigerSwiGLUMLP(_GatedMLP):
    """down(silu(gate(x)) * up(x)), built from a configuration as LlamaMLP."""

    _activations = {"silu": None, "swish": None}

    def forward(self, x: Tensor) -> Tensor:
        """Return the MLP of x."""
        return self.down_proj(ops.swiglu(self.gate_proj(x), self.up_proj(x)))


class LigerGEGLUMLP(_GatedMLP):
    """down(gelu(gate(x)) * up(x)), built from a configuration as GemmaMLP."""

    _activations = {"gelu_pytorch_tanh": "tanh", "gelu_new": "tanh", "gelu": "none"}

    def forward(self, x: Tensor) -> Tensor:
        """Return the MLP of x."""
        gate, up = self.gate_proj(x), self.up_proj(x)
        return self.down_proj(ops.geglu(gate, up, approximate=self._approximate))


class _Loss(nn.Module):
    """The options of a loss; arguments are keywords, as torch's and ours stand in another order."""

    def __init__(
        self,
        *,
        ignore_index: int = IGNORE_INDEX,
        lse_square_scale: float = 0.0,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        softcap: float | None = None,
        return_z_loss: bool = False,
    ) -> None:
        super().__init__()
        refuse(type(self).__name__, return_z_loss=return_z_loss)
        self.options: dict[str, Any] = {
            "ignore_index": ignore_index,
            "lse_square_scale": lse_square_scale,
            "label_smoothing": label_smoothing,
            "reduction": reduction,
            "softcap": softcap,
        }


class LigerCrossEntropyLoss(_Loss):
    """liger_cross_entropy with its options; weight is the class weights."""

    weight: Tensor | None

    def __init__(self, *, weight: Tensor | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.register_buffer("weight", weight)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Return the loss of logits."""
        return functional.liger_cross_entropy(input, target, self.weight, **self.options)


class LigerFusedLinearCrossEntropyLoss(_Loss):
    """liger_fused_linear_cross_entropy with its options; ce_weight is the class weights."""

    ce_weight: Tensor | None

    def __init__(self, *, ce_weight: Tensor | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.register_buffer("ce_weight", ce_weight)

    def forward(
        self, lin_weight: Tensor, input: Tensor, target: Tensor, bias: Tensor | None = None, /
    ) -> Tensor:
        """Return the loss of input @ lin_weight.T + bias; the head's weight comes first."""
        return functional.liger_fused_linear_cross_entropy(
            input, lin_weight, target, bias, self.ce_weight, **self.options
        )
