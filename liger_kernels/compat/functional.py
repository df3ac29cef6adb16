"""The functional forms under the names of liger_kernel.transformers.functional; losses.py has more.

Each maps onto one op. Tensors are positional where their names are not documented. Options that no
op has are refused: nothing that would change a value is accepted and dropped.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from liger_kernels import ops
from liger_kernels.compat.arguments import cast_of

__all__ = [
    "liger_geglu",
    "liger_layer_norm",
    "liger_rms_norm",
    "liger_rope",
    "liger_swiglu",
]


def liger_rms_norm(
    x: Tensor,
    weight: Tensor | None,
    /,
    eps: float,
    offset: float = 0.0,
    casting_mode: str = "llama",
    in_place: bool = True,
) -> Tensor:
    """Return ops.rms_norm; "llama" rounds before the weight, "gemma" and "none" once at the end.

    in_place is a permission to overwrite a gradient, which no op uses.

    Raises:
        ValueError: As ops.rms_norm, or casting_mode is unknown.
    """
    return ops.rms_norm(x, weight, eps, offset=offset, cast=cast_of(casting_mode))


def liger_layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, /, eps: float
) -> Tensor:
    """Return ops.layer_norm."""
    return ops.layer_norm(x, weight, bias, eps)


def liger_swiglu(gate: Tensor, up: Tensor, /) -> Tensor:
    """Return silu(gate) * up."""
    return ops.swiglu(gate, up)


def liger_geglu(gate: Tensor, up: Tensor, /) -> Tensor:
    """Return gelu(gate) * up, with the tanh form of gelu."""
    return ops.geglu(gate, up)


def liger_rope(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None = None,
    unsqueeze_dim: int = 1,
) -> tuple[Tensor, Tensor]:
    """Return ops.rope: q and k turned by halves, as transformers' apply_rotary_pos_emb.

    Raises:
        ValueError: As ops.rope, or position_ids is given: cos and sin are those of the positions.
    """
    if position_ids is not None:
        raise ValueError("liger_rope got position_ids; give cos and sin of these positions instead")
    turned: Any = ops.rope(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)
    return turned
