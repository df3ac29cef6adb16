"""Rotary positions: each pair (x1, x2) of a head becomes (x1 cos - x2 sin, x2 cos + x1 sin).

Legend: B batch, T tokens, H heads (HQ of q, HK of k), D head size, R rotary width, R <= D.
The style says which elements make a pair. "half" (Llama): i and i + R/2. "pairs" (GLM-4): 2i and
2i + 1. "pairs_to_half" (DeepSeek-V3): read as pairs, written as halves; q.k does not feel that.
Rounding: fp32 throughout and one rounding, to the dtype of q and of k; eager code rounds each
product and their sum. Elements past R are copied bit by bit.
Memory: saves cos and sin, which all layers share; eager code makes four temporaries of q's size.
Backward: the opposite angle, with the two layouts of a pair exchanged; the same kernel does it.
Source: Su et al., RoFormer, https://arxiv.org/abs/2104.09864, eq. 34.
"""

from typing import Any

import torch

from liger_kernels.ops.arguments import Choice, Integer, TensorArgument, check_tensors
from liger_kernels.ops.autograd import differentiable_once
from liger_kernels.ops.backend import is_left_to_compiler, runs_triton
from liger_kernels.ops.op import Case, Op, Sample, randn, upcast
from liger_kernels.ops.rope_kernel import RopeOptions, launch_rope, pair_layouts

STYLES = ("half", "pairs", "pairs_to_half")
_TENSORS = (
    TensorArgument("q", "(B, H, T, D)", "be floating of rank 3 or 4"),
    TensorArgument("k", "(B, H, T, D)", "be floating and as q", is_optional=True),
    TensorArgument("cos", "(B, T, W)", "be floating", is_constant=True),
    TensorArgument("sin", "(B, T, W)", "be floating", is_constant=True),
)
_STYLE = Choice("style", STYLES)
_ROTARY_DIM = Integer("rotary_dim", "None or an int", is_optional=True)
_UNSQUEEZE_DIM = Integer("unsqueeze_dim")


def rope_ref(
    q: torch.Tensor,
    k: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    style: str = "half",
    rotary_dim: int | None = None,
    unsqueeze_dim: int = 1,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The definition, in plain torch, with the roundings of transformers' apply_rotary_pos_emb."""
    width = rotary_dim or cos.shape[-1]

    def turn(x: torch.Tensor) -> torch.Tensor:
        rank = x.dim()
        c, s = (_broadcast(table, rank, width, unsqueeze_dim % rank - rank) for table in (cos, sin))
        rotary, rest = x[..., :width], x[..., width:]
        first = rotary[..., : width // 2] if style == "half" else rotary[..., 0::2]
        second = rotary[..., width // 2 :] if style == "half" else rotary[..., 1::2]
        both = (first * c - second * s, second * c + first * s)
        turned = torch.stack(both, -1).flatten(-2) if style == "pairs" else torch.cat(both, -1)
        return torch.cat((turned.to(x.dtype), rest), -1)

    return turn(q), None if k is None else turn(k)


def _broadcast(table, rank, width, head_axis):
    """Return one value a pair, with an axis for the heads; it broadcasts to (B, H, T, R / 2)."""
    table = table[0] if table.dim() == rank else table
    return table[..., : width // 2].unsqueeze(head_axis)


def _empty_like(x: torch.Tensor) -> torch.Tensor:
    """Return memory in the order of x's dimensions, gaps left out; D is contiguous in any case."""
    y = torch.empty_like(x)
    return y if y.stride(-1) == 1 else torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _turn(x, y, cos, sin, options, is_backward):
    width = options.rotary_dim
    pairs = slice(0, width, 2), slice(1, width, 2)
    halves = slice(0, width // 2), slice(width // 2, width)
    reads_pairs, writes_pairs = pair_layouts(options, is_backward)
    wide_x = upcast(x)
    # One temporary at most, and none in fp32: on a CPU each pass over memory counts.
    wide_y = y if y.dtype == wide_x.dtype else torch.empty_like(y, dtype=wide_x.dtype)
    c = _broadcast(cos.to(wide_x.dtype), x.dim(), width, options.head_axis)
    s = _broadcast(sin.to(wide_x.dtype), x.dim(), width, options.head_axis)
    s = -s if is_backward else s
    first, second = pairs if reads_pairs else halves
    x1, x2 = wide_x[..., first], wide_x[..., second]
    first, second = pairs if writes_pairs else halves
    y1, y2 = wide_y[..., first], wide_y[..., second]
    # torch.compile breaks its graph at an out= that is a view; a copy first it takes whole.
    y1.copy_(x1).mul_(c).addcmul_(x2, s, value=-1)
    y2.copy_(x2).mul_(c).addcmul_(x1, s)
    if wide_y is not y:
        y[..., :width] = wide_y[..., :width]
    y[..., width:] = x[..., width:]


def _rope(moves, cos, sin, options, is_backward=False):
    """Turn by the angle, or by its opposite: from the first to the second of one or two moves."""
    if not (runs_triton(moves[0][0]) and runs_triton(moves[-1][0])):
        for x, y in moves:
            _turn(x, y, cos, sin, options, is_backward)
        return
    (q, yq), (k, yk) = (*moves, (None, None))[:2]
    # Heads are read where they lie; only one whose elements are apart is packed first.
    q = q if q.stride(-1) == 1 else q.contiguous()
    k = k if k is None or k.stride(-1) == 1 else k.contiguous()
    if cos.stride() != sin.stride():
        cos, sin = cos.contiguous(), sin.contiguous()
    launch_rope(q, k, yq, yk, cos, sin, options, is_backward)


@differentiable_once("rope")
class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q, k, cos, sin, options: RopeOptions):
        yq, yk = _empty_like(q), None if k is None else _empty_like(k)
        _rope([(q, yq)] if k is None else [(q, yq), (k, yk)], cos, sin, options)
        ctx.save_for_backward(cos, sin)
        ctx.options = options
        ctx.strides = yq.stride(), None if yk is None else yk.stride()
        return yq, yk

    @staticmethod
    def backward(ctx: Any, *dys: Any):
        # The gradients lie as q and k do, whatever the order of dy, so that the projections before
        # them need no copy.
        dxs: list[torch.Tensor | None] = [None, None]
        for i, dy in enumerate(dys):
            if ctx.needs_input_grad[i]:
                dxs[i] = torch.empty_strided(
                    dy.shape, ctx.strides[i], dtype=dy.dtype, device=dy.device
                )
        moves = [(dy, dx) for dy, dx in zip(dys, dxs, strict=True) if dx is not None]
        cos, sin = ctx.saved_tensors
        _rope(moves, cos, sin, ctx.options, is_backward=True)
        return *dxs, None, None, None


def rope(
    q: torch.Tensor,
    k: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    style: str = "half",
    rotary_dim: int | None = None,
    unsqueeze_dim: int = 1,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return q and k with the first rotary_dim elements of each head turned by their token's angle.

    Args:
        q: (B, H, T, D), (B, T, H, D) or (T, H, D) fp32, bf16 or fp16, read through its strides;
            copied only if the last dimension is not contiguous.
        k: As q, with its own number of heads and dtype; None to turn q alone.
        cos: (B, T, W), (1, T, W) or (T, W) of any floating dtype and strides, a constant. W is
            rotary_dim, of which the first half is read (transformers repeats it), or half of that.
            Tables that repeat each value in place (Cohere) are passed as cos[..., ::2] with
            rotary_dim; complex ones (Llama 4) as freqs.real and freqs.imag with rotary_dim.
        sin: As cos.
        style: Which elements form a pair: "half" i and i + rotary_dim / 2; "pairs" 2i and 2i + 1;
            "pairs_to_half" reads as "pairs" and writes as "half".
        rotary_dim: The width that is turned, the width of cos by default; the rest passes through.
        unsqueeze_dim: The axis of the heads in q: 1 for (B, H, T, D) and (T, H, D), 2 for
            (B, T, H, D), -2 for heads next to last whatever the rank.

    Returns:
        q and k (or None), each in its dtype, computed in fp32 and rounded once. transformers
        gives the same dtypes wherever cos has q's, and some families there (Llama) fp32 for an fp32
        cos. New tensors in the memory order of q and k, gaps left out: a transposed view gives a
        transposed view. Differentiable once; a second differentiation raises RuntimeError.

    Raises:
        ValueError: A type, device, dtype or shape, rotary_dim, unsqueeze_dim or style is not as
            above, or cos or sin requires grad.

    Source: https://arxiv.org/abs/2104.09864, equation 34.
    """
    options = _check(q, k, cos, sin, style, rotary_dim, unsqueeze_dim)
    if q.numel() == 0 or is_left_to_compiler(q):
        # A grid of size zero is no launch; this keeps the graph and gives zero gradients.
        return rope_ref(
            q, k, cos, sin, style=style, rotary_dim=rotary_dim, unsqueeze_dim=unsqueeze_dim
        )
    return _Rope.apply(q, k, cos, sin, options)


def _check(q, k, cos, sin, style, rotary_dim, unsqueeze_dim) -> RopeOptions:
    check_tensors(_TENSORS, q, k, cos, sin)
    rank = q.dim()
    if rank not in (3, 4):
        raise ValueError(f"q must be floating of rank 3 or 4, got {q.dtype} {tuple(q.shape)}")
    _STYLE.of(style)
    rotary_dim, unsqueeze_dim = _ROTARY_DIM.of(rotary_dim), _UNSQUEEZE_DIM.of(unsqueeze_dim)
    head_axis = unsqueeze_dim - rank if unsqueeze_dim >= 0 else unsqueeze_dim
    if head_axis not in (-3, -2):
        allowed = f"{rank - 3}, {rank - 2}, -3 or -2"
        raise ValueError(
            f"unsqueeze_dim must be {allowed} for q of rank {rank}, got {unsqueeze_dim}"
        )
    if k is not None and (
        k.dim() != rank or any(k.shape[i] != q.shape[i] for i in range(-rank, 0) if i != head_axis)
    ):
        raise ValueError(
            f"k must be floating and as q {tuple(q.shape)} but for the heads at {unsqueeze_dim}, "
            f"got {k.dtype} {tuple(k.shape)}"
        )
    batch, num_tokens = q.shape[0] if rank == 4 else 1, q.shape[-5 - head_axis]
    for name, table in (("cos", cos), ("sin", sin)):
        lead = table.shape[:-1]
        # One comparison a size: under torch.compile they may be symbols, and tuples of them differ.
        is_right = 1 <= len(lead) <= 2 and lead[-1] == num_tokens
        if not is_right or (len(lead) == 2 and lead[0] != 1 and lead[0] != batch):
            raise ValueError(
                f"{name} must be ({num_tokens}, W), (1, {num_tokens}, W) or "
                f"({batch}, {num_tokens}, W) for q {tuple(q.shape)} with heads at {unsqueeze_dim}, "
                f"got {tuple(table.shape)}"
            )
        if table.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{name} must not require grad: rope has no gradient for it; detach it"
            )
    if sin.shape != cos.shape:
        raise ValueError(f"sin must be as cos {tuple(cos.shape)}, got {tuple(sin.shape)}")
    width = cos.shape[-1] if rotary_dim is None else rotary_dim
    if width % 2 or not 0 < width <= q.shape[-1]:
        source = "rotary_dim (the width of cos)" if rotary_dim is None else "rotary_dim"
        raise ValueError(
            f"{source} must be even and from 2 to the head size {q.shape[-1]}, got {width}"
        )
    if cos.shape[-1] not in (width, width // 2):
        raise ValueError(
            f"cos must be as wide as rotary_dim {width} or half of it, got {cos.shape[-1]}"
        )
    return RopeOptions(style, width, head_axis)


def _sample(case: Case, dtype, device, generator) -> Sample:
    batch, num_tokens, num_q_heads, num_k_heads, head_size = case.shape
    options = dict(case.options)
    layout = options.pop("layout", "attention")
    table = options.pop("table", "full")
    table_dtype = options.pop("table_dtype", dtype)
    width = options.get("rotary_dim", head_size)

    def heads(num_heads):
        if layout == "heads":
            return randn((batch, num_heads, num_tokens, head_size), dtype, device, generator)
        # A projection's output, where the heads of a token are neighbours.
        gap = 3 if layout == "fused" else 0
        x = randn((batch, num_tokens, num_heads + gap, head_size), dtype, device, generator)
        x = x.detach()[:, :, :num_heads]
        if layout == "vision":
            x = x[0]
        elif layout == "scattered":
            x = x.transpose(2, 3).contiguous().transpose(2, 3).transpose(1, 2)
        elif options.get("unsqueeze_dim", 1) == 1:
            x = x.transpose(1, 2)
        return x.requires_grad_()

    # Samples of one batch may start anywhere, as padded or packed ones do.
    starts = torch.arange(batch if table == "per-sample" else 1) * 7
    positions = starts[:, None] + torch.arange(num_tokens)
    speeds = 1e4 ** (-torch.arange(0, width, 2) / width)
    angles = positions[..., None] * speeds
    if table == "interleaved":
        angles = angles.repeat_interleave(2, -1)
    elif table != "half":
        angles = torch.cat((angles, angles), -1)
    angles = angles[0] if table == "2-D" else angles
    cos, sin = (x.to(device, table_dtype) for x in (angles.cos(), angles.sin()))
    if table == "interleaved":
        cos, sin = cos[..., ::2], sin[..., ::2]
    k = heads(num_k_heads) if num_k_heads else None
    return Sample((heads(num_q_heads), k, cos, sin), options)


def _num_bytes(case: Case, dtype: torch.dtype) -> tuple[int, int]:
    # cos and sin are left out: at most one head's worth of bytes in all heads of a batch.
    batch, num_tokens, num_q_heads, num_k_heads, head_size = case.shape
    size = batch * num_tokens * (num_q_heads + num_k_heads) * head_size * dtype.itemsize
    return 2 * size, 2 * size


_PAIRS = {"style": "pairs"}

OP = Op(
    name="rope",
    aliases=("rotary",),
    summary="Rotary positions of q and k in one pass, through any strides; makes no temporaries.",
    function=rope,
    reference=rope_ref,
    # (B, T, HQ, HK, D): each layout, table and style once, on counts and sizes that are no powers
    # of two. q and k are transposed views, as attention makes them, where no layout is named.
    cases=(
        Case("tiny", (1, 2, 1, 1, 4)),
        Case("odd", (2, 5, 3, 1, 6), {"layout": "heads"}),
        Case("gqa-case_45", (1, 7, 6, 2, 96)),
        Case("mqa-case_45", (1, 2, 71, 1, 80)),
        Case("gqa-3-1-case_45", (2, 3, 3, 1, 40), {"layout": "heads"}),
        Case("tokens-first", (2, 9, 4, 2, 32), {"unsqueeze_dim": 2}),
        Case("per-sample-case_23", (2, 16, 4, 2, 32), {"table": "per-sample"}),
        Case("vision-case_24", (1, 12, 3, 3, 40), {"layout": "vision", "table": "2-D"}),
        Case("2-D-table", (2, 3, 2, 1, 16), {"table": "2-D"}),
        Case("partial-case_25", (1, 5, 6, 2, 96), {"rotary_dim": 72}),
        Case("partial-quarter-case_25", (1, 5, 6, 2, 80), {"rotary_dim": 20}),
        Case("pairs-partial-case_25", (1, 5, 6, 2, 128), {"rotary_dim": 64, **_PAIRS}),
        Case("pairs-half-table", (2, 3, 2, 1, 24), {"table": "half", "rotary_dim": 24, **_PAIRS}),
        Case(
            "pairs-interleaved",
            (2, 3, 2, 1, 24),
            {"table": "interleaved", "rotary_dim": 24, **_PAIRS},
        ),
        Case("pairs-to-half", (2, 3, 5, 1, 24), {"style": "pairs_to_half", "rotary_dim": 20}),
        Case("half-table", (2, 3, 4, 2, 16), {"table": "half", "rotary_dim": 16}),
        Case("fp32-table", (2, 3, 4, 2, 16), {"table_dtype": torch.float32}),
        Case("no-k", (2, 3, 5, 0, 16)),
        Case("fused-qkv", (2, 5, 4, 2, 16), {"layout": "fused"}),
        Case("scattered", (2, 5, 4, 2, 16), {"layout": "scattered"}),
        Case("real-8b", (4, 4096, 32, 8, 128), needs_gpu=True),
        Case("real-1b", (8, 2048, 32, 8, 64), needs_gpu=True),
        Case("real-glm4", (2, 4096, 32, 2, 128), {"rotary_dim": 64, **_PAIRS}, needs_gpu=True),
        Case("real-phi3", (2, 4096, 32, 32, 96), {"layout": "heads"}, needs_gpu=True),
    ),
    sample=_sample,
    num_bytes=_num_bytes,
    tensors=_TENSORS,
    options=(_STYLE, _ROTARY_DIM, _UNSQUEEZE_DIM),
)
