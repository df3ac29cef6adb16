"""Launching: what the host remembers of a kernel, and what a tracer sees of an op.

No GPU is needed: Triton compiles for one, and a driver that launches nothing notes what it is told.
"""

from __future__ import annotations

import contextlib
import gc
import os
import subprocess
import sys
import textwrap
import weakref
from typing import Any

import pytest
import torch

from liger_kernels.ops import backend, launcher
from liger_kernels.ops.backend import tl, triton

pytestmark = pytest.mark.skipif(
    not backend.HAS_TRITON or backend.INTERPRETED, reason="nothing is compiled in this process"
)


def add_kernel(x_ptr, y_ptr, out_ptr, N, scale, BLOCK: tl.constexpr):
    cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + cols, mask=cols < N, other=0.0)
    if y_ptr is not None:
        x += tl.load(y_ptr + cols, mask=cols < N, other=0.0)
    tl.store(out_ptr + cols, x * scale, mask=cols < N)


class Driver:
    """Stands in for that of an H100: loads and launches nothing, and keeps a record."""

    def __init__(self) -> None:
        self.records: list[tuple[Any, ...]] = []
        # Of the kernels it loads. Without one nothing is unloaded when the real driver is back.
        self.module: str | None = None
        self.unloaded: list[str] = []
        self.device = 0
        self.utils = self

    def launcher_cls(self, src, metadata):
        form = (
            sorted(src.signature.items()),
            sorted(map(repr, src.attrs.items())),
            sorted(map(repr, src.constants.items())),
            metadata.num_warps,
            metadata.num_stages,
        )

        def launcher(grid_x, grid_y, grid_z, stream, function, *args):
            # Behind the metadata and the hooks: what the kernel is given.
            values = [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in args[4:]]
            self.records.append((form, (grid_x, grid_y, grid_z), stream, values))

        return launcher

    def load_binary(self, name, kernel, shared, device):
        return self.module, 1, 0, 0, 1024

    def unload_module(self, module):
        self.unloaded.append(module)

    def get_device_properties(self, device):
        return {"max_shared_mem": 232448}

    def get_current_device(self):
        return self.device

    def get_current_stream(self, device):
        return 7 + device

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


@pytest.fixture
def driver(monkeypatch) -> Driver:
    driver = Driver()
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)
    monkeypatch.setattr(launcher, "_STARTS_KERNELS", True)
    return driver


@pytest.fixture
def num_slow(monkeypatch) -> dict[str, int]:
    """How often Triton itself launched a kernel, by name."""
    counts: dict[str, int] = {}
    run = triton.JITFunction.run

    def counted(self, *args, **kwargs):
        counts[self.__name__] = counts.get(self.__name__, 0) + 1
        return run(self, *args, **kwargs)

    monkeypatch.setattr(triton.JITFunction, "run", counted)
    return counts


def tensors(**changes: torch.Tensor | None) -> list[torch.Tensor | None]:
    x, y, out = (torch.zeros(64) for _ in range(3))
    return list(({"x": x, "y": y, "out": out} | changes).values())


USUAL = {"N": 1024, "scale": 0.5, "BLOCK": 64, "num_warps": 4}
# What differs from the usual in the tensors, and in all else.
FORMS = {
    "usual": ({}, {}),
    "one": ({}, {"N": 1}),
    "no-multiple-of-16": ({}, {"N": 1023}),
    "64-bits": ({}, {"N": 2**31}),
    "fp16": ({"x": torch.zeros(64, dtype=torch.half)}, {}),
    "parameter": ({"x": torch.nn.Parameter(torch.zeros(64))}, {}),
    "none": ({"y": None}, {}),
    "block": ({}, {"BLOCK": 128}),
    "warps": ({}, {"num_warps": 8}),
    "stages": ({}, {"num_stages": 2}),
    "scale": ({}, {"scale": 1.0}),
    "off-16-bytes": ({"x": torch.zeros(65)[1:]}, {}),
    "other-option": ({}, {"maxnreg": 64}),
}


def test_a_remembered_launch_is_the_one_triton_makes(driver, num_slow):
    kernel = triton.jit(add_kernel)
    usual = launcher.Launch(kernel, (3,), **USUAL)
    for name, (other_tensors, others) in FORMS.items():
        given, options = tensors(**other_tensors), USUAL | others
        kernel[(3,)](*given, **options)
        before = num_slow["add_kernel"]
        # All tensors in one launch, so that a form which another's key covers would be that.
        start = launcher.Launch(kernel, (3,), **options) if others else usual
        start(*given)
        start(*given)
        wanted, *ours = driver.records
        assert ours == [wanted, wanted], name
        # The second is remembered, except where Triton has to look at every launch.
        wanted_slow = {"parameter": 0, "off-16-bytes": 2}.get(name, 1)
        assert num_slow["add_kernel"] - before == wanted_slow, name
        driver.records.clear()


def test_grid_device_and_stream_are_those_of_the_call(driver, num_slow):
    kernel = triton.jit(add_kernel)
    grids = ((3,), (3, 2), (5,))
    starts = [launcher.Launch(kernel, grid, **USUAL) for grid in grids]
    given = tensors()
    for _ in range(2):
        for device in (0, 1):
            driver.device = device
            for start in starts:
                start(*given)
    whole = [(3, 1, 1), (3, 2, 1), (5, 1, 1)]
    wanted = [(grid, 7 + device) for _ in range(2) for device in (0, 1) for grid in whole]
    assert [(grid, stream) for _, grid, stream, _ in driver.records] == wanted
    assert num_slow["add_kernel"] == len(wanted) // 2


@pytest.mark.parametrize("hook", ["launch_enter_hook", "launch_exit_hook"])
def test_who_listens_to_launches_is_told_of_each(driver, num_slow, hook):
    start = launcher.Launch(triton.jit(add_kernel), (3,), **USUAL)
    given = tensors()
    start(*given)
    hooks = getattr(triton.knobs.runtime, hook)
    hooks.add(print)
    try:
        start(*given)
    finally:
        hooks.remove(print)
    # The driver that stands in calls no hooks; that Triton, which does, was asked is what counts.
    assert num_slow["add_kernel"] == 2
    start(*given)
    assert num_slow["add_kernel"] == 2


@pytest.mark.parametrize("hook", [None, print], ids=["none", "function"])
def test_hooks_that_are_no_chains(driver, num_slow, hook, monkeypatch):
    start = launcher.Launch(triton.jit(add_kernel), (3,), **USUAL)
    monkeypatch.setattr(triton.knobs.runtime, "launch_enter_hook", hook)
    given = tensors()
    for _ in range(3):
        start(*given)
    assert num_slow["add_kernel"] == (1 if hook is None else 3)


def test_what_triton_does_not_start_is_not_remembered(driver, monkeypatch):
    monkeypatch.setattr(triton.knobs.runtime, "jit_cache_hook", lambda **said: True)
    start = launcher.Launch(triton.jit(add_kernel), (3,), **USUAL)
    for _ in range(2):
        start(*tensors())
    assert not driver.records


def test_case_250_a_remembered_kernel_stays_on_the_gpu(driver):
    """Two threads that compile the same keep one in Triton's cache; ours may be the other.

    Not every Triton takes a kernel off the GPU, but each frees it with its last reference.
    """
    driver.module = "module"
    kernel = triton.jit(add_kernel)
    start = launcher.Launch(kernel, (3,), **USUAL)
    given = tensors()
    start(*given)
    [compiled] = map(weakref.ref, kernel.device_caches[driver.device][0].values())
    kernel.device_caches.clear()
    gc.collect()
    assert compiled() is not None
    assert not driver.unloaded
    start(*given)
    del start
    gc.collect()
    assert compiled() is None
    unloads = hasattr(triton.compiler.CompiledKernel, "__del__")
    assert driver.unloaded == ["module"] * unloads


def test_tensors_of_another_gpu_than_the_current_one_are_quick_too(driver, num_slow, monkeypatch):
    @contextlib.contextmanager
    def guard(tensor):
        monkeypatch.setattr(driver, "device", 1)
        yield
        monkeypatch.setattr(driver, "device", 0)

    monkeypatch.setattr(launcher, "device_guard", guard)
    start = launcher.Launch(triton.jit(add_kernel), (3,), **USUAL)
    given = tensors()
    for _ in range(3):
        start(*given)
    assert num_slow["add_kernel"] == 1
    assert [stream for _, _, stream, _ in driver.records] == [8, 8, 8]


def test_a_tensor_of_another_device_is_left_to_triton(driver, num_slow, monkeypatch):
    """Triton's launcher says so, where an address alone would be taken as it is."""
    start = launcher.Launch(triton.jit(add_kernel), (3,), **USUAL)
    given = tensors()
    start(*given)
    monkeypatch.setattr(torch.Tensor, "get_device", lambda tensor: 0 if tensor is given[1] else -1)
    start(*given)
    assert num_slow["add_kernel"] == 2


def test_what_a_function_of_sizes_remembers_is_bounded():
    squares = launcher.cache_by_shape(lambda n: n * n)
    for n in range(launcher._MAX_CACHED_SHAPES + 10):
        squares(n)
    assert squares.cache_info().currsize == launcher._MAX_CACHED_SHAPES


@pytest.fixture
def forgetful(monkeypatch):
    """Kernels and launches that know no driver before a test, and not that of the test after it."""
    for name, module in list(sys.modules.items()):
        if name.startswith("liger_kernels.ops."):
            for key, value in vars(module).copy().items():
                if key.endswith("_kernel") and isinstance(value, triton.JITFunction):
                    monkeypatch.setattr(module, key, triton.jit(value.fn))

    def forget() -> None:
        for name, module in list(sys.modules.items()):
            if name.startswith("liger_kernels.ops."):
                for value in vars(module).values():
                    if hasattr(value, "cache_clear"):
                        value.cache_clear()

    forget()
    yield
    forget()


def run(op: str, rows: int) -> None:
    from liger_kernels import ops

    def zeros(*shape: int, requires_grad: bool = True) -> torch.Tensor:
        return torch.zeros(shape, requires_grad=requires_grad)

    x, weight = zeros(rows, 1024), zeros(1024)
    table = zeros(rows, 64, requires_grad=False)
    calls = {
        "rms_norm": lambda: ops.rms_norm(x, weight),
        "layer_norm": lambda: ops.layer_norm(x, weight, weight.detach()),
        "fused_add_rms_norm": lambda: ops.fused_add_rms_norm(x, zeros(rows, 1024), weight)[0],
        "gated_rms_norm": lambda: ops.gated_rms_norm(x, zeros(rows, 1024), weight),
        "swiglu": lambda: ops.swiglu(x, zeros(rows, 1024)),
        "geglu": lambda: ops.geglu(x, zeros(rows, 1024)),
        "rope": lambda: torch.cat(ops.rope(*zeros(2, 1, 4, rows, 64), table, table)),
        "cross_entropy": lambda: ops.cross_entropy(x, torch.zeros(rows, dtype=torch.long)),
    }
    calls[op]().sum().backward()


# How many kernels a forward and its backward start; of norms, with few rows and with more.
KERNELS = {
    "rms_norm": (2, 3),
    "layer_norm": (2, 3),
    "fused_add_rms_norm": (2, 3),
    "gated_rms_norm": (3, 3),
    "swiglu": (2, 2),
    "geglu": (2, 2),
    "rope": (2, 2),
    "cross_entropy": (2, 2),
}


@pytest.mark.parametrize("rows", [64, 65], ids=["few", "many"])
@pytest.mark.parametrize("op", KERNELS)
def test_a_repeated_op_never_enters_triton(op, rows, driver, num_slow, monkeypatch, forgetful):
    monkeypatch.setattr(backend, "backend", lambda device: "triton")
    for _ in range(3):
        run(op, rows)
    # Few elements are one program's, whose sum over rows needs no other.
    num_kernels = KERNELS[op][rows > 64]
    assert len(driver.records) == 3 * num_kernels
    assert sum(num_slow.values()) == num_kernels


TRACE = """
    import warnings
    from types import FunctionType
    import torch
    import torch.utils._triton
    # A tracer that finds no GPU would not know a kernel when it sees one.
    torch.utils._triton.has_triton = lambda *args: True
    torch.version.cuda = torch.version.cuda or "13.0"
    from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table
    import liger_kernels.ops.backend
    from liger_kernels.ops import fused_add_rms_norm, layer_norm, rms_norm

    liger_kernels.ops.backend.backend = lambda device: "triton"

    class Traced(Exception):
        pass

    def backend(module, inputs):
        names = set()
        for part in module.modules():
            for node in getattr(getattr(part, "graph", None), "nodes", ()):
                if "triton_kernel_wrapper" in str(node.target):
                    kernel = kernel_side_table.get_kernel(node.kwargs["kernel_idx"])
                    # Wrapped once or more, as the version is and the options of the call are.
                    while not isinstance(kernel, FunctionType):
                        kernel = kernel.fn
                    names.add(kernel.__name__)
        graphs.append(names)

        def run(*args):
            raise Traced

        return run

    warnings.filterwarnings("error", message="Dynamo detected a call to a `functools")
    for norm in (rms_norm, layer_norm, fused_add_rms_norm):
        torch._dynamo.reset()
        graphs = []
        compiled = torch.compile(norm, backend=backend, fullgraph=True)
        for rows in (100, 104, 117, 256, 300, 4096):
            x, residual = (torch.zeros(2, rows, 1024, requires_grad=True) for _ in range(2))
            weight, bias = (torch.zeros(1024, requires_grad=True) for _ in range(2))
            others = {rms_norm: (weight,), layer_norm: (weight, bias)}
            try:
                compiled(x, *others.get(norm, (residual, weight)))
            except Traced:
                pass
        # One graph for the first number of rows, and one for all others.
        assert len(graphs) == 2, (norm, len(graphs))
        # The compiler makes kernels of what it sees; ours would be launches between them.
        assert not any(graphs), graphs
        many = torch.zeros(2, 4097, 1024, requires_grad=True)
        try:
            compiled(many, *others.get(norm, (torch.zeros_like(many), weight)))
        except Traced:
            pass
        name = norm.__name__.removeprefix("fused_add_")
        assert graphs[2:] == [{f"{name}_fwd_kernel", f"{name}_bwd_kernel", "sum_partials_kernel"}]
"""


def test_case_30_a_tracer_sees_torch_code_of_few_numbers_and_no_number_of_rows():
    # In its own process: whether there is a GPU is asked once, when torch's tracer is imported.
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(TRACE)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr
