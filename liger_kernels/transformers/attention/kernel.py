"""The varlen kernel of torch, called alike in every release that has it."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_varlen_attn: Any = None
with contextlib.suppress(ImportError):
    from torch.nn.attention.varlen import varlen_attn as _varlen_attn

__all__ = [
    "MAX_HEAD_SIZE",
    "Lengths",
    "bind_varlen",
    "device_problem",
    "head_problem",
    "varlen_attention",
]

MAX_HEAD_SIZE = 256
# Wider heads need the shared memory of a data center GPU in backward.
_MAX_HEAD_SIZE_ANYWHERE = 192
_LARGE_GPUS = (8, 9, 10)
_MULTIPLE = 8


@dataclass(frozen=True)
class Lengths:
    """Where the documents of a batch begin, in the arguments of transformers.

    Attributes:
        ends_q: (N + 1,) int32, on the device: 0 and the end of each document, rows end to end.
        ends_k: The same of the keys.
        max_q: Tokens of the longest document.
        max_k: The same of the keys.
    """

    ends_q: Tensor
    ends_k: Tensor
    max_q: int
    max_k: int

    @classmethod
    def of(cls, options: dict[str, Any]) -> Lengths | None:
        """Take the lengths out of the keyword arguments of a layer; None where one is missing."""
        names = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
        ends_q, ends_k, max_q, max_k = (options.pop(name, None) for name in names)
        if ends_q is None or ends_k is None or max_q is None or max_k is None:
            return None
        return cls(ends_q, ends_k, max_q, max_k)


def device_problem(device: torch.device) -> str | None:
    """Return why the kernel cannot run on a device, or None."""
    if _call is None:
        return f"torch {torch.__version__} has no torch.nn.attention.varlen"
    if device.type != "cuda" or torch.version.hip is not None:
        name = device.type if torch.version.hip is None else "ROCm"
        return f"it needs a CUDA GPU, and this is {name}"
    major, minor = _capability(device.index)
    if major < 8:
        return f"it needs compute capability 8.0, and this GPU has {major}.{minor}"
    return None


def head_problem(device: torch.device, size: int) -> str | None:
    """Return why the kernel cannot take heads of this size on a GPU, or None."""
    if size > MAX_HEAD_SIZE:
        return f"it takes heads of at most {MAX_HEAD_SIZE}, and these have {size}"
    if size > _MAX_HEAD_SIZE_ANYWHERE and _capability(device.index) not in {
        (major, 0) for major in _LARGE_GPUS
    }:
        return (
            f"on this GPU its backward takes heads of at most {_MAX_HEAD_SIZE_ANYWHERE}, and "
            f"these have {size}"
        )
    return None


# torch.compile calls it while it traces.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _capability(index: int | None) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Lengths,
    *,
    scale: float | None = None,
    window: int | None = None,
) -> Tensor:
    """Compute causal attention within documents.

    Args:
        query: (T, H, D) bfloat16 or float16.
        key: (T, H_kv, D); H is a multiple of H_kv.
        value: (T, H_kv, D_v).
        lengths: Of the documents, T together.
        scale: Of the scores; 1 / sqrt(D) by default.
        window: Tokens that a token sees, itself included; all before it by default.

    Returns:
        (T, H, D_v).
    """
    size, value_size = query.shape[-1], value.shape[-1]
    # The kernel takes one size of heads, a multiple of 8; zeros add nothing to a score.
    width = -(-max(size, value_size) // _MULTIPLE) * _MULTIPLE
    query, key, value = (_widened(x, width) for x in (query, key, value))
    scale = size**-0.5 if scale is None else scale
    left = -1 if window is None else window - 1
    assert _call is not None, "device_problem says that there is no kernel"
    out = _call(query, key, value, lengths, scale, left)
    return out if width == value_size else out[..., :value_size]


def _widened(x: Tensor, width: int) -> Tensor:
    return x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1]))


_Call = Callable[[Tensor, Tensor, Tensor, Lengths, float, int], Tensor]


def bind_varlen(function: Any) -> _Call:
    """Return a call of torch's function by the arguments that this release names.

    torch 2.11 takes scale and window_size, later releases enable_gqa too, earlier ones is_causal.
    All share keys among heads, asked or not.
    """
    names = inspect.signature(function).parameters
    shares = {"enable_gqa": True} if "enable_gqa" in names else {}

    def call(
        query: Tensor, key: Tensor, value: Tensor, lengths: Lengths, scale: float, left: int
    ) -> Tensor:
        options: dict[str, Any] = dict(shares) if key.shape[1] != query.shape[1] else {}
        if "window_size" in names:
            options["window_size"] = (left, 0)
        elif left < 0:
            options["is_causal"] = True
        else:
            raise ValueError(
                f"varlen_attn of torch {torch.__version__} has no sliding window; "
                "torch 2.11 has one"
            )
        if "scale" in names:
            options["scale"] = scale
        else:
            query = query * (scale * query.shape[-1] ** 0.5)
        ends = (lengths.ends_q, lengths.ends_k, lengths.max_q, lengths.max_k)
        out: Tensor = function(query, key, value, *ends, **options)
        return out

    return call


_call: _Call | None = None if _varlen_attn is None else bind_varlen(_varlen_attn)
