"""Patching Hugging Face models. Names are resolved when first used: importing this is free."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from liger_kernels.transformers.api import apply_liger_kernel, inspect_model, patched
    from liger_kernels.transformers.divergence import token_divergence
    from liger_kernels.transformers.loading import AutoLigerKernelForCausalLM
    from liger_kernels.transformers.logprobs import token_logprobs
    from liger_kernels.transformers.patching.engine import PatchRecord, restore
    from liger_kernels.transformers.patching.plan import Patch, PatchPlan, Skip

_HOMES = {
    "AutoLigerKernelForCausalLM": "loading",
    "Patch": "patching.plan",
    "PatchPlan": "patching.plan",
    "PatchRecord": "patching.engine",
    "Skip": "patching.plan",
    "apply_liger_kernel": "api",
    "inspect_model": "api",
    "patched": "api",
    "restore": "patching.engine",
    "token_divergence": "divergence",
    "token_logprobs": "logprobs",
}
_FAMILY_PREFIX = "apply_liger_kernel_to_"

__all__ = [
    "AutoLigerKernelForCausalLM",
    "Patch",
    "PatchPlan",
    "PatchRecord",
    "Skip",
    "apply_liger_kernel",
    "inspect_model",
    "patched",
    "restore",
    "token_divergence",
    "token_logprobs",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    if name.startswith(_FAMILY_PREFIX):
        functions = importlib.import_module(f"{__name__}.class_mode").FAMILY_FUNCTIONS
        if name in functions:
            return functions[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    families = importlib.import_module(f"{__name__}.patching.families").FAMILIES
    return sorted([*globals(), *__all__, *(_FAMILY_PREFIX + name for name in families)])
