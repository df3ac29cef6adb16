"""Time the launches of the norms' kernels, the norms with their host, and a small one's host alone.

python3 scripts/tune_norms.py --output runs/tune

A line a measurement. "norm kernel" feeds the tables of rms_norm_kernel.py, where
fused_add_rms_norm has another backward, and of layer_norm_kernel.py: its variant is a RowShape
(elements, warps, programs, stages, splits), its plan the RowPlan that this became. "sum kernel"
feeds _SUM_TILE of rows.py, and "host" its _ALONE: 64 rows of 1024 are one program's, 65 are not.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from tuning import Results, rms_error, time_ms

from liger_kernels.ops import (
    fused_add_rms_norm,
    layer_norm,
    layer_norm_kernel,
    rms_norm,
    rms_norm_kernel,
)
from liger_kernels.ops import (
    rows as row_launches,
)
from liger_kernels.ops.launcher import lookup
from liger_kernels.ops.registry import OPS
from liger_kernels.ops.rows import RowShape, persistent_row_plan, row_plan

BF16 = torch.bfloat16
SHAPES = ((16384, 2048), (16384, 4096), (8192, 8192), (262144, 128), (8192, 5120), (8192, 2304))
# Passes over memory, forward and backward.
UNITS = {"rms_norm": (2, 3), "layer_norm": (2, 3), "fused_add_rms_norm": (4, 4)}
# By width; what is in the tables is timed first.
FORWARD = {
    128: (RowShape(4096, 4), RowShape(4096, 8), RowShape(1024, 4)),
    2048: (RowShape(2048, 4), RowShape(4096, 8), RowShape(4096, 4)),
    2304: (RowShape(2048, 4), RowShape(2048, 16)),
    4096: (RowShape(2048, 4), RowShape(2048, 16)),
    5120: (RowShape(2048, 8), RowShape(2048, 4)),
    8192: (RowShape(2048, 8), RowShape(2048, 32)),
}
BACKWARD = {
    128: (
        RowShape(4096, 4, 2),
        RowShape(4096, 4, 3),
        RowShape(4096, 8, 2),
        RowShape(2048, 4, 4, 5),
    ),
    2048: (
        RowShape(2048, 4, 2, 5),
        RowShape(2048, 4, 4),
        RowShape(4096, 8, 1, 5),
        RowShape(4096, 8, 2),
        RowShape(8192, 8, 1),
        RowShape(8192, 16, 1),
    ),
    2304: (
        RowShape(2048, 4, 2),
        RowShape(2048, 4, 4),
        RowShape(8192, 8, 1),
        RowShape(2048, 4, 2, 3, False),
        RowShape(8192, 8, 1, 3, False),
    ),
    4096: (
        RowShape(2048, 8, 1, 5),
        RowShape(2048, 8, 2, 5),
        RowShape(8192, 16, 1),
        RowShape(8192, 8, 1),
    ),
    5120: (
        RowShape(2048, 8, 1),
        RowShape(2048, 16, 1, 2),
        RowShape(2048, 16, 1, 3, False),
        RowShape(2048, 8, 1, 3, False),
    ),
    8192: (RowShape(2048, 16, 1, 2), RowShape(2048, 8, 1), RowShape(2048, 32, 1)),
}
# (BLOCK_P, BLOCK_N, warps), and (programs, width) of what they add up.
SUM_TILES = ((32, 64, 4), (64, 32, 4), (128, 32, 4), (128, 32, 8), (128, 16, 4), (64, 64, 8))
SUMS = ((132, 128), (132, 2048), (264, 2048), (528, 2048), (264, 4096), (132, 8192))
NUM_COMPILERS = 8


class Norm(NamedTuple):
    """A norm's tensors at one shape, and what launches its kernels."""

    forward: Callable[[], tuple[Tensor, ...]]
    backward: Callable[[], tuple[Tensor, ...]]
    # y, then the gradients that backward returns.
    wanted: Callable[[], tuple[Tensor, ...]]


def kernels_of(op: str) -> Any:
    return layer_norm_kernel if op == "layer_norm" else rms_norm_kernel


def make_norm(op: str, rows: int, width: int) -> Norm:
    x, residual, dy, dtotal = (
        torch.randn(rows, width, dtype=BF16, device="cuda") for _ in range(4)
    )
    weight, bias = (torch.randn(width, dtype=BF16, device="cuda") for _ in range(2))
    module = kernels_of(op)
    if op == "layer_norm":
        options = module.LayerNormOptions(1e-5, BF16)
        given, gradients = (x, weight, bias), (dy,)

        def forward() -> tuple[Tensor, ...]:
            return module.layer_norm_fwd(x, weight, bias, options)

        stats = forward()[1]

        def backward() -> tuple[Tensor, ...]:
            return module.layer_norm_bwd(dy, x, weight, stats, BF16, BF16)
    else:
        options = module.NormOptions(1e-6, 0.0, "before_weight", BF16)
        is_sum = op == "fused_add_rms_norm"
        given = (x, residual, weight) if is_sum else (x, weight)
        gradients = (dy, dtotal) if is_sum else (dy,)

        def forward() -> tuple[Tensor, ...]:
            return module.rms_norm_fwd(x, weight, options, residual=residual if is_sum else None)

        _, rstd, total = forward()

        def backward() -> tuple[Tensor, ...]:
            more = dtotal if is_sum else None
            return module.rms_norm_bwd(dy, total, weight, rstd, options, True, dtotal=more)

    def wanted() -> tuple[Tensor, ...]:
        leaves = [t.float().requires_grad_() for t in given]
        y = OPS[op].reference(*leaves)
        outputs = y if isinstance(y, tuple) else (y,)
        grads = torch.autograd.grad(outputs, leaves, [g.float() for g in gradients])
        # x and the residual have one gradient.
        return outputs[0].detach(), grads[0], *grads[-(2 if op == "layer_norm" else 1) :]

    return Norm(forward, backward, wanted)


def variants(op: str, is_backward: bool, width: int) -> list[RowShape]:
    module = kernels_of(op)
    table = getattr(module, table_of(op, is_backward))
    more = (BACKWARD if is_backward else FORWARD)[width]
    return list(dict.fromkeys((lookup(table, width), *more)))


def table_of(op: str, is_backward: bool) -> str:
    if not is_backward:
        return "_FWD_SHAPES"
    return "_ADD_BWD_SHAPES" if op == "fused_add_rms_norm" else "_BWD_SHAPES"


def use(op: str, is_backward: bool, shape: RowShape) -> None:
    setattr(kernels_of(op), table_of(op, is_backward), ((1 << 62, shape),))


def compile_kernels(task: tuple[str, int]) -> None:
    """Compile all variants, on fewer rows, into the cache on disk; failures show when timed."""
    op, width = task
    plans = {is_backward: variants(op, is_backward, width) for is_backward in (False, True)}
    norm = make_norm(op, 4096, width)
    for is_backward, shapes in plans.items():
        for shape in shapes:
            use(op, is_backward, shape)
            try:
                (norm.backward if is_backward else norm.forward)()
            except Exception:
                continue


def tune_kernels(results: Results, op: str, rows: int, width: int) -> None:
    module = kernels_of(op)
    norm = make_norm(op, rows, width)
    wanted_y, *wanted_gradients = norm.wanted()
    best_ms = 0.0
    for is_backward, units in zip((False, True), UNITS[op], strict=True):
        run = norm.backward if is_backward else norm.forward
        num_bytes = units * rows * width * BF16.itemsize
        itemsize = 6 if op == "fused_add_rms_norm" else 4
        times = []
        table = table_of(op, is_backward)
        usual = getattr(module, table)
        for shape in variants(op, is_backward, width):
            plan = (
                persistent_row_plan(shape, width, rows, itemsize, torch.device("cuda", 0))
                if is_backward
                else row_plan(shape, width, rows)
            )
            described = {
                "norm": op,
                "shape": (rows, width),
                "direction": "backward" if is_backward else "forward",
                "variant": tuple(shape),
                "plan": tuple(plan),
            }
            use(op, is_backward, shape)
            try:
                outputs = run()
            except Exception as problem:
                results.add(
                    "norm kernel", **described, error=f"{type(problem).__name__}: {problem}"
                )
                continue
            pairs = zip(outputs, wanted_gradients, strict=True) if is_backward else ()
            errors = [rms_error(*pair) for pair in pairs] or [rms_error(outputs[0], wanted_y)]
            assert max(errors) < 4e-3, (described, errors)
            ms = time_ms(run, rep=20)
            times.append(ms)
            results.add("norm kernel", **described, ms=ms, share=results.copy_share(num_bytes, ms))
        setattr(module, table, usual)
        best_ms += min(times)
    share = results.copy_share(sum(UNITS[op]) * rows * width * BF16.itemsize, best_ms)
    results.add("norm at best", norm=op, shape=(rows, width), direction="both", share=share)


def tune_sums(results: Results) -> None:
    usual = row_launches._SUM_TILE
    for (programs, width), tile in itertools.product(SUMS, SUM_TILES):
        partial = torch.randn(programs, width, device="cuda")
        row_launches._SUM_TILE = tile
        assert rms_error(row_launches.sum_partials(partial, BF16), partial.sum(0)) < 4e-3, tile
        # Written by the kernel before it, and so still in the cache, which time_ms() flushes.
        ms = time_ms(lambda partial=partial: row_launches.sum_partials(partial, BF16), rep=10)
        results.add("sum kernel", shape=(programs, width), variant=tile, ms=ms)
    row_launches._SUM_TILE = usual


def calls(rows: int, width: int) -> dict[str, Callable[[], Any]]:
    """Return ours and torch's own, each forward and backward, by name."""
    x, residual = (
        torch.randn(rows, width, dtype=BF16, device="cuda", requires_grad=True) for _ in range(2)
    )
    weight, bias = (
        torch.randn(width, dtype=BF16, device="cuda", requires_grad=True) for _ in range(2)
    )
    dy = torch.randn_like(x)
    both = (x, weight)

    def call(function: Callable[[], Tensor], *leaves: Tensor) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(function(), leaves, dy)

    return {
        "rms_norm": call(lambda: rms_norm(x, weight), *both),
        "torch rms_norm": call(lambda: F.rms_norm(x, (width,), weight, 1e-6), *both),
        "layer_norm": call(lambda: layer_norm(x, weight, bias), *both, bias),
        "torch layer_norm": call(lambda: F.layer_norm(x, (width,), weight, bias), *both, bias),
        "fused_add_rms_norm": call(
            lambda: fused_add_rms_norm(x, residual, weight)[0], *both, residual
        ),
        "torch add, rms_norm": call(
            lambda: F.rms_norm(x + residual, (width,), weight, 1e-6), *both, residual
        ),
    }


def host_us(function: Callable[[], Any], num_calls: int = 1000) -> float:
    """Return the host's time for a call that it does not wait for, in microseconds."""
    times = []
    for num in (100, num_calls, num_calls, num_calls):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(num):
            function()
        times.append((time.perf_counter() - start) / num * 1e6)
    torch.cuda.synchronize()
    return statistics.median(times[1:])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/tune"))
    options = parser.parse_args()
    torch.manual_seed(0)
    results = Results(options.output, "norms")
    tasks = list(itertools.product(UNITS, (width for _, width in SHAPES)))
    with multiprocessing.get_context("spawn").Pool(NUM_COMPILERS) as pool:
        pool.map(compile_kernels, tasks, chunksize=1)
    for op, (rows, width) in itertools.product(UNITS, SHAPES):
        tune_kernels(results, op, rows, width)
    tune_sums(results)
    for rows, width in SHAPES:
        for name, function in calls(rows, width).items():
            results.add("norm", norm=name, shape=(rows, width), wall_ms=time_ms(function, rep=20))
    for rows in (64, 65):
        for name, function in calls(rows, 1024).items():
            us, ms = host_us(function), time_ms(function, rep=20)
            results.add("host", norm=name, shape=(rows, 1024), host_us=us, wall_ms=ms)
    return 0


if __name__ == "__main__":
    sys.exit(main())
