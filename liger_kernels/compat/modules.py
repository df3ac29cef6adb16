"""The modules under the names of liger_kernel.transformers: parameters around one op each.

Parameters have the names and shapes of the stock modules, so state dicts load both ways.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from liger_kernels import ops
from liger_kernels.compat import functional, functions, losses
from liger_kernels.compat.arguments import cast_of, refuse
from liger_kernels.compat.loss_results import CrossEntropyOutput
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
        casting_mode: "llama", "gemma" or "none", as liger_rms_norm takes it.
        init_fn: What the weight starts as: "ones" or "zeros".
        in_place: A permission to overwrite a gradient, which no op uses.
        row_mode: Must be None or False: the op chooses its launch.
        elementwise_affine: Whether there is a weight.
    """

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-6,
        offset: float = 0.0,
        casting_mode: str = "llama",
        init_fn: str = "ones",
        in_place: bool = True,
        row_mode: bool | None = None,
        elementwise_affine: bool = True,
    ) -> None:
        super().__init__()
        refuse(type(self).__name__, row_mode=row_mode)
        cast_of(casting_mode)
        weight = _weight(hidden_size, init_fn)
        self.weight = weight if elementwise_affine else None
        self.width = hidden_size
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
        return f"({self.width},), eps={self.variance_epsilon}, offset={self.offset}"


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


# ops.geglu's approximate for each name of the activation.
_GELUS = {"gelu_pytorch_tanh": "tanh", "gelu_new": "tanh", "gelu": "none"}
SILUS = ("silu", "swish")


def check_activation(module: nn.Module, config: Any, allowed: Iterable[str]) -> str:
    """Return the activation of a configuration.

    Raises:
        ValueError: The module has another.
    """
    name: str = getattr(config, "hidden_activation", None) or config.hidden_act
    if name not in allowed:
        raise ValueError(
            f"{type(module).__name__} needs a configuration whose activation is one of "
            f"{', '.join(allowed)}, got {name!r}"
        )
    return name


class _GatedMLP(nn.Module):
    """gate_proj, up_proj and down_proj of the sizes that a transformers configuration gives."""

    def __init__(self, config: Any, intermediate_size: int | None = None) -> None:
        super().__init__()
        has_bias = getattr(config, "mlp_bias", False)
        width, inner = config.hidden_size, intermediate_size or config.intermediate_size
        self.gate_proj = nn.Linear(width, inner, bias=has_bias)
        self.up_proj = nn.Linear(width, inner, bias=has_bias)
        self.down_proj = nn.Linear(inner, width, bias=has_bias)


class LigerSwiGLUMLP(_GatedMLP):
    """down(silu(gate(x)) * up(x)), built from a configuration as LlamaMLP."""

    def __init__(self, config: Any, intermediate_size: int | None = None) -> None:
        super().__init__(config, intermediate_size)
        check_activation(self, config, SILUS)

    def forward(self, x: Tensor) -> Tensor:
        """Return the MLP of x."""
        return self.down_proj(ops.swiglu(self.gate_proj(x), self.up_proj(x)))


class LigerGEGLUMLP(_GatedMLP):
    """down(gelu(gate(x)) * up(x)), built from a configuration as GemmaMLP."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self._approximate: Any = _GELUS[check_activation(self, config, _GELUS)]

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
        return_token_accuracy: bool = False,
        return_predicted_tokens: bool = False,
    ) -> None:
        super().__init__()
        self.options: dict[str, Any] = {
            "ignore_index": ignore_index,
            "lse_square_scale": lse_square_scale,
            "label_smoothing": label_smoothing,
            "reduction": reduction,
            "softcap": softcap,
            "return_z_loss": return_z_loss,
            "return_token_accuracy": return_token_accuracy,
            "return_predicted_tokens": return_predicted_tokens,
        }


class LigerCrossEntropyLoss(_Loss):
    """liger_cross_entropy with its options; weight is the class weights."""

    weight: Tensor | None

    def __init__(self, *, weight: Tensor | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.register_buffer("weight", weight)

    def forward(self, input: Tensor, target: Tensor) -> Tensor | CrossEntropyOutput:
        """Return the loss of logits."""
        return losses.liger_cross_entropy(input, target, self.weight, **self.options)


class LigerFusedLinearCrossEntropyLoss(_Loss):
    """liger_fused_linear_cross_entropy with its options; ce_weight is the class weights."""

    ce_weight: Tensor | None

    def __init__(
        self,
        *,
        ce_weight: Tensor | None = None,
        accum_dtype: torch.dtype | None = None,
        use_token_scaling: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        refuse(type(self).__name__, accum_dtype=accum_dtype)
        self.options["use_token_scaling"] = use_token_scaling
        self.register_buffer("ce_weight", ce_weight)

    def forward(
        self, lin_weight: Tensor, input: Tensor, target: Tensor, bias: Tensor | None = None, /
    ) -> Tensor | CrossEntropyOutput:
        """Return the loss of input @ lin_weight.T + bias; the head's weight comes first."""
        return losses.liger_fused_linear_cross_entropy(
            input, lin_weight, target, bias, self.ce_weight, **self.options
        )
