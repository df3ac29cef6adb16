"""The modules of single families under the names of liger_kernel.transformers.

Each is a norm or a gated MLP of modules.py with the constructor and the parameters of the family's
class, so that it can be put in its place.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from liger_kernels import ops
from liger_kernels.compat.modules import SILUS, LigerRMSNorm, LigerSwiGLUMLP, check_activation

__all__ = [
    "LigerBlockSparseTop2MLP",
    "LigerPhi3SwiGLUMLP",
    "LigerQwen3MoeSwiGLUMLP",
    "LigerRMSNormForGemma",
    "LigerRMSNormForGemma2",
    "LigerRMSNormForGemma3",
    "LigerRMSNormForGemma4",
    "LigerRMSNormForGlm4",
    "LigerRMSNormForOlmo2",
    "LigerRMSNormForQwen3Next",
]


class LigerRMSNormForGemma(LigerRMSNorm):
    """LigerRMSNorm with the defaults of GemmaRMSNorm: a weight around 0, rounded after it."""

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-6,
        offset: float = 1.0,
        casting_mode: str = "gemma",
        init_fn: str = "zeros",
        **options: Any,
    ) -> None:
        super().__init__(hidden_size, eps, offset, casting_mode, init_fn, **options)


class LigerRMSNormForGemma2(LigerRMSNormForGemma):
    """LigerRMSNorm with the defaults of Gemma2RMSNorm."""


class LigerRMSNormForGemma3(LigerRMSNormForGemma):
    """LigerRMSNorm with the defaults of Gemma3RMSNorm."""


class LigerRMSNormForQwen3Next(LigerRMSNormForGemma):
    """LigerRMSNorm with the defaults of Qwen3NextRMSNorm."""


class LigerRMSNormForGlm4(LigerRMSNorm):
    """LigerRMSNorm under the name of Glm4RMSNorm, which has the same defaults."""


class LigerRMSNormForOlmo2(LigerRMSNorm):
    """LigerRMSNorm with the defaults of Olmo2RMSNorm: rounded after the weight."""

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-6,
        offset: float = 0.0,
        casting_mode: str = "gemma",
        **options: Any,
    ) -> None:
        super().__init__(hidden_size, eps, offset, casting_mode, **options)


class LigerRMSNormForGemma4(LigerRMSNormForOlmo2):
    """LigerRMSNorm with the defaults of Gemma4RMSNorm; without with_scale there is no weight."""

    def __init__(
        self, hidden_size: int, eps: float = 1e-6, *, with_scale: bool = True, **options: Any
    ) -> None:
        super().__init__(hidden_size, eps, elementwise_affine=with_scale, **options)


class LigerQwen3MoeSwiGLUMLP(LigerSwiGLUMLP):
    """LigerSwiGLUMLP, built as Qwen3MoeMLP."""


class LigerPhi3SwiGLUMLP(nn.Module):
    """down(up * silu(gate)) with gate and up in one matrix, built as Phi3MLP."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        check_activation(self, config, SILUS)
        width, inner = config.hidden_size, config.intermediate_size
        self.gate_up_proj = nn.Linear(width, 2 * inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return the MLP of hidden_states."""
        gate, up = self.gate_up_proj(hidden_states).chunk(2, dim=-1)
        return self.down_proj(ops.swiglu(gate, up))


class LigerBlockSparseTop2MLP(nn.Module):
    """w2(silu(w1(x)) * w3(x)), built as an expert of Mixtral."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        check_activation(self, config, SILUS)
        width, inner = config.hidden_size, config.intermediate_size
        self.w1 = nn.Linear(width, inner, bias=False)
        self.w2 = nn.Linear(inner, width, bias=False)
        self.w3 = nn.Linear(width, inner, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the MLP of x."""
        return self.w2(ops.swiglu(self.w1(x), self.w3(x)))
