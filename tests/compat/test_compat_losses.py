"""The drop-in's losses under every combination of their options, and every name's return dtype."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GemmaConfig, LlamaConfig
from transformers.models.gemma.modeling_gemma import GemmaMLP
from transformers.models.llama.modeling_llama import (
    LlamaMLP,
    LlamaRMSNorm,
    apply_rotary_pos_emb,
)

from liger_kernels.compat import functional, losses, modules
from liger_kernels.ops.backend import INTERPRETED

pytestmark = pytest.mark.skipif(INTERPRETED, reason="runs without the interpreter")

ROWS, WIDTH, VOCAB = 9, 6, 11
WEIGHT = torch.linspace(0.2, 2.0, VOCAB)
CHOICES: dict[str, tuple[Any, ...]] = {
    "weight": (None, WEIGHT),
    "ignore_index": (-100, 4),
    "lse_square_scale": (0.0, 1e-2),
    "label_smoothing": (0.0, 0.1),
    "reduction": ("mean", "sum", "none"),
    "softcap": (None, 2.0),
}
COMBINATIONS = [
    dict(zip(CHOICES, values, strict=True)) for values in itertools.product(*CHOICES.values())
]


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def reference(
    logits: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None,
    ignore_index: int,
    lse_square_scale: float,
    label_smoothing: float,
    reduction: str,
    softcap: float | None,
) -> Tensor:
    """Return torch's cross entropy plus the z-loss, which a mean divides by the labels."""
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    loss = F.cross_entropy(
        logits,
        target,
        weight,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction=reduction,
    )
    is_label = target != ignore_index
    z_loss = lse_square_scale * logits.logsumexp(-1).square() * is_label
    if reduction == "mean":
        return loss + z_loss.sum() / is_label.sum()
    return loss + (z_loss.sum() if reduction == "sum" else z_loss)


def of_logits(options: dict[str, Any]) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    return {
        "function": lambda x, target: losses.liger_cross_entropy(x, target, **options),
        "module": lambda x, target: modules.LigerCrossEntropyLoss(**options)(x, target),
    }


def of_hidden(options: dict[str, Any]) -> dict[str, Callable[..., Tensor]]:
    options = dict(options)
    options["ce_weight"] = options.pop("weight")
    fused = losses.liger_fused_linear_cross_entropy
    return {
        "function": lambda x, w, target, b: fused(x, w, target, b, **options),
        "module": lambda x, w, target, b: modules.LigerFusedLinearCrossEntropyLoss(**options)(
            w, x, target, b
        ),
    }


def assert_same(ours: Tensor, wanted: Tensor, inputs: list[Tensor], what: str) -> None:
    dy = randn(*wanted.shape, seed=9).detach()
    torch.testing.assert_close(ours, wanted, rtol=2e-5, atol=2e-5, msg=lambda m: f"{what}: {m}")
    grads = torch.autograd.grad(ours, inputs, dy)
    wanted_grads = torch.autograd.grad(wanted, inputs, dy)
    for got, grad in zip(grads, wanted_grads, strict=True):
        torch.testing.assert_close(got, grad, rtol=2e-5, atol=2e-5, msg=lambda m: f"{what}: {m}")


def describe(options: dict[str, Any]) -> str:
    return ", ".join(f"{k}={'w' if isinstance(v, Tensor) else v}" for k, v in options.items())


@pytest.mark.parametrize("reduction", CHOICES["reduction"])
@pytest.mark.parametrize("lse_square_scale", CHOICES["lse_square_scale"])
def test_case_207_every_combination_of_options_is_its_definition(lse_square_scale, reduction):
    # The labels' weights do not sum to their number, and one label is an ignore_index.
    target = torch.tensor([3, 4, 9, 0, 10, 4, 7, 9, 10])
    logits = randn(ROWS, VOCAB, seed=0)
    hidden, head, bias = randn(ROWS, WIDTH, seed=1), randn(VOCAB, WIDTH, seed=2), randn(11, seed=3)
    chosen = {"lse_square_scale": lse_square_scale, "reduction": reduction}
    combinations = [options for options in COMBINATIONS if options.items() >= chosen.items()]
    assert len(combinations) == 16
    for options in combinations:
        labels = target
        if options["ignore_index"] == -100:
            labels = target.masked_fill(target == 4, -100)
        for form, loss in of_logits(options).items():
            wanted = reference(logits, labels, **options)
            assert_same(loss(logits, labels), wanted, [logits], f"{form} {describe(options)}")
        for form, loss in of_hidden(options).items():
            wanted = reference(F.linear(hidden, head, bias), labels, **options)
            ours = loss(hidden, head, labels, bias)
            assert_same(ours, wanted, [hidden, head, bias], f"fused {form} {describe(options)}")


@pytest.mark.parametrize("lead", [(2, 3), ()])
def test_case_207_other_shapes(lead):
    options = {**COMBINATIONS[0], "weight": WEIGHT, "lse_square_scale": 0.1}
    if lead:
        target = torch.tensor([[3, -100, 9], [0, 10, 7]])
        logits = randn(2, VOCAB, 3, seed=0)
        flat, labels = logits.movedim(1, -1).flatten(0, 1), target.flatten()
    else:
        target, logits = torch.tensor(3), randn(VOCAB, seed=0)
        flat, labels = logits[None], target[None]
    for form, loss in of_logits(options).items():
        assert_same(loss(logits, target), reference(flat, labels, **options), [logits], form)


def test_case_207_without_labels_the_loss_is_zero():
    options = {**COMBINATIONS[0], "weight": WEIGHT, "lse_square_scale": 0.1}
    target = torch.full((ROWS,), -100)
    logits, hidden = randn(ROWS, VOCAB, seed=0), randn(ROWS, WIDTH, seed=1)
    for loss in of_logits(options).values():
        ours = loss(logits, target)
        assert ours == 0.0
        assert not torch.autograd.grad(ours, logits)[0].any()
    for fused in of_hidden(options).values():
        assert fused(hidden, randn(VOCAB, WIDTH, seed=2), target, None) == 0.0


@pytest.mark.parametrize("weight", [torch.ones(VOCAB + 1), torch.ones(VOCAB).long()])
def test_case_207_bad_class_weights_are_named(weight):
    options = {**COMBINATIONS[0], "weight": weight, "lse_square_scale": 0.1}
    target = torch.tensor([3, 4, 9, 0, 10, 4, 7, 9, 10])
    for loss in of_logits(options).values():
        with pytest.raises(ValueError, match="weight must be floating"):
            loss(randn(ROWS, VOCAB, seed=0), target)
    for fused in of_hidden(options).values():
        with pytest.raises(ValueError, match="weight must be floating"):
            fused(randn(ROWS, WIDTH, seed=1), randn(VOCAB, WIDTH, seed=2), target, None)


# Return dtypes ------------------------------------------------------------------------------------

TARGET = torch.tensor([3, 4, -100, 0, 10, 4, 7, 9, 10])


def llama_config() -> Any:
    return LlamaConfig(hidden_size=8, intermediate_size=12, num_attention_heads=2)


def gemma_config() -> Any:
    return GemmaConfig(hidden_size=8, intermediate_size=12)


def x(dtype: torch.dtype, *shape: int) -> Tensor:
    return randn(*shape, seed=0).detach().to(dtype)


def glu_pair(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return x(dtype, 3, 8), x(dtype, 3, 8)


def rope_inputs(dtype: torch.dtype) -> tuple[Tensor, ...]:
    return x(dtype, 1, 2, 5, 4), x(dtype, 1, 2, 5, 4), x(dtype, 1, 5, 4), x(dtype, 1, 5, 4)


def fused_inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    return x(dtype, ROWS, WIDTH), x(dtype, VOCAB, WIDTH), TARGET


def upcast_loss(x: Tensor, w: Tensor, target: Tensor) -> Tensor:
    """Return the loss as transformers' models compute it, from logits in fp32."""
    return F.cross_entropy(F.linear(x, w).float(), target)


# name: (ours, the stock one), both functions of a dtype.
NAMES: dict[str, tuple[Callable[[torch.dtype], Any], Callable[[torch.dtype], Any]]] = {
    "liger_cross_entropy": (
        lambda d: losses.liger_cross_entropy(x(d, ROWS, VOCAB), TARGET),
        lambda d: F.cross_entropy(x(d, ROWS, VOCAB), TARGET),
    ),
    "LigerCrossEntropyLoss": (
        lambda d: modules.LigerCrossEntropyLoss(reduction="none")(x(d, ROWS, VOCAB), TARGET),
        lambda d: nn.CrossEntropyLoss(reduction="none")(x(d, ROWS, VOCAB), TARGET),
    ),
    "liger_fused_linear_cross_entropy": (
        lambda d: losses.liger_fused_linear_cross_entropy(*fused_inputs(d)),
        lambda d: upcast_loss(*fused_inputs(d)),
    ),
    "LigerFusedLinearCrossEntropyLoss": (
        lambda d: modules.LigerFusedLinearCrossEntropyLoss()(
            x(d, VOCAB, WIDTH), x(d, ROWS, WIDTH), TARGET
        ),
        lambda d: upcast_loss(*fused_inputs(d)),
    ),
    "liger_swiglu": (
        lambda d: functional.liger_swiglu(*glu_pair(d)),
        lambda d: F.silu(glu_pair(d)[0]) * glu_pair(d)[1],
    ),
    "liger_geglu": (
        lambda d: functional.liger_geglu(*glu_pair(d)),
        lambda d: F.gelu(glu_pair(d)[0], approximate="tanh") * glu_pair(d)[1],
    ),
    "LigerSwiGLUMLP": (
        lambda d: modules.LigerSwiGLUMLP(llama_config()).to(d)(x(d, 3, 8)),
        lambda d: LlamaMLP(llama_config()).to(d)(x(d, 3, 8)),
    ),
    "LigerGEGLUMLP": (
        lambda d: modules.LigerGEGLUMLP(gemma_config()).to(d)(x(d, 3, 8)),
        lambda d: GemmaMLP(gemma_config()).to(d)(x(d, 3, 8)),
    ),
    "liger_rms_norm": (
        lambda d: functional.liger_rms_norm(x(d, 3, 8), x(d, 8), 1e-6),
        lambda d: LlamaRMSNorm(8).to(d)(x(d, 3, 8)),
    ),
    "LigerRMSNorm": (
        lambda d: modules.LigerRMSNorm(8).to(d)(x(d, 3, 8)),
        lambda d: LlamaRMSNorm(8).to(d)(x(d, 3, 8)),
    ),
    "liger_layer_norm": (
        lambda d: functional.liger_layer_norm(x(d, 3, 8), x(d, 8), x(d, 8), 1e-6),
        lambda d: F.layer_norm(x(d, 3, 8), (8,), x(d, 8), x(d, 8)),
    ),
    "LigerFusedAddRMSNorm": (
        lambda d: modules.LigerFusedAddRMSNorm(8).to(d)(x(d, 3, 8), x(d, 3, 8))[0],
        lambda d: LlamaRMSNorm(8).to(d)(x(d, 3, 8) + x(d, 3, 8)),
    ),
    "LigerLayerNorm": (
        lambda d: modules.LigerLayerNorm(8).to(d)(x(d, 3, 8)),
        lambda d: nn.LayerNorm(8, bias=False).to(d)(x(d, 3, 8)),
    ),
    "liger_rope": (
        lambda d: functional.liger_rope(*rope_inputs(d))[0],
        lambda d: apply_rotary_pos_emb(*rope_inputs(d))[0],
    ),
}


def test_every_name_has_a_dtype_case():
    assert set(NAMES) == {*functional.__all__, *losses.__all__, *modules.__all__}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", NAMES)
def test_case_208_return_dtypes_are_those_of_torch(name, dtype):
    ours, stock = (make(dtype) for make in NAMES[name])
    if "fused" in name.lower() and dtype == torch.float64:
        # Its upcast is to fp32; the op has fp64 for fp64.
        assert ours.dtype == torch.float64
    else:
        assert ours.dtype == stock.dtype
    if "Loss" in name or "entropy" in name:
        # The same numbers, too: a dtype is easy to return of others.
        torch.testing.assert_close(ours, stock.to(ours.dtype), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("name", ["liger_cross_entropy", "LigerCrossEntropyLoss"])
def test_case_208_losses_under_autocast(name):
    with torch.autocast("cpu", torch.bfloat16):
        ours, stock = (make(torch.bfloat16) for make in NAMES[name])
    assert ours.dtype == stock.dtype == torch.float32


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_case_208_gradients_keep_the_dtype_of_the_logits(reduction):
    logits = x(torch.bfloat16, ROWS, VOCAB).requires_grad_()
    loss = losses.liger_cross_entropy(logits, TARGET, reduction=reduction)
    stock = F.cross_entropy(logits, TARGET, reduction=reduction)
    (ours,) = torch.autograd.grad(loss.sum(), logits)
    (wanted,) = torch.autograd.grad(stock.sum(), logits)
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours, wanted, rtol=2e-2, atol=2e-2)
