"""Experts of a mixture: y[t] = sum over k of w[t, k] f_e(x[t]), e = id[t, k], each f a gated MLP.

Legend: T tokens, H width, E experts, I intermediate width, K experts a token, w routing weights.
Rounding: products as eager code rounds them. The routing weight multiplies the activation
(moe_activation.py), not the output, in fp32 before it is rounded; the rows of a token are added up
in fp32 and rounded once.
Memory: saves x, ids, w and the gate_up products (moe_autograd.py).
Source: Shazeer et al., Outrageously Large Neural Networks, https://arxiv.org/abs/1701.06538, eq. 1.
"""

from typing import Any

import torch
import torch.nn.functional as F

from liger_kernels.ops.arguments import (
    LABELS,
    Choice,
    Flag,
    Number,
    TensorArgument,
    check_tensors,
)
from liger_kernels.ops.backend import is_traced_as_torch
from liger_kernels.ops.moe_activation import ACTIVATIONS, Gating, gated
from liger_kernels.ops.moe_autograd import MoeExperts, MoeSettings
from liger_kernels.ops.op import Case, Op, Sample, randn
from liger_kernels.ops.rows import rows_of

_TENSORS = (
    TensorArgument("hidden", "(T, H)", shares_dtype=True),
    TensorArgument("routing_weights", "(T, K)"),
    TensorArgument(
        "expert_ids", "(T, K)", "hold int32 or int64 ids (T, K)", LABELS, is_constant=True
    ),
    TensorArgument("gate_up", "(E, 2 I, H) or (E, I, H)", shares_dtype=True),
    TensorArgument("down", "(E, H, I)", shares_dtype=True),
    TensorArgument("gate_up_bias", "(E, 2 I)", is_optional=True, shares_dtype=True),
    TensorArgument("down_bias", "(E, H)", is_optional=True, shares_dtype=True),
)
_ACTIVATION = Choice("activation", ACTIVATIONS)
_ALPHA, _LIMIT = (
    Number("alpha"),
    Number("limit", least=0.0, allowed="a finite number, not negative"),
)
_IS_INTERLEAVED, _KEEPS_PRODUCTS = Flag("is_interleaved"), Flag("keeps_products")
_WEIGHT_ON = Choice("weight_on", ("output", "input"))


def moe_experts_ref(
    hidden: torch.Tensor,
    routing_weights: torch.Tensor,
    expert_ids: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    *,
    gate_up_bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
    activation: str = "silu",
    alpha: float = 1.702,
    limit: float = 7.0,
    is_interleaved: bool = False,
    weight_on: str = "output",
    keeps_products: bool = False,
) -> torch.Tensor:
    """The definition, in plain torch: a loop over the experts; what is kept changes no number."""
    layout = _layout(gate_up, down, is_interleaved)
    gating = Gating(activation, float(alpha), float(limit), layout)
    out = torch.zeros_like(hidden)
    for expert in range(gate_up.shape[0]):
        token, choice = torch.where(expert_ids == expert)
        x, weight = hidden[token], routing_weights[token, choice, None]
        if weight_on == "input":
            x = (x * weight).to(hidden.dtype)
        h = F.linear(x, gate_up[expert], None if gate_up_bias is None else gate_up_bias[expert])
        bias = None if down_bias is None else down_bias[expert]
        y = F.linear(gated(h, gating), down[expert], bias)
        if weight_on == "output":
            y = (y * weight).to(hidden.dtype)
        out = out.index_add(0, token, y)
    return out


def _layout(gate_up: torch.Tensor, down: torch.Tensor, is_interleaved: bool) -> str:
    if gate_up.shape[1] == down.shape[2]:
        return "none"
    return "interleaved" if is_interleaved else "halves"


def moe_experts(
    hidden: torch.Tensor,
    routing_weights: torch.Tensor,
    expert_ids: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    *,
    gate_up_bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
    activation: str = "silu",
    alpha: float = 1.702,
    limit: float = 7.0,
    is_interleaved: bool = False,
    weight_on: str = "output",
    keeps_products: bool = False,
) -> torch.Tensor:
    """Run each token through its experts and add up their outputs, each with its weight.

    Args:
        hidden: (T, H) fp32, bf16 or fp16, the dtype and device of weights and biases.
        routing_weights: (T, K) floating, of any dtype.
        expert_ids: (T, K) int32 or int64; an id that is not 0 to E - 1 is an empty slot, which adds
            nothing. Every token keeps all of its experts, however many tokens an expert gets.
        gate_up: (E, 2 I, H), the rows of gate above those of up; a transposed view is as good.
            (E, I, H) are experts without a gate: act(x).
        down: (E, H, I), likewise.
        gate_up_bias: (E, 2 I) or None.
        down_bias: (E, H) or None.
        activation: "silu", "gelu_tanh", "gelu" (the exact form), "relu2" (relu squared) or
            "gpt_oss": min(gate, limit) * sigmoid(alpha * gate) * (clamp(up, -limit, limit) + 1).
        alpha: Of gpt_oss.
        limit: Of gpt_oss.
        is_interleaved: Whether the rows of gate and up take turns in gate_up.
        weight_on: "output", or "input": each expert reads the token times its weight.
        keeps_products: Keep the gathered tokens and the activations for backward instead of
            recomputing them: H + I numbers a slot more, the same gradients.

    Returns:
        (T, H) in hidden's dtype. Differentiable once; a second differentiation raises RuntimeError.

    Raises:
        ValueError: types, devices, shapes or dtypes do not fit together, or an option is unknown.

    Source: https://arxiv.org/abs/1701.06538, equation 1.
    """
    tensors = (hidden, routing_weights, expert_ids, gate_up, down, gate_up_bias, down_bias)
    check_tensors(_TENSORS, *tensors)
    _KEEPS_PRODUCTS.of(keeps_products)
    _IS_INTERLEAVED.of(is_interleaved)
    options: dict[str, Any] = {
        "activation": _ACTIVATION.of(activation),
        "alpha": _ALPHA.of(alpha),
        "limit": _LIMIT.of(limit),
        "is_interleaved": is_interleaved,
        "weight_on": _WEIGHT_ON.of(weight_on),
    }
    _check_shapes({row.name: tensor for row, tensor in zip(_TENSORS, tensors, strict=True)})
    options |= {"gate_up_bias": gate_up_bias, "down_bias": down_bias}
    given = (hidden, routing_weights, expert_ids, gate_up, down)
    if is_traced_as_torch(hidden):
        return _traced(*given, **options)
    if expert_ids.numel() == 0 or gate_up.numel() == 0:
        # A grid of size zero is no launch; this keeps the graph and gives zero gradients.
        return moe_experts_ref(*given, **options)
    return _apply(*given, **options, keeps_products=keeps_products, makes_output=True)


def moe_experts_graph(*tensors: torch.Tensor, **options: Any) -> torch.Tensor:
    """Record the graph of moe_experts without its last products: the values returned are undefined.

    The arguments are those of a call of moe_experts that has run, of some of its tokens.
    """
    return _apply(*tensors, **options, makes_output=False)


def _apply(
    hidden: torch.Tensor,
    routing_weights: torch.Tensor,
    expert_ids: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    *,
    gate_up_bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
    activation: str = "silu",
    alpha: float = 1.702,
    limit: float = 7.0,
    is_interleaved: bool = False,
    weight_on: str = "output",
    keeps_products: bool = False,
    makes_output: bool,
) -> torch.Tensor:
    layout = _layout(gate_up, down, is_interleaved)
    gating = Gating(activation, float(alpha), float(limit), layout)
    settings = MoeSettings(gating, weight_on == "output", keeps_products, makes_output)
    return MoeExperts.apply(
        rows_of(hidden),
        routing_weights.contiguous(),
        gate_up,
        down,
        None if gate_up_bias is None else gate_up_bias.contiguous(),
        None if down_bias is None else down_bias.contiguous(),
        expert_ids,
        settings,
    )


def _traced(hidden, routing_weights, expert_ids, gate_up, down, **options) -> torch.Tensor:
    """Return the same with each slot's own copy of the weights: no shape follows the ids."""
    layout = _layout(gate_up, down, options["is_interleaved"])
    gating = Gating(options["activation"], options["alpha"], options["limit"], layout)
    is_used = (expert_ids >= 0) & (expert_ids < gate_up.shape[0])
    ids, weights = expert_ids.where(is_used, 0), routing_weights[..., None]
    x = hidden[:, None].expand(*expert_ids.shape, -1)
    if options["weight_on"] == "input":
        x = (x * weights).to(hidden.dtype)
    h = torch.einsum("tkh,tknh->tkn", x, gate_up[ids])
    if options["gate_up_bias"] is not None:
        h = h + options["gate_up_bias"][ids]
    y = torch.einsum("tki,tkhi->tkh", gated(h, gating), down[ids])
    if options["down_bias"] is not None:
        y = y + options["down_bias"][ids]
    if options["weight_on"] == "output":
        y = y * weights
    return y.where(is_used[..., None], 0).sum(1).to(hidden.dtype)


def _check_shapes(tensors: dict[str, torch.Tensor | None]) -> None:
    """Validate the shapes of the tensors of a call, by name, and that dtypes are one."""
    ranks = {"hidden": 2, "routing_weights": 2, "expert_ids": 2, "gate_up": 3, "down": 3}
    rows = {row.name: row for row in _TENSORS}
    for name, rank in ranks.items():
        tensor: Any = tensors[name]
        if tensor.dim() != rank:
            shape = rows[name].shape
            raise ValueError(f"{name} must be {shape}, got {tensor.dtype} {tuple(tensor.shape)}")
    hidden: Any = tensors["hidden"]
    ids: Any = tensors["expert_ids"]
    down: Any = tensors["down"]
    num_tokens, width = hidden.shape
    num_experts, _, inner = down.shape
    gate_up: Any = tensors["gate_up"]
    wide = inner if gate_up.shape[1] == inner else 2 * inner
    expected: dict[str, tuple[int, ...]] = {
        "expert_ids": (num_tokens, ids.shape[1]),
        "routing_weights": tuple(ids.shape),
        "down": (num_experts, width, inner),
        "gate_up": (num_experts, wide, width),
        "gate_up_bias": (num_experts, wide),
        "down_bias": (num_experts, width),
    }
    for name, sizes in expected.items():
        found = tensors[name]
        if found is None:
            continue
        dtype = hidden.dtype if rows[name].shares_dtype else found.dtype
        if found.shape != sizes or found.dtype != dtype:
            raise ValueError(
                f"{name} must be {sizes} {dtype} to go with hidden {tuple(hidden.shape)}, "
                f"expert_ids {tuple(ids.shape)} and down {tuple(down.shape)}, got "
                f"{tuple(found.shape)} {found.dtype}"
            )


def _sample(case: Case, dtype, device, generator) -> Sample:
    num_tokens, width, inner, num_experts, top_k = case.shape
    options = dict(case.options)
    has_bias, has_gate = options.pop("has_bias", False), options.pop("has_gate", True)
    is_transposed = options.pop("is_transposed", False)
    weights_dtype = options.pop("weights_dtype", dtype)
    ids_dtype = options.pop("ids_dtype", torch.int64)
    # Experts that tokens may go to, of which some are out of range.
    first, last = options.pop("chosen", (0, num_experts))
    scale = options.pop("scale", 2.0)

    def weight(num_rows, num_columns):
        # Products of about the size of their input, as a freshly made layer gives.
        shape = (num_experts, num_rows, num_columns)
        shape = (num_experts, num_columns, num_rows) if is_transposed else shape
        x = randn(shape, dtype, device, generator, scale=num_columns**-0.5)
        return x.detach().transpose(1, 2).requires_grad_() if is_transposed else x

    hidden = randn((num_tokens, width), dtype, device, generator, scale=scale)
    scores = torch.rand(num_tokens, last - first, generator=generator)
    chosen = scores.topk(top_k, dim=1)
    routing_weights = chosen.values.to(device, weights_dtype).requires_grad_()
    expert_ids = (chosen.indices + first).to(device, ids_dtype)
    wide = 2 * inner if has_gate else inner
    if has_bias:
        options["gate_up_bias"] = randn((num_experts, wide), dtype, device, generator)
        options["down_bias"] = randn((num_experts, width), dtype, device, generator)
    args = (hidden, routing_weights, expert_ids, weight(wide, width), weight(width, inner))
    return Sample(args, options)


def _num_bytes(case: Case, dtype: torch.dtype) -> tuple[int, int]:
    """Forward reads x and the weights and writes the gate_up products and y; backward reads those,
    dy and x, and writes the gradients of x and of the weights."""
    num_tokens, width, inner, num_experts, top_k = case.shape
    weights, kept = 3 * num_experts * width * inner, 2 * num_tokens * top_k * inner
    forward = 2 * num_tokens * width + kept + weights
    backward = 3 * num_tokens * width + kept + 2 * weights
    return forward * dtype.itemsize, backward * dtype.itemsize


def _num_flops(case: Case) -> int:
    """Three products of each slot, and in backward twice as many."""
    num_tokens, width, inner, _, top_k = case.shape
    return 18 * num_tokens * top_k * width * inner


OP = Op(
    name="moe_experts",
    aliases=("moe", "experts"),
    summary="All experts of a mixture; keeps x, the routing and gate_up, not rows or activations.",
    function=moe_experts,
    reference=moe_experts_ref,
    # Tokens, width, inner width, experts, choices. Each activation, layout and place of the
    # weight; experts without tokens, slots without experts; one expert, one choice, one token.
    cases=(
        Case("tiny", (6, 16, 8, 4, 2)),
        Case("odd", (7, 33, 21, 3, 2)),
        Case("one-expert", (5, 16, 24, 1, 1)),
        Case("one-choice", (9, 16, 12, 6, 1)),
        Case("one-token", (1, 24, 16, 8, 3)),
        Case("every-expert", (4, 16, 8, 3, 3)),
        Case("idle", (5, 16, 8, 9, 2), {"chosen": (3, 6)}),
        Case("empty-slots", (6, 16, 8, 4, 2), {"chosen": (-2, 6)}),
        Case("all-empty", (3, 16, 8, 4, 2), {"chosen": (4, 7)}),
        Case("bias", (6, 16, 8, 4, 2), {"has_bias": True}),
        Case(
            "gpt-oss",
            (6, 16, 12, 4, 2),
            {
                "activation": "gpt_oss",
                "limit": 2.0,
                "is_interleaved": True,
                "is_transposed": True,
                "has_bias": True,
            },
        ),
        Case("input", (6, 16, 8, 4, 2), {"weight_on": "input"}),
        Case("llama4", (6, 16, 8, 4, 1), {"weight_on": "input", "is_transposed": True}),
        Case("input-bias", (5, 16, 8, 4, 2), {"weight_on": "input", "has_bias": True}),
        Case("gelu-tanh", (6, 16, 8, 4, 2), {"activation": "gelu_tanh"}),
        Case("gelu", (6, 16, 8, 4, 2), {"activation": "gelu", "is_interleaved": True}),
        Case("relu2", (6, 16, 8, 4, 2), {"activation": "relu2"}),
        Case("no-gate", (6, 16, 8, 4, 2), {"activation": "relu2", "has_gate": False}),
        Case("keeps-products", (6, 16, 8, 4, 2), {"keeps_products": True, "has_bias": True}),
        Case("fp32-weights", (6, 16, 8, 4, 2), {"weights_dtype": torch.float32}),
        Case("int32", (6, 16, 8, 4, 2), {"ids_dtype": torch.int32}),
        Case("blocks-of-slots", (50, 8, 4, 5, 2)),
        Case("no-tokens", (0, 16, 8, 4, 2)),
        Case("real", (2048, 1024, 768, 32, 8), needs_gpu=True),
        Case(
            "real-fp32-weights",
            (4096, 2048, 768, 128, 8),
            {"weights_dtype": torch.float32},
            needs_gpu=True,
        ),
        Case("real-few", (1024, 2048, 1024, 64, 8), {"chosen": (5, 40)}, needs_gpu=True),
        Case("real-wide", (2048, 1024, 3584, 8, 2), needs_gpu=True),
        Case(
            "real-gpt-oss",
            (1024, 2880, 2880, 8, 4),
            {
                "activation": "gpt_oss",
                "is_interleaved": True,
                "is_transposed": True,
                "has_bias": True,
            },
            needs_gpu=True,
        ),
        Case(
            "real-llama4",
            (1024, 2048, 1024, 16, 1),
            {"weight_on": "input", "is_transposed": True},
            needs_gpu=True,
        ),
    ),
    sample=_sample,
    num_bytes=_num_bytes,
    num_flops=_num_flops,
    tensors=_TENSORS,
    options=(_ACTIVATION, _ALPHA, _LIMIT, _IS_INTERLEAVED, _WEIGHT_ON, _KEEPS_PRODUCTS),
)
