"""Kernels over whole rows: tiles and launches by width, strides, and sums over programs."""

from typing import NamedTuple

import torch

from liger_kernels.ops.backend import tl, triton
from liger_kernels.ops.launcher import (
    Launch,
    cache_by_shape,
    cdiv,
    lookup,
    next_power_of_2,
    num_sms,
)

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

    # Of a tile of narrow rows, about; a wider row is one tile.
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


def pieces_of(num_rows: int, size: int) -> list[slice]:
    """Return slices of so many rows one after another; the last may be shorter."""
    return [slice(start, min(start + size, num_rows)) for start in range(0, num_rows, size)]


def no_values(x: torch.Tensor, width: int) -> torch.Tensor:
    """Return (rows of x, width) in x's dtype without memory for it: a result that nobody reads."""
    return x.new_empty(()).expand(x.shape[0], width)


def in_rows(x: torch.Tensor) -> torch.Tensor:
    """Return x itself if it is contiguous, of whatever rank, else as rows_of() does.

    A view costs the host as much as an allocation; row_stride() knows both forms.
    """
    return x if x.is_contiguous() else rows_of(x)


def row_stride(x: torch.Tensor) -> int:
    """Return how far apart the rows of in_rows(x) are."""
    return x.shape[-1] if x.is_contiguous() else x.stride(0)


# (BLOCK_P, BLOCK_N, warps): the input is small and read once, so that only latency counts. 5 to
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


@cache_by_shape
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
