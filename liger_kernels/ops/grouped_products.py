"""Matrix products of groups of rows, each group with a separate matrix, without a device sync.

Legend: S rows in E groups that lie one after another; offsets (E,) int32, the end of each group;
K and N widths. Rows past the last group belong to none: they are neither read nor written.
torch's grouped product serves bf16 on NVIDIA GPUs from sm_80 on where every row begins at a
multiple of 16 bytes. A Triton kernel serves the rest, since torch's own way for other dtypes waits
for the device; and off the GPU a loop over the groups.
"""

import torch

from liger_kernels.ops.backend import INTERPRETED, runs_triton, tl, triton
from liger_kernels.ops.launcher import Launch, cache_by_shape, cdiv, next_power_of_2

# Tile of the Triton kernels: rows, columns, the step over what is summed, and warps. The
# interpreter takes as long for a large tile as for a small one.
_TILE = (16, 64, 64, 4) if INTERPRETED else (64, 64, 32, 4)
# How many products are added up before they are added to the others: in fp32, where one long sum
# would lose a digit, and in narrower dtypes, where rounding the result hides that.
_PART, _LONG_PART = 128, 2**20


def _part(x: torch.Tensor) -> int:
    return _PART if x.dtype == torch.float32 else _LONG_PART


def grouped_product(x: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Return x[rows of e] @ weight[e] for every group e.

    Args:
        x: (S, K), rows contiguous.
        weight: (E, K, N) in x's dtype, of any strides.
        offsets: (E,) int32 on x's device.

    Returns:
        (S, N) in x's dtype, summed in fp32 or wider. Rows past the last group hold anything.
    """
    if x.is_meta:
        return x.new_empty((x.shape[0], weight.shape[2]))
    if _runs_torch(x, weight):
        return torch._grouped_mm(x, weight, offs=offsets)
    if not _runs_kernel(x):
        out = x.new_zeros((x.shape[0], weight.shape[2]))
        for rows, matrix in zip(_groups(offsets), weight, strict=True):
            torch.mm(x[rows], matrix, out=out[rows])
        return out
    out = torch.empty((x.shape[0], weight.shape[2]), dtype=x.dtype, device=x.device)
    _product_launch(*x.shape, *weight.shape[::2], x.stride(0), weight.stride(), _TILE, _part(x))(
        x, weight, offsets, out
    )
    return out


def grouped_outer(a: torch.Tensor, b: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Return a[rows of e].T @ b[rows of e] for every group e: the gradient of its matrix.

    Args:
        a: (S, K), rows contiguous.
        b: (S, N), likewise and in a's dtype.
        offsets: (E,) int32 on a's device.

    Returns:
        (E, K, N), contiguous, in a's dtype, summed in fp32 or wider; 0 for groups without rows.
    """
    size = (offsets.shape[0], a.shape[1], b.shape[1])
    if a.is_meta:
        return a.new_empty(size)
    if _runs_torch(a, b):
        return torch._grouped_mm(a.t(), b, offs=offsets)
    if not _runs_kernel(a):
        out = a.new_empty(size)
        for rows, matrix in zip(_groups(offsets), out, strict=True):
            torch.mm(a[rows].t(), b[rows], out=matrix)
        return out
    out = torch.empty(size, dtype=a.dtype, device=a.device)
    _outer_launch(size, a.stride(0), b.stride(0), _TILE, _part(a))(a, b, offsets, out)
    return out


def _groups(offsets: torch.Tensor) -> list[slice]:
    """Return the rows of each group; waits for the device."""
    ends = offsets.tolist()
    return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]


def _runs_kernel(x: torch.Tensor) -> bool:
    """Return whether the Triton kernels serve x; the interpreter's product knows no bf16."""
    return runs_triton(x) and not (INTERPRETED and x.dtype == torch.bfloat16)


def _runs_torch(*tensors: torch.Tensor) -> bool:
    """Return whether torch's grouped product takes these tensors without waiting for the device."""
    first = tensors[0]
    if first.device.type != "cuda" or INTERPRETED or torch.version.hip is not None:
        return False
    if not hasattr(torch, "_grouped_mm") or torch.cuda.get_device_capability(first.device) < (8, 0):
        return False
    # It pads rows of its result that would not begin at a multiple of 16 bytes.
    return all(map(_is_aligned, tensors)) and tensors[-1].shape[-1] % 8 == 0


def _is_aligned(x: torch.Tensor) -> bool:
    """Return whether x is bf16, packed in one of its last two dimensions, and the rest in steps of
    16 bytes from an address that is one."""
    if x.dtype != torch.bfloat16:
        return False
    *outer, first, second = x.stride()
    if second == 1:
        steps = [*outer, first]
    elif first == 1:
        steps = [*outer, second]
    else:
        return False
    is_tracing = torch.compiler.is_compiling()
    return all(step % 8 == 0 for step in steps) and (is_tracing or x.data_ptr() % 16 == 0)


@triton.jit
def _product_kernel(
    x_ptr,  # (S, K)
    weight_ptr,  # (E, K, N)
    offsets_ptr,  # (E,) int32
    out_ptr,  # (S, N)
    stride_xs,
    stride_we,
    stride_wk,
    stride_wn,
    E,
    K,
    N,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_PART: tl.constexpr,
):
    # Groups begin anywhere, so that each has separate tiles: which one is this program's is found
    # from the ends of the groups.
    tile = tl.program_id(0)
    groups = tl.arange(0, BLOCK_E)
    ends = tl.load(offsets_ptr + groups, mask=groups < E, other=0)
    starts = tl.load(offsets_ptr + groups - 1, mask=(groups < E) & (groups > 0), other=0)
    sizes = tl.where(groups < E, ends - starts, 0)
    tiles = (sizes + BLOCK_M - 1) // BLOCK_M
    last_tiles = tl.cumsum(tiles, 0)
    group = tl.sum((last_tiles <= tile).to(tl.int32), 0)
    if group < E:
        is_mine = groups == group
        first_tile = tl.sum(tl.where(is_mine, last_tiles - tiles, 0), 0)
        start = tl.sum(tl.where(is_mine, starts, 0), 0)
        end = tl.sum(tl.where(is_mine, ends, 0), 0)
        rows = start + (tile - first_tile) * BLOCK_M + tl.arange(0, BLOCK_M)
        cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        wide_rows = rows.to(tl.int64)
        matrix_ptr = weight_ptr + group.to(tl.int64) * stride_we + cols[None, :] * stride_wn
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for part in range(0, K, BLOCK_PART):
            part_acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for begin in range(part, tl.minimum(part + BLOCK_PART, K), BLOCK_K):
                inner = begin + tl.arange(0, BLOCK_K)
                x_mask = (rows[:, None] < end) & (inner[None, :] < K)
                places = x_ptr + wide_rows[:, None] * stride_xs + inner[None, :]
                x = tl.load(places, mask=x_mask, other=0.0)
                w_mask = (inner[:, None] < K) & (cols[None, :] < N)
                w = tl.load(matrix_ptr + inner[:, None] * stride_wk, mask=w_mask, other=0.0)
                part_acc = tl.dot(x, w, part_acc, input_precision="ieee")
            acc += part_acc
        mask = (rows[:, None] < end) & (cols[None, :] < N)
        out = acc.to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + wide_rows[:, None] * N + cols[None, :], out, mask=mask)


@triton.jit
def _outer_kernel(
    a_ptr,  # (S, K)
    b_ptr,  # (S, N)
    offsets_ptr,  # (E,) int32
    out_ptr,  # (E, K, N)
    stride_as,
    stride_bs,
    K,
    N,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_PART: tl.constexpr,
):
    group = tl.program_id(2)
    start = tl.load(offsets_ptr + group - 1, mask=group > 0, other=0)
    end = tl.load(offsets_ptr + group)
    inner = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_K, BLOCK_N), tl.float32)
    for part in range(start, end, BLOCK_PART):
        part_acc = tl.zeros((BLOCK_K, BLOCK_N), tl.float32)
        for begin in range(part, tl.minimum(part + BLOCK_PART, end), BLOCK_S):
            rows = begin + tl.arange(0, BLOCK_S)
            wide_rows = rows.to(tl.int64)
            is_row = rows < end
            a_mask = (inner[:, None] < K) & is_row[None, :]
            places = a_ptr + wide_rows[None, :] * stride_as + inner[:, None]
            a = tl.load(places, mask=a_mask, other=0.0)
            b_mask = is_row[:, None] & (cols[None, :] < N)
            places = b_ptr + wide_rows[:, None] * stride_bs + cols[None, :]
            b = tl.load(places, mask=b_mask, other=0.0)
            part_acc = tl.dot(a, b, part_acc, input_precision="ieee")
        acc += part_acc
    mask = (inner[:, None] < K) & (cols[None, :] < N)
    matrix_ptr = out_ptr + group.to(tl.int64) * K * N
    offsets = inner[:, None].to(tl.int64) * N + cols[None, :]
    tl.store(matrix_ptr + offsets, acc.to(out_ptr.dtype.element_ty), mask=mask)


@cache_by_shape
def _product_launch(num_rows, inner, num_groups, width, stride, strides, tile, part) -> Launch:
    block_m, block_n, block_k, num_warps = tile
    # Every group may end with a tile that is not full.
    grid = (cdiv(num_rows, block_m) + num_groups, cdiv(width, block_n))
    return Launch(
        _product_kernel,
        grid,
        stride_xs=stride,
        stride_we=strides[0],
        stride_wk=strides[1],
        stride_wn=strides[2],
        E=num_groups,
        K=inner,
        N=width,
        BLOCK_E=next_power_of_2(num_groups),
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        BLOCK_PART=part,
        num_warps=num_warps,
    )


@cache_by_shape
def _outer_launch(size, stride_a, stride_b, tile, part) -> Launch:
    num_groups, inner, width = size
    block_k, block_n, block_s, num_warps = tile
    return Launch(
        _outer_kernel,
        (cdiv(inner, block_k), cdiv(width, block_n), num_groups),
        stride_as=stride_a,
        stride_bs=stride_b,
        K=inner,
        N=width,
        BLOCK_K=block_k,
        BLOCK_N=block_n,
        BLOCK_S=block_s,
        BLOCK_PART=part,
        num_warps=num_warps,
    )
