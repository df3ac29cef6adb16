"""Launching: what the host remembers of a kernel, and what a tracer sees of an op.

No GPU is needed: Triton compiles for one, and a driver that launches nothing notes what it is told.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from typing import Any

import pytest
import torch

from liger_kernels.ops import launch, layer_norm_kernel, rms_norm_kernel
from liger_kernels.ops.launch import tl, triton

pytestmark = pytest.mark.skipif(
    not launch.HAS_TRITON or launch.INTERPRETED, reason="nothing is compiled in this process"
)


def add_kernel(x_ptr, y_ptr, out_ptr, N, scale, BLOCK: tl.constexpr):
    cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + cols, mask=cols < N, other=0.0)
    if y_ptr is not None:
        x += tl.load(y_ptr + cols, mask=cols < N, other=0.0)
    tl.store(out_ptr + cols, x * scale, mask=cols < N)


def mixed_kernel(x_ptr, N, out_ptr):
    tl.store(out_ptr, tl.load(x_ptr + N))


class Driver:
    """Stands in for that of an H100: loads and launches nothing, and keeps a record."""

    def __init__(self) -> None:
        self.records: list[tuple[Any, ...]] = []
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
        # No module, so that none is unloaded when the real driver is back.
        return None, 1, 0, 0, 1024

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


def arguments(**changes: Any) -> dict[str, Any]:
    x, y, out = (torch.zeros(64) for _ in range(3))
    usual = {"x_ptr": x, "y_ptr": y, "out_ptr": out, "N": 1024, "scale": 0.5, "BLOCK": 64}
    return usual | {"num_warps": 4} | changes


FORMS = {
    "usual": {},
    "one": {"N": 1},
    "no-multiple-of-16": {"N": 1023},
    "64-bits": {"N": 2**31},
    "fp16": {"x_ptr": torch.zeros(64, dtype=torch.half)},
    "parameter": {"x_ptr": torch.nn.Parameter(torch.zeros(64))},
    "none": {"y_ptr": None},
    "block": {"BLOCK": 128},
    "warps": {"num_warps": 8},
    "stages": {"num_stages": 2},
    "scale": {"scale": 1.0},
    "off-16-bytes": {"x_ptr": torch.zeros(65)[1:]},
    "other-option": {"maxnreg": 64},
}


def test_a_remembered_launch_is_the_one_triton_makes(driver, num_slow):
    plain, quick = triton.jit(add_kernel), launch.QuickKernel(add_kernel)
    # All in one kernel, so that a form which another's key covers would be launched as that.
    for name, changes in FORMS.items():
        given = arguments(**changes)
        plain[(3,)](**given)
        before = num_slow["add_kernel"]
        quick[(3,)](**given)
        quick[(3,)](**given)
        wanted, *ours = driver.records
        assert ours == [wanted, wanted], name
        # The second is remembered, except where Triton has to look at every launch.
        wanted_slow = {"parameter": 0, "off-16-bytes": 2, "other-option": 2}.get(name, 1)
        assert num_slow["add_kernel"] - before == wanted_slow, name
        driver.records.clear()


def test_grid_device_and_stream_are_those_of_the_call(driver, num_slow):
    quick = launch.QuickKernel(add_kernel)
    given = arguments()
    for _ in range(2):
        for device in (0, 1):
            driver.device = device
            for grid in ((3,), (3, 2), (5,)):
                quick[grid](**given)
    grids = [(3, 1, 1), (3, 2, 1), (5, 1, 1)]
    wanted = [(grid, 7 + device) for _ in range(2) for device in (0, 1) for grid in grids]
    assert [(grid, stream) for _, grid, stream, _ in driver.records] == wanted
    assert num_slow["add_kernel"] == len(wanted) // 2


def test_other_ways_to_call_are_left_to_triton(driver, num_slow):
    quick = launch.QuickKernel(add_kernel)
    given = arguments()
    for _ in range(2):
        quick[lambda meta: (meta["BLOCK"],)](**given)
        values = list(given.values())
        quick[(64,)](*values[:-1], num_warps=4)
    assert num_slow["add_kernel"] == 4
    first, *others = driver.records
    assert others == [first] * 3


def test_what_is_remembered_is_bounded(driver, monkeypatch):
    monkeypatch.setattr(launch, "_MAX_LAUNCHES", 3)
    quick = launch.QuickKernel(add_kernel)
    for n in range(16, 160, 16):
        quick[(1,)](**arguments(N=n))
        assert len(quick._launches) <= 3
    assert [record[3][3] for record in driver.records] == list(range(16, 160, 16))


def test_pointers_must_come_first():
    with pytest.raises(AssertionError, match="pointers must come first"):
        launch.QuickKernel(mixed_kernel)


@pytest.mark.parametrize("norm", ["rms_norm", "layer_norm", "fused_add_rms_norm"])
@pytest.mark.parametrize(("rows", "num_kernels"), [(64, 2), (65, 3)], ids=["few", "many"])
def test_a_repeated_norm_never_enters_triton(
    norm, rows, num_kernels, driver, num_slow, monkeypatch
):
    from liger_kernels import ops

    monkeypatch.setattr(launch, "backend", lambda device: "triton")
    for module in (launch, rms_norm_kernel, layer_norm_kernel):
        for name, kernel in vars(module).copy().items():
            if name.endswith("_kernel"):
                monkeypatch.setattr(module, name, launch.QuickKernel(kernel.fn))
    x, residual = (torch.zeros(rows, 1024, requires_grad=True) for _ in range(2))
    weight = torch.ones(1024, requires_grad=True)
    more = {"rms_norm": (weight,), "layer_norm": (weight, weight.detach())}
    for _ in range(3):
        y = getattr(ops, norm)(x, *more.get(norm, (residual, weight)))
        (y[0] if isinstance(y, tuple) else y).sum().backward()
    # Few elements are one program's, whose sum over rows needs no other.
    assert len(driver.records) == 3 * num_kernels
    assert list(num_slow.values()) == [1] * num_kernels


TRACE = """
    import warnings
    from types import FunctionType
    import torch
    import torch.utils._triton
    # A tracer that finds no GPU would not know a kernel when it sees one.
    torch.utils._triton.has_triton = lambda *args: True
    torch.version.cuda = torch.version.cuda or "13.0"
    from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table
    from liger_kernels.ops import fused_add_rms_norm, launch, layer_norm, rms_norm

    launch.backend = lambda device: "triton"

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
        name = norm.__name__.removeprefix("fused_add_")
        kernels = {f"{name}_fwd_kernel", f"{name}_bwd_kernel", "sum_partials_kernel"}
        assert all(names == kernels for names in graphs), graphs
"""


def test_case_30_a_tracer_sees_the_kernels_and_no_number_of_rows():
    # In its own process: whether there is a GPU is asked once, when torch's tracer is imported.
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(TRACE)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr
