"""What every op needs to launch: a device's backend, Triton or its stand-in, small jit helpers."""

import contextlib
import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeVar

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

# Whether Launch may start a compiled kernel itself; elsewhere Triton's launchers are others.
_STARTS_KERNELS = HAS_TRITON and not INTERPRETED and torch.version.cuda is not None

# Results a pure function of sizes remembers: row counts and widths, in practice a few.
_MAX_REMEMBERED = 4096

_T = TypeVar("_T")


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


def is_traced_as_torch(x: torch.Tensor) -> bool:
    """Return whether torch.compile is to see plain torch code, differentiated by itself.

    It makes kernels of its own from that; and on a CPU dynamo of torch 2.11 loses the gradients of
    the autograd functions around torch code.
    """
    return torch.compiler.is_compiling() and not runs_triton(x)


def runs_triton_rows(x: torch.Tensor) -> bool:
    """Return whether Triton kernels serve x's whole rows: one fits a program's registers."""
    return runs_triton(x) and x.shape[-1] <= _MAX_ROW_WIDTH


def remembered(function: Callable[..., _T]) -> Callable[..., _T]:
    """Decorate a pure function of sizes, which every launch asks anew, to remember its results.

    A table that a caller may replace, to measure another, is an argument and not looked up inside.
    """
    cached = functools.lru_cache(maxsize=_MAX_REMEMBERED)(function)

    @functools.wraps(function)
    def call(*args: Any) -> _T:
        # A tracer warns of caches; it calls once anyway.
        return function(*args) if torch.compiler.is_compiling() else cached(*args)

    call.cache_clear, call.cache_info = cached.cache_clear, cached.cache_info
    return call


_ALREADY_THERE = contextlib.nullcontext()


def device_guard(x: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which kernels launch on x's device; free where it is the current one."""
    if x.is_cuda and x.get_device() != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return _ALREADY_THERE


class Launch:
    """A kernel with all that it takes besides its tensors, to be started with them again and again.

    Triton binds the arguments of every launch, asks the environment for settings, makes a string of
    what it compiles for, asks the driver for each tensor's address and calls hooks that hardly
    anybody sets. Made once for sizes, strides and options (see remembered), a Launch remembers the
    compiled kernel by the device and by dtype and device of each tensor. Triton itself starts what
    is new, and always where a tensor is off 16 bytes, a launch hook of triton.knobs is set, or the
    GPU is not NVIDIA's. Tracers see a plain kernel.
    """

    def __init__(self, kernel: Any, grid: tuple[int, ...], **others: Any) -> None:
        self.grid = grid
        self._kernel = kernel
        self._others = others
        self._known: dict[tuple[Any, ...], tuple[Any, ...]] = {}

    def __call__(self, *tensors: torch.Tensor | None) -> None:
        """Start the kernel on the current stream of the first tensor's device.

        Args:
            tensors: Or None, in the kernel's order; they come before all else.
        """
        with device_guard(tensors[0]):
            if torch.compiler.is_compiling() or not _STARTS_KERNELS:
                self._kernel[self.grid](*tensors, **self._others)
            else:
                self._start(tensors)

    def _start(self, tensors: tuple[torch.Tensor | None, ...]) -> None:
        driver = triton.runtime.driver.active
        device = driver.get_current_device()
        key, addresses, all_bits = [device], [], 0
        for tensor in tensors:
            if tensor is None:
                key.append(None)
                addresses.append(None)
            else:
                key += (tensor.dtype, tensor.get_device())
                addresses.append(tensor.data_ptr())
                all_bits |= addresses[-1]
        hooks = triton.knobs.runtime
        if all_bits & 15 or _listens(hooks.launch_enter_hook) or _listens(hooks.launch_exit_hook):
            self._kernel[self.grid](*tensors, **self._others)
            return
        known = self._known.get(tuple(key))
        if known is not None:
            run, grid, function, metadata, others, _ = known
            stream = driver.get_current_stream(device)
            run(*grid, stream, function, metadata, None, None, None, *addresses, *others)
            return
        compiled = self._kernel[self.grid](*tensors, **self._others)
        if isinstance(compiled, triton.compiler.CompiledKernel):
            grid = (*self.grid, 1, 1)[:3]
            others = tuple(map(self._others.get, self._kernel.arg_names[len(tensors) :]))
            function, metadata = compiled.function, compiled.packed_metadata
            # With the kernel itself, whose code Triton 3.8 takes off the GPU with the last
            # reference; earlier ones leave it there.
            self._known[tuple(key)] = compiled.run, grid, function, metadata, others, compiled


def _listens(hook: Any) -> bool:
    """Return whether a hook of Triton, a chain of calls by default, has anything to call."""
    return hook is not None and bool(getattr(hook, "calls", True))


@remembered
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


def lookup(table: tuple[tuple[int, _T], ...], size: int) -> _T:
    """Return the value of the first (limit, value) pair with size <= limit, else of the last."""
    for limit, value in table:
        if size <= limit:
            return value
    return table[-1][1]


# Wider rows than this do not fit the registers of one program.
_MAX_ROW_WIDTH = 65536
# Elements of a tile of rows where nothing else was measured.
_ROW_TILE = 2048
# (bytes of a tile of x and dy, stages of the load pipeline): shared memory holds one tile less than
# there are stages, here 64 KB at most, so that smaller cards can launch it too.
_ROW_STAGES = ((2**14, 5), (2**15, 3), (2**16, 2), (2**20, 1))
_USUAL_STAGES = 3
# Elements that one persistent program takes alone: partial sums and a launch that adds them up cost
# the host more than the GPU gains.
_ALONE = 2**16


class RowShape(NamedTuple):
    """How the programs of a kernel take whole rows of one range of widths."""

    # Of a tile of narrow rows, about; a wider row is a tile of its own.
    num_elements: int
    num_warps: int
    # The others are for persistent programs. Stages are at most so many as memory allows.
    programs_per_sm: int = 1
    num_stages: int = _USUAL_STAGES
    # Whether row_split() takes rows apart.
    splits: bool = True


class RowPlan(NamedTuple):
    """One launch over whole rows. A row has block_n columns and at most block_rest more."""

    num_programs: int
    block_m: int
    block_n: int
    block_rest: int
    num_stages: int
    num_warps: int


def row_tile(width: int, num_rows: int, num_elements: int = _ROW_TILE) -> tuple[int, int]:
    """Return (BLOCK_M, BLOCK_N) for whole rows: one a program, or several narrow ones."""
    block_n = next_power_of_2(width)
    block_m = max(1, num_elements // block_n)
    # A comparison, because a tracer takes the bits of a number of rows for that number alone.
    return block_m if num_rows >= block_m else next_power_of_2(num_rows), block_n


def row_split(width: int) -> tuple[int, int]:
    """Return a width as the sum of two powers of two, or of one and 0 if two waste as many lanes.

    Lanes past the width move nothing, but they compute: 3072 of 8192 at 5120 columns, where 4096
    and 1024 have none.
    """
    whole = next_power_of_2(width)
    rest = next_power_of_2(width - whole // 2)
    return (whole, 0) if 2 * rest >= whole else (whole // 2, rest)


def row_stages(num_elements: int, itemsize: int, most: int = _USUAL_STAGES) -> int:
    """Return how many stages a loop may have that loads tiles of itemsize bytes an element."""
    return min(lookup(_ROW_STAGES, num_elements * itemsize), most)


def row_plan(shape: RowShape, width: int, num_rows: int) -> RowPlan:
    """Return the launch of a program for each tile of rows."""
    block_m, block_n = row_tile(width, num_rows, shape.num_elements)
    return RowPlan(cdiv(num_rows, block_m), block_m, block_n, 0, 1, shape.num_warps)


def persistent_row_plan(
    shape: RowShape, width: int, num_rows: int, itemsize: int, device: torch.device
) -> RowPlan:
    """Return the launch of persistent programs that read rows of itemsize bytes a column."""
    block_m, block_n = row_tile(width, num_rows, shape.num_elements)
    block_rest = 0
    main, rest = row_split(width)
    # What is less than two elements a lane is not loaded ahead, and every row would wait for it.
    if shape.splits and block_m * rest >= 64 * shape.num_warps:
        block_n, block_rest = main, rest
    num_programs = min(num_sms(device) * shape.programs_per_sm, cdiv(num_rows, block_m))
    if num_rows * width <= _ALONE:
        num_programs = 1
    num_stages = row_stages(block_m * (block_n + block_rest), itemsize, shape.num_stages)
    return RowPlan(num_programs, block_m, block_n, block_rest, num_stages, shape.num_warps)


def rows_of(x: torch.Tensor) -> torch.Tensor:
    """Return x as (M, N) rows whose last dimension is contiguous, copying only if it has to.

    Expanded tensors (stride 0 over rows, as the gradient of a sum) stay views.
    """
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 or rows.shape[-1] == 1 else rows.contiguous()


def in_rows(x: torch.Tensor) -> torch.Tensor:
    """Return x itself if it is contiguous, of whatever rank, else as rows_of() does.

    A view costs the host as much as an allocation; row_stride() knows both forms.
    """
    return x if x.is_contiguous() else rows_of(x)


def row_stride(x: torch.Tensor) -> int:
    """Return how far apart the rows of in_rows(x) are."""
    return x.shape[-1] if x.is_contiguous() else x.stride(0)


@triton.jit
def fp32(scalar):
    # A Python float arrives as fp64 under torch.compile and would promote the whole kernel; in the
    # interpreter it has no .to().
    return tl.full((), scalar, tl.float32)


# (BLOCK_P, BLOCK_N, warps): what it sums is small and read once, so that only latency counts. 5 to
# 8 us on an H100 for 132 rows, where (32, 64, 4) took 8 to 10 (docs/results/tune-norms-h100.jsonl).
_SUM_TILE = (128, 16, 4)


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
    _sum_launch(_SUM_TILE, num_partials, width)(partial, out)
    return out


@remembered
def _sum_launch(tile: tuple[int, int, int], num_partials: int, width: int) -> Launch:
    block_p, block_n, num_warps = tile
    return Launch(
        sum_partials_kernel,
        (cdiv(width, block_n),),
        P=num_partials,
        N=width,
        BLOCK_P=block_p,
        BLOCK_N=block_n,
        num_warps=num_warps,
    )
