"""The backend of a device: Triton, its interpreter or torch; and Triton itself, if installed."""

from typing import Any, Literal

import torch

try:
    import triton
    import triton.language as tl

    HAS_TRITON = True
except ImportError:
    HAS_TRITON = False

    class _Inert:
        """Replace triton and tl where no wheel exists: kernels are defined, never run."""

        def __getattr__(self, name: str) -> "_Inert":
            return self

        def __call__(self, *args: Any, **kwargs: Any) -> "_Inert":
            return self

    triton = tl = _Inert()

__all__ = [
    "HAS_TRITON",
    "INTERPRETED",
    "Backend",
    "backend",
    "fp32",
    "is_left_to_compiler",
    "is_traced_as_torch",
    "runs_triton",
    "runs_triton_rows",
    "tl",
    "triton",
]

Backend = Literal["triton", "triton-interpreter", "torch"]
# Triton decides this when it decorates a kernel, so it is a property of the process.
INTERPRETED: bool = HAS_TRITON and bool(triton.knobs.runtime.interpret)

# Wider rows than this do not fit the registers of one program.
_MAX_ROW_WIDTH = 65536
# A GPU moves so many of 16 bits in 10 us. Compiled by layers on an H200, torch code is faster for
# qwen3-0.6b at 2x1024 (a norm has 2 M, an activation 6), ours for gemma3-1b at 4x2048 (9 and 57).
_MAX_LEFT_NUMBERS = 2**23


def backend(device: torch.device) -> Backend:
    """Choose the backend of an op on tensors of `device`.

    "triton" on CUDA, ROCm and XPU devices; "triton-interpreter" for every tensor when Triton was
    imported with TRITON_INTERPRET=1; "torch" elsewhere and where Triton is not installed.
    """
    if not HAS_TRITON or device.type == "meta":
        return "torch"
    if INTERPRETED:
        return "triton-interpreter"
    return "triton" if device.type in ("cuda", "xpu") else "torch"


def runs_triton(x: torch.Tensor) -> bool:
    """Return whether Triton kernels, which compute in fp32, serve x; fp64 is left to torch code."""
    return backend(x.device) != "torch" and x.dtype != torch.float64


def is_traced_as_torch(x: torch.Tensor) -> bool:
    """Return whether torch.compile is to see plain torch code, differentiated by itself.

    It generates kernels from that; and on a CPU dynamo of torch 2.11 loses the gradients of
    the autograd functions around torch code.
    """
    return torch.compiler.is_compiling() and not runs_triton(x)


def is_left_to_compiler(x: torch.Tensor) -> bool:
    """Return whether torch.compile is to see plain torch code in place of a small op on x.

    The compiler joins it with what is around it in one kernel; a kernel of ours would be a launch
    more, which takes the host longer than a GPU works on few numbers. On many it is the faster one.
    """
    if not torch.compiler.is_compiling():
        return False
    return not runs_triton(x) or x.numel() <= _MAX_LEFT_NUMBERS


def runs_triton_rows(x: torch.Tensor) -> bool:
    """Return whether Triton kernels serve x's whole rows: one fits a program's registers."""
    return runs_triton(x) and x.shape[-1] <= _MAX_ROW_WIDTH


@triton.jit
def fp32(scalar):
    # A Python float arrives as fp64 under torch.compile and would promote the whole kernel; in the
    # interpreter it has no .to().
    return tl.full((), scalar, tl.float32)
