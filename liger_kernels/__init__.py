"""Fused Triton kernels for fine-tuning, and patching Hugging Face models with them.

The names below are those of liger_kernels.ops and liger_kernels.transformers, resolved when first
used: importing this needs no GPU, no Triton and no transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from liger_kernels.ops import (
        cross_entropy,
        divergence,
        fused_add_rms_norm,
        fused_linear_cross_entropy,
        fused_linear_divergence,
        fused_linear_logprobs,
        gated_rms_norm,
        geglu,
        glu_mlp,
        layer_norm,
        lora_linear,
        rms_norm,
        rope,
        sequence_sums,
        swiglu,
    )
    from liger_kernels.transformers import (
        AutoLigerKernelForCausalLM,
        apply_liger_kernel,
        inspect_model,
        patched,
        token_logprobs,
    )

__version__ = "0.1.0"

_PATCHING = (
    "AutoLigerKernelForCausalLM",
    "apply_liger_kernel",
    "inspect_model",
    "patched",
    "token_logprobs",
)

__all__ = [
    "AutoLigerKernelForCausalLM",
    "apply_liger_kernel",
    "cross_entropy",
    "divergence",
    "fused_add_rms_norm",
    "fused_linear_cross_entropy",
    "fused_linear_divergence",
    "fused_linear_logprobs",
    "gated_rms_norm",
    "geglu",
    "glu_mlp",
    "inspect_model",
    "layer_norm",
    "lora_linear",
    "patched",
    "rms_norm",
    "rope",
    "sequence_sums",
    "swiglu",
    "token_logprobs",
]


def __getattr__(name: str) -> Any:
    if name in _PATCHING or name.startswith("apply_liger_kernel_to_"):
        return getattr(importlib.import_module(f"{__name__}.transformers"), name)
    if name in __all__:
        return getattr(importlib.import_module(f"{__name__}.ops"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
