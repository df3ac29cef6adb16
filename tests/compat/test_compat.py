"""The drop-in for liger_kernel: its names, what they compute, who may use it, and the way back."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import pickle
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers.models.gemma.modeling_gemma import GemmaMLP, GemmaRMSNorm
from transformers.models.llama.modeling_llama import (
    LlamaMLP,
    LlamaRMSNorm,
    apply_rotary_pos_emb,
)

from liger_kernels import compat
from liger_kernels.ops.backend import INTERPRETED

pytestmark = [
    pytest.mark.skipif(INTERPRETED, reason="runs without the interpreter"),
    pytest.mark.skipif(
        "liger_kernel" in sys.modules or importlib.util.find_spec("liger_kernel") is not None,
        reason="the original liger_kernel is installed; the drop-in refuses then",
    ),
]


# What the names compute -------------------------------------------------------------------------


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def gradients(function: Callable[..., Any], *inputs: Tensor | None) -> list[Tensor]:
    """Return what a function gives, and the gradients of its inputs and parameters."""
    leaves = [x.detach().clone().requires_grad_(x.requires_grad) for x in inputs if x is not None]
    given = iter(leaves)
    out = function(*(None if x is None else next(given) for x in inputs))
    outputs = list(out) if isinstance(out, tuple) else [out]
    wanted = [x for x in leaves if x.requires_grad]
    wanted += list(function.parameters()) if isinstance(function, nn.Module) else []
    dy = [randn(*y.shape, seed=9).detach() for y in outputs]
    return [y.detach() for y in outputs] + list(torch.autograd.grad(outputs, wanted, dy))


def same(ours: list[Tensor], wanted: list[Tensor]) -> None:
    assert len(ours) == len(wanted) > 1
    for got, value in zip(ours, wanted, strict=True):
        torch.testing.assert_close(got, value, rtol=2e-5, atol=2e-5)


def config(**options: Any) -> Any:
    return transformers.LlamaConfig(
        hidden_size=24, intermediate_size=40, num_attention_heads=4, **options
    )


def gemma_config() -> Any:
    return transformers.GemmaConfig(hidden_size=24, intermediate_size=40)


# name: (how ours is made, the stock module it equals)
MODULES: dict[str, tuple[Callable[[Any], nn.Module], Callable[[], nn.Module]]] = {
    "rms-llama": (lambda a: a.LigerRMSNorm(24, eps=1e-5), lambda: LlamaRMSNorm(24, eps=1e-5)),
    "rms-torch": (lambda a: a.LigerRMSNorm(24), lambda: nn.RMSNorm(24, eps=1e-6)),
    "rms-gemma": (
        lambda a: a.LigerRMSNorm(24, 1e-6, offset=1.0, casting_mode="gemma", init_fn="zeros"),
        lambda: GemmaRMSNorm(24, eps=1e-6),
    ),
    "layer": (
        lambda a: a.LigerLayerNorm(24, eps=1e-5, bias=True),
        lambda: nn.LayerNorm(24, eps=1e-5),
    ),
    "layer-no-bias": (
        lambda a: a.LigerLayerNorm(24),
        lambda: nn.LayerNorm(24, eps=1e-6, bias=False),
    ),
    "swiglu": (lambda a: a.LigerSwiGLUMLP(config()), lambda: LlamaMLP(config())),
    "swiglu-bias": (
        lambda a: a.LigerSwiGLUMLP(config(mlp_bias=True)),
        lambda: LlamaMLP(config(mlp_bias=True)),
    ),
    "geglu": (lambda a: a.LigerGEGLUMLP(gemma_config()), lambda: GemmaMLP(gemma_config())),
    # gelu alone is the exact form.
    "geglu-exact": (
        lambda a: a.LigerGEGLUMLP(config(hidden_act="gelu")),
        lambda: LlamaMLP(config(hidden_act="gelu")),
    ),
}


@pytest.mark.parametrize("name", MODULES)
def test_module(name, alias):
    make, make_stock = MODULES[name]
    ours, stock = make(alias), make_stock()
    if "glu" not in name:
        assert all(torch.equal(*p) for p in zip(ours.parameters(), stock.parameters(), strict=True))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in stock.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    ours.load_state_dict(stock.state_dict())
    x = randn(3, 5, 24)
    same(gradients(ours, x), gradients(stock, x))
    # Without the drop-in, what was made with it still works and can be copied.
    compat.uninstall()
    assert torch.equal(pickle.loads(pickle.dumps(ours))(x), ours(x))


def test_norms_round_where_stock_ones_do(alias):
    x = randn(4, 24).detach().bfloat16()
    for name in ("rms-llama", "rms-gemma"):
        make, make_stock = MODULES[name]
        ours, stock = make(alias), make_stock()
        with torch.no_grad():
            stock.weight.copy_(randn(24, seed=1))
        ours.load_state_dict(stock.state_dict())
        for dtype in (torch.float32, torch.bfloat16):
            got, wanted = ours.to(dtype)(x), stock.to(dtype)(x)
            assert got.dtype == wanted.dtype
            torch.testing.assert_close(got, wanted, rtol=1e-2, atol=1e-2)


CLASS_WEIGHT = torch.linspace(0.2, 2.0, 11)


LOSSES: dict[str, dict[str, Any]] = {
    "plain": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "smoothing": {"label_smoothing": 0.1},
    "ignore": {"ignore_index": 4},
    "weight": {"weight": CLASS_WEIGHT},
}


TARGET = torch.tensor([3, 4, -100, 0, 10, 4, 7])


def target_of(options: dict[str, Any]) -> Tensor:
    return TARGET.abs() % 11 if "ignore_index" in options else TARGET


@pytest.mark.parametrize("name", LOSSES)
def test_cross_entropy_is_that_of_torch(name, alias):
    options = LOSSES[name]
    functional = importlib.import_module("liger_kernel.transformers.functional")
    target = target_of(options)
    ours, stock = alias.LigerCrossEntropyLoss(**options), nn.CrossEntropyLoss(**options)
    logits = randn(7, 11)
    wanted = gradients(lambda x: stock(x, target), logits)
    same(gradients(lambda x: ours(x, target), logits), wanted)
    same(gradients(lambda x: functional.liger_cross_entropy(x, target, **options), logits), wanted)
    assert ours.state_dict().keys() == stock.state_dict().keys()
    # As torch, classes second: tools put it in the place of F.cross_entropy.
    images = randn(7, 11, 2, 3)
    targets = target[:, None, None].expand(7, 2, 3).contiguous()
    wanted = gradients(lambda x: F.cross_entropy(x, targets, **options), images)
    same(gradients(lambda x: functional.liger_cross_entropy(x, targets, **options), images), wanted)


@pytest.mark.parametrize("has_bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("name", LOSSES)
def test_fused_cross_entropy_is_linear_and_cross_entropy(name, has_bias, alias):
    options = dict(LOSSES[name])
    functional = importlib.import_module("liger_kernel.transformers.functional")
    target = target_of(options)
    hidden, head, bias = randn(7, 5), randn(11, 5, seed=1), randn(11, seed=2) if has_bias else None
    wanted = gradients(
        lambda x, w, b: F.cross_entropy(F.linear(x, w, b), target, **options), hidden, head, bias
    )
    if "weight" in options:
        options["ce_weight"] = options.pop("weight")
    ours = alias.LigerFusedLinearCrossEntropyLoss(**options)
    same(gradients(lambda x, w, b: ours(w, x, target, b), hidden, head, bias), wanted)
    function = functional.liger_fused_linear_cross_entropy
    same(
        gradients(lambda x, w, b: function(x, w, target, b, **options), hidden, head, bias), wanted
    )


def test_losses_cap_logits_and_add_the_z_loss(alias):
    functional = importlib.import_module("liger_kernel.transformers.functional")
    options = {"softcap": 2.0, "lse_square_scale": 0.1}
    hidden, head = randn(7, 5), randn(11, 5, seed=1)

    def reference(logits: Tensor) -> Tensor:
        logits = 2.0 * torch.tanh(logits / 2.0)
        z = logits.logsumexp(-1)[TARGET != -100].square().mean()
        return F.cross_entropy(logits, TARGET) + 0.1 * z

    logits = randn(7, 11)
    wanted = gradients(reference, logits)
    for loss in (
        lambda x: functional.liger_cross_entropy(x, TARGET, **options),
        lambda x: alias.LigerCrossEntropyLoss(**options)(x, TARGET),
    ):
        same(gradients(loss, logits), wanted)
    wanted = gradients(lambda x, w: reference(x @ w.T), hidden, head)
    for fused in (
        lambda x, w: functional.liger_fused_linear_cross_entropy(x, w, TARGET, **options),
        lambda x, w: alias.LigerFusedLinearCrossEntropyLoss(**options)(w, x, TARGET),
    ):
        same(gradients(fused, hidden, head), wanted)


@pytest.mark.parametrize("unsqueeze_dim", [1, 2])
def test_rope_is_that_of_transformers(unsqueeze_dim, alias):
    rope = importlib.import_module("liger_kernel.transformers.rope").liger_rotary_pos_emb
    functional = importlib.import_module("liger_kernel.transformers.functional")
    shapes = ((2, 4, 6, 8), (2, 2, 6, 8)) if unsqueeze_dim == 1 else ((2, 6, 4, 8), (2, 6, 2, 8))
    q, k = (randn(*shape, seed=i) for i, shape in enumerate(shapes))
    angles = randn(2, 6, 4, seed=3).detach().repeat(1, 1, 2)
    tables = angles.cos(), angles.sin()
    wanted = gradients(
        lambda q, k: apply_rotary_pos_emb(q, k, *tables, unsqueeze_dim=unsqueeze_dim), q, k
    )
    for function in (rope, alias.liger_rotary_pos_emb, functional.liger_rope):
        same(
            gradients(lambda q, k: function(q, k, *tables, unsqueeze_dim=unsqueeze_dim), q, k),  # noqa: B023
            wanted,
        )


def test_functions_without_parameters(alias):
    functional = importlib.import_module("liger_kernel.transformers.functional")
    a, b, w = randn(3, 8), randn(3, 8, seed=1), randn(8, seed=2)
    same(gradients(functional.liger_swiglu, a, b), gradients(lambda a, b: F.silu(a) * b, a, b))
    same(
        gradients(functional.liger_geglu, a, b),
        gradients(lambda a, b: F.gelu(a, approximate="tanh") * b, a, b),
    )
    same(
        gradients(lambda x, w: functional.liger_rms_norm(x, w, 1e-5), a, w),
        gradients(lambda x, w: F.rms_norm(x, (8,), w, 1e-5), a, w),
    )
    same(
        gradients(lambda x, w: functional.liger_rms_norm(x, w, 1e-5, 1.0, "gemma"), a, w),
        gradients(lambda x, w: F.rms_norm(x, (8,), w + 1.0, 1e-5), a, w),
    )
    same(
        gradients(lambda x, w, b: functional.liger_layer_norm(x, w, b, 1e-5), a, w, w),
        gradients(lambda x, w, b: F.layer_norm(x, (8,), w, b, 1e-5), a, w, w),
    )


X, V = torch.ones(2, 4), torch.tensor([1, 2])


# What we do not have: the call, the words of the error.
REFUSALS: dict[str, tuple[Callable[[Any, Any], Any], str]] = {
    "casting": (lambda a, f: a.LigerRMSNorm(4, casting_mode="fp8"), "casting_mode.*'fp8'"),
    "row-mode": (lambda a, f: a.LigerRMSNorm(4, row_mode=True), "row_mode=True"),
    "init": (lambda a, f: a.LigerLayerNorm(4, init_fn="normal"), "init_fn.*'normal'"),
    "activation": (lambda a, f: a.LigerSwiGLUMLP(gemma_config()), "silu, swish.*gelu_pytorch_tanh"),
    "gelu": (lambda a, f: a.LigerGEGLUMLP(config()), "gelu_pytorch_tanh.*'silu'"),
    "accum-dtype": (
        lambda a, f: a.LigerFusedLinearCrossEntropyLoss(accum_dtype=torch.float32),
        "accum_dtype=torch.float32",
    ),
    "accum-dtype-function": (
        lambda a, f: f.liger_fused_linear_cross_entropy(X, X, V, accum_dtype=torch.float32),
        "accum_dtype=torch.float32",
    ),
    "size-average": (
        lambda a, f: f.liger_cross_entropy(X, V, size_average=False),
        "size_average=False",
    ),
    "reduce": (lambda a, f: f.liger_cross_entropy(X, V, reduce=True), "reduce=True"),
    "positions": (
        lambda a, f: f.liger_rope(X, X, X, X, position_ids=V),
        "position_ids",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_no_op_has_is_refused(name, alias):
    call, words = REFUSALS[name]
    functional = importlib.import_module("liger_kernel.transformers.functional")
    with pytest.raises(ValueError, match=words):
        call(alias, functional)


def test_unknown_arguments_are_named(alias):
    for make in (alias.LigerCrossEntropyLoss, alias.LigerFusedLinearCrossEntropyLoss):
        with pytest.raises(TypeError, match="chunk_dtype"):
            make(chunk_dtype=torch.float32)
        # In torch the second is another than in the original; neither is guessed.
        with pytest.raises(TypeError, match="positional"):
            make(CLASS_WEIGHT)
