"""Routing of tokens to experts: a counting sort of slots by expert, without a device sync.

Legend: T tokens, K experts a token, E experts; slot t K + k is the k-th choice of token t, S = T K.
A row is a slot's place after sorting, -1 where its expert id is out of range. Three kernels count
the slots of each block and expert, add up the counts, and place each slot; the sort is stable.
"""

from typing import NamedTuple

import torch

from liger_kernels.ops.backend import INTERPRETED, tl, triton
from liger_kernels.ops.launcher import Launch, cache_by_shape, cdiv, lookup, next_power_of_2

# Slots times experts of a program of the sort, and the most slots; in the interpreter few, so that
# a small case has several blocks.
_SORT_TILE, _SORT_SLOTS = 16384, 16 if INTERPRETED else 256
# Blocks of slots of a program that adds up the counts of the blocks, by how many there are; looked
# up, since a tracer takes the bits of a number of rows for that number alone. And its experts.
_SCAN_BLOCKS = ((4, 4),) if INTERPRETED else ((64, 64), (1024, 1024))
_SCAN_EXPERTS = 4


class Routing(NamedTuple):
    """Where each slot's row is."""

    expert_ids: torch.Tensor  # (T, K) contiguous; out of 0 to E - 1 where a slot is empty
    slots: torch.Tensor  # (S,) int32, the slot of each row; anything past the last group
    rows: torch.Tensor  # (T, K) int32, the row of each slot, -1 where it is empty
    offsets: torch.Tensor  # (E,) int32, where the rows of each expert end

    @property
    def top_k(self) -> int:
        """Return K."""
        return self.rows.shape[1]


def route(expert_ids: torch.Tensor, num_experts: int, *, triton_runs: bool) -> Routing:
    """Sort slots by expert; slots of one expert keep their order.

    Args:
        expert_ids: (T, K), any integer dtype.
        num_experts: E; ids out of 0 to E - 1 are empty slots.
        triton_runs: Whether kernels do it, and torch code otherwise.
    """
    expert_ids = expert_ids.contiguous()
    num_slots = expert_ids.numel()
    if not triton_runs:
        return _route_torch(expert_ids, num_experts)
    device = expert_ids.device
    block_e = next_power_of_2(num_experts)
    block_s = max(1, min(_SORT_SLOTS, _SORT_TILE // block_e))
    num_blocks = cdiv(num_slots, block_s)
    counts = torch.empty((num_blocks, num_experts), dtype=torch.int32, device=device)
    totals = torch.empty(num_experts, dtype=torch.int32, device=device)
    slots = torch.empty(num_slots, dtype=torch.int32, device=device)
    rows = torch.empty(expert_ids.shape, dtype=torch.int32, device=device)
    offsets = torch.empty(num_experts, dtype=torch.int32, device=device)
    count, scan, place = _sort_launches(num_slots, num_experts, block_s, block_e)
    count(expert_ids, counts)
    scan(counts, totals)
    place(expert_ids, counts, totals, slots, rows, offsets)
    return Routing(expert_ids, slots, rows, offsets)


def _route_torch(expert_ids: torch.Tensor, num_experts: int) -> Routing:
    flat = expert_ids.flatten().long()
    is_used = (flat >= 0) & (flat < num_experts)
    # Empty slots come last.
    ordered, slots = flat.where(is_used, num_experts).sort(stable=True)
    places = torch.arange(flat.numel(), device=flat.device)
    rows = torch.zeros_like(slots).scatter_(0, slots, places).where(is_used, -1)
    experts = torch.arange(num_experts, device=flat.device)
    offsets = torch.searchsorted(ordered, experts, right=True)
    return Routing(expert_ids, slots.int(), rows.int().view(expert_ids.shape), offsets.int())


@triton.jit
def _hits(expert_ids_ptr, S, BLOCK_S: tl.constexpr, BLOCK_E: tl.constexpr):
    """Return the slots of this program, and which expert each one has, as 0 and 1."""
    slots = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    ids = tl.load(expert_ids_ptr + slots, mask=slots < S, other=-1)
    hits = (ids[:, None] == tl.arange(0, BLOCK_E)[None, :]) & (slots < S)[:, None]
    return slots, hits.to(tl.int32)


@triton.jit
def _count_kernel(
    expert_ids_ptr,  # (S,)
    counts_ptr,  # (blocks, E) int32
    S,
    E,
    BLOCK_S: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    _, hits = _hits(expert_ids_ptr, S, BLOCK_S, BLOCK_E)
    experts = tl.arange(0, BLOCK_E)
    counts = tl.sum(hits, 0)
    tl.store(counts_ptr + tl.program_id(0) * E + experts, counts, mask=experts < E)


@triton.jit
def _scan_kernel(
    counts_ptr,  # (blocks, E) int32; the counts of the blocks before are written over it
    totals_ptr,  # (E,) int32
    num_blocks,
    E,
    BLOCK_B: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    experts = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    before = tl.zeros((BLOCK_E,), tl.int32)
    for start in range(0, num_blocks, BLOCK_B):
        blocks = start + tl.arange(0, BLOCK_B)
        mask = (blocks[:, None] < num_blocks) & (experts[None, :] < E)
        places = counts_ptr + blocks[:, None] * E + experts[None, :]
        counts = tl.load(places, mask=mask, other=0)
        tl.store(places, tl.cumsum(counts, 0) - counts + before[None, :], mask=mask)
        before += tl.sum(counts, 0)
    tl.store(totals_ptr + experts, before, mask=experts < E)


@triton.jit
def _place_kernel(
    expert_ids_ptr,  # (S,)
    counts_ptr,  # (blocks, E) int32, of the blocks before
    totals_ptr,  # (E,) int32
    slots_ptr,  # (S,) int32
    rows_ptr,  # (S,) int32
    offsets_ptr,  # (E,) int32
    S,
    E,
    BLOCK_S: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    block = tl.program_id(0)
    experts = tl.arange(0, BLOCK_E)
    totals = tl.load(totals_ptr + experts, mask=experts < E, other=0)
    ends = tl.cumsum(totals, 0)
    if block == 0:
        tl.store(offsets_ptr + experts, ends, mask=experts < E)
    slots, hits = _hits(expert_ids_ptr, S, BLOCK_S, BLOCK_E)
    starts = tl.load(counts_ptr + block * E + experts, mask=experts < E, other=0)
    starts += ends - totals
    places = tl.cumsum(hits, 0) - hits + starts[None, :]
    row = tl.sum(hits * places, 1)
    is_used = tl.sum(hits, 1) > 0
    tl.store(rows_ptr + slots, tl.where(is_used, row, -1), mask=slots < S)
    tl.store(slots_ptr + row, slots, mask=is_used)


@cache_by_shape
def _sort_launches(
    num_slots: int, num_experts: int, block_s: int, block_e: int
) -> tuple[Launch, Launch, Launch]:
    num_blocks = cdiv(num_slots, block_s)
    sizes = {"S": num_slots, "E": num_experts, "BLOCK_S": block_s, "BLOCK_E": block_e}
    scan = Launch(
        _scan_kernel,
        (cdiv(num_experts, _SCAN_EXPERTS),),
        num_blocks=num_blocks,
        E=num_experts,
        BLOCK_B=lookup(_SCAN_BLOCKS, num_blocks),
        BLOCK_E=_SCAN_EXPERTS,
        num_warps=4,
    )
    count = Launch(_count_kernel, (num_blocks,), **sizes, num_warps=4)
    return count, scan, Launch(_place_kernel, (num_blocks,), **sizes, num_warps=4)
