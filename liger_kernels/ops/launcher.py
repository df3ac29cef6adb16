"""Cheap repeated launches of kernels, the cache they live in, and the arithmetic of grids."""

import contextlib
import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from liger_kernels.ops.backend import HAS_TRITON, INTERPRETED, triton

# Programs a persistent kernel starts in the interpreter: enough to exercise the partial sums.
_INTERPRETER_SMS = 3
# Whether Launch may start a compiled kernel itself; elsewhere Triton's launchers are others.
_STARTS_KERNELS = HAS_TRITON and not INTERPRETED and torch.version.cuda is not None
# Results that cache_by_shape keeps of a function: row counts and widths, in practice a few.
_MAX_CACHED_SHAPES = 4096
_T = TypeVar("_T")


def cache_by_shape(function: Callable[..., _T]) -> Callable[..., _T]:
    """Cache the results of a pure function of sizes, which every launch calls.

    A table that a caller may replace, to measure another, is an argument and not looked up inside.
    """
    cached = functools.lru_cache(maxsize=_MAX_CACHED_SHAPES)(function)

    @functools.wraps(function)
    def call(*args: Any) -> _T:
        # A tracer warns of caches; it calls once anyway.
        return function(*args) if torch.compiler.is_compiling() else cached(*args)

    decorated: Any = call
    decorated.cache_clear, decorated.cache_info = cached.cache_clear, cached.cache_info
    return call


_ALREADY_THERE = contextlib.nullcontext()


def device_guard(x: Any) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which kernels launch on x's device; free where it is the current one."""
    if x.is_cuda and x.get_device() != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return _ALREADY_THERE


class Launch:
    """A kernel with all of its arguments except tensors, for cheap repeated launches.

    For every launch Triton binds the arguments, reads settings from the environment, builds the
    string of a specialization, asks the driver for each tensor's address and calls hooks that few
    set. A Launch is built once for sizes, strides and options (see cache_by_shape). It caches the
    compiled kernel by the device and by dtype and device of each tensor. Triton itself starts a
    kernel that is not cached, and always where a tensor's address is no multiple of 16 bytes, a
    launch hook of triton.knobs is set, or the GPU is not NVIDIA's. Tracers see a plain kernel.
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
        key: list[Any] = [device]
        addresses: list[int | None] = []
        all_bits = 0
        for tensor in tensors:
            if tensor is None:
                key.append(None)
                addresses.append(None)
            else:
                key += (tensor.dtype, tensor.get_device())
                address = tensor.data_ptr()
                addresses.append(address)
                all_bits |= address
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


@cache_by_shape
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
