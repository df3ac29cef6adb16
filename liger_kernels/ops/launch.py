"""What every op needs to launch: a device's backend, Triton or its stand-in, small jit helpers."""

import contextlib
import functools
from typing import Any, Literal

import torch

try:
    import triton
    import triton.language as tl

    HAS_TRITON = True
except ImportError:
    HAS_TRITON = False

    class _Inert:
        """Stands in for triton and tl where no wheel exists: kernels are defined, not run."""

        def __getattr__(self, name: str) -> "_Inert":
            return self

        def __call__(self, *args: Any, **kwargs: Any) -> "_Inert":
            return self

    triton = tl = _Inert()

Backend = Literal["triton", "triton-interpreter", "torch"]

# Triton decides this when it decorates a kernel, so it is a property of the process.
INTERPRETED: bool = HAS_TRITON and bool(triton.knobs.runtime.interpret)

# Programs a persistent kernel starts in the interpreter: enough to exercise the partial sums.
_INTERPRETER_SMS = 3


def backend(device: torch.device) -> Backend:
    """Return what runs an op on tensors of `device`.

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


def runs_triton_rows(x: torch.Tensor) -> bool:
    """Return whether Triton kernels serve x's whole rows: one fits a program's registers."""
    return runs_triton(x) and x.shape[-1] <= _MAX_ROW_WIDTH


def device_guard(x: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which kernels launch on x's device; free where it is the current one."""
    if x.device.type == "cuda" and x.device.index != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return contextlib.nullcontext()


@functools.cache
def num_sms(device: torch.device) -> int:
    """Return the number of multiprocessors of a device; a small constant in the interpreter."""
    if device.type == "cuda" and not INTERPRETED:
        return torch.cuda.get_device_properties(device).multi_processor_count
    if device.type == "xpu" and not INTERPRETED:
        return torch.xpu.get_device_properties(device).max_compute_units
    return _INTERPRETER_SMS


def next_power_of_2(n: int) -> int:
    """Return the smallest power of two that is at least n, and at least 1."""
    return 1 << max(n - 1, 0).bit_length()


def cdiv(a: int, b: int) -> int:
    """Return a / b rounded up."""
    return -(-a // b)


def lookup(table: tuple[tuple[int, int], ...], size: int) -> int:
    """Return the value of the first (limit, value) pair with size <= limit, else of the last."""
    for limit, value in table:
        if size <= limit:
            return value
    return table[-1][1]


# Wider rows than this do not fit the registers of one program.
_MAX_ROW_WIDTH = 65536
# Elements of a tile of narrow rows, about; a wider row is a tile of its own.
_ROW_TILE = 2048
# (bytes of a tile of x and dy, stages of the load pipeline): shared memory holds one tile less than
# there are stages, here 64 KB at most, so that smaller cards can launch it too.
_ROW_STAGES = ((2**15, 3), (2**16, 2), (2**20, 1))


def row_tile(width: int, num_rows: int) -> tuple[int, int]:
    """Return (BLOCK_M, BLOCK_N) for whole rows: one a program, or several narrow ones."""
    block_n = next_power_of_2(width)
    return max(1, min(_ROW_TILE // block_n, next_power_of_2(num_rows))), block_n


def row_stages(block_m: int, block_n: int, *tensors: torch.Tensor) -> int:
    """Return how many stages a loop that loads one such tile of each tensor may have."""
    return lookup(_ROW_STAGES, block_m * block_n * sum(x.element_size() for x in tensors))


def rows_of(x: torch.Tensor) -> torch.Tensor:
    """Return x as (M, N) rows whose last dimension is contiguous, copying only if it has to.

    Expanded tensors (stride 0 over rows, as the gradient of a sum) stay views.
    """
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 or rows.shape[-1] == 1 else rows.contiguous()


@triton.jit
def fp32(scalar):
    # A Python float arrives as fp64 under torch.compile and would promote the whole kernel; in the
    # interpreter it has no .to().
    return tl.full((), scalar, tl.float32)


@triton.jit
def sum_partials_kernel(
    partial_ptr,  # (P, N) fp32
    out_ptr,  # (N,)
    P,
    N,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Add P rows of partial sums in a fixed order, in fp32, and round once."""
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    for start in range(0, P, BLOCK_P):
        rows = start + tl.arange(0, BLOCK_P)
        mask = (rows[:, None] < P) & (cols[None, :] < N)
        offsets = rows[:, None].to(tl.int64) * N + cols[None, :]
        acc += tl.load(partial_ptr + offsets, mask=mask, other=0.0)
    out = tl.sum(acc, 0)
    tl.store(out_ptr + cols, out.to(out_ptr.dtype.element_ty), mask=cols < N)


def sum_partials(partial: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the sum over the rows of partial (P, N) fp32 as (N,) in dtype, in a fixed order."""
    num_partials, width = partial.shape
    out = torch.empty(width, dtype=dtype, device=partial.device)
    block_n = 64
    sum_partials_kernel[(cdiv(width, block_n),)](
        partial_ptr=partial,
        out_ptr=out,
        P=num_partials,
        N=width,
        BLOCK_P=32,
        BLOCK_N=block_n,
        num_warps=4,
    )
    return out
